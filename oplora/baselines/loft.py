"""LoFT (arXiv 2505.21289): AdamW of the full weights, as far as A or B in turn can follow it."""

import math
from collections.abc import Iterable

import torch
from peft import PeftModel
from torch import Tensor

from oplora.baselines.pairs import PairOptimizer, compute_dtype, pair_groups


class LoFT(PairOptimizer):
    """Adam's moments of the gradient G of W = W0 + s B A, projected to what a factor can reach.

    For B, and with A^T in place of B alike for A, at step t:

        g = gB (A A^T)^-1 / s, of which g A is G projected to A's rows
        m <- b1 m R + (1 - b1) g,  R = A_old A^T (A A^T)^-1,  for G's first moment m A
        P <- b2 R^T P R + (1 - b2) g^T g, a matrix (r, r) per row of B, for G's second one
        U = (m A / (1 - b1^t)) / (sqrt(diag(A^T P A) / (1 - b2^t)) + eps)
        B <- (1 - lr weight_decay) B - lr U A^T (A A^T)^-1 / s

    Both factors' moments follow in each step, B moves in the odd ones and A in the even ones. At
    full rank this is AdamW of W. Two things the authors' code has otherwise: R P R^T, with which
    that does not hold, and moments of B from the A that has just moved. reg, added to A A^T: for
    gradients of A, of B. State: m and P, (r + 1) values per value of the adapter. Groups with
    pairs=False: AdamW. The gradient's norm is clipped as Trainer does, over A and B.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        scaling: float = 1.0,
        reg: tuple[float, float] = (1e-6, 1e-8),
    ):
        adam = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, **adam, scaling=scaling, reg=reg)

    def _update(self, group: dict, As: list[Tensor], Bs: list[Tensor]):
        for A, B in zip(As, Bs, strict=True):  # one by one: U has the size of W
            tall = [F.to(compute_dtype(F)) for F in (A.mT, B)]
            gradients = [g.to(compute_dtype(g)) for g in (A.grad.mT, B.grad)]
            inverses = []
            for number, p in enumerate((A, B)):
                other = tall[1 - number]
                gram = other.mT @ other
                gram.diagonal().add_(group["reg"][number])
                inverses.append(torch.linalg.inv(gram))
                self._follow(group, p, gradients[number], other, inverses[number])
            number = int(self.state[B]["step"]) % 2  # A, then B: B moves first
            p, F, other = (A, B)[number], tall[number], tall[1 - number]
            update = self._full(group, p, other) @ other @ inverses[number]
            F = F * (1 - group["lr"] * group["weight_decay"])
            F -= update * (group["lr"] / group["scaling"])
            p.copy_(F if p is B else F.mT)

    def _follow(self, group: dict, p: Tensor, g: Tensor, other: Tensor, inverse: Tensor):
        """Moments of a tall factor (d, r) after this gradient, in terms of the other one."""
        (b1, b2), state = group["betas"], self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state |= {"exp_avg": torch.zeros_like(g), "other": torch.zeros_like(other)}
            state["exp_avg_sq"] = g.new_zeros(*g.shape, g.shape[-1])
        state["step"] += 1
        g = g @ inverse / group["scaling"]
        R = state["other"].mT @ other @ inverse
        state["exp_avg"] = b1 * (state["exp_avg"] @ R) + (1 - b1) * g
        P = b2 * (R.mT @ state["exp_avg_sq"] @ R)
        state["exp_avg_sq"] = P + (1 - b2) * g.unsqueeze(-1) * g.unsqueeze(-2)
        state["other"].copy_(other)

    def _full(self, group: dict, p: Tensor, other: Tensor) -> Tensor:
        """Adam's update of W, or of its transpose, from the moments of a factor: U."""
        (b1, b2), state = group["betas"], self.state[p]
        step = int(state["step"])
        outer = (other.unsqueeze(-1) * other.unsqueeze(-2)).flatten(1)
        second = state["exp_avg_sq"].flatten(1) @ outer.mT  # of every value of W
        denominator = second.clamp_(min=0).sqrt_().div_(math.sqrt(1 - b2**step)).add_(group["eps"])
        return state["exp_avg"] @ other.mT / (1 - b1**step) / denominator


def create_loft_optimizer(model: PeftModel, *, lr: float, weight_decay: float = 0.0) -> LoFT:
    """LoFT for the Linear layers of a LoRA model, AdamW for its other trainable parameters."""
    return LoFT(pair_groups(model, by_scaling=True), lr=lr, weight_decay=weight_decay)
