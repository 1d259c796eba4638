"""LoRA-Muon (arXiv 2606.12921): steps of one spectral norm along B A, without second moments."""

import math
from collections.abc import Iterable

import torch
from peft import PeftModel
from torch import Tensor

from oplora.baselines.pairs import PairOptimizer, above_rounding, compute_dtype, pair_groups, stack


class LoRAMuon(PairOptimizer):
    """With tall factors F, G of W = s F G^T and R_F = (F^T F)^(-1/2), G alike:

        dF = -lr/2 msign(m_F R_G) R_G,  F <- k F + dF/(k s),  k = sqrt(1 - lr weight_decay)

    m is the mean of the gradients with `momentum`. msign and the roots come from eigenvalues in
    float64, not from Newton-Schulz steps; directions that are rounding noise do not move
    (`above_rounding`), so that B alone moves in the first step. The paper has no s: as if it were
    part of the factors. betas, eps: of AdamW for groups with pairs=False (`PairOptimizer`).
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        scaling: float = 1.0,
    ):
        adam = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, **adam, momentum=momentum, scaling=scaling)

    def _update(self, group: dict, As: list[Tensor], Bs: list[Tensor]):
        shrink = math.sqrt(max(1e-12, 1 - group["lr"] * group["weight_decay"]))
        tall = [stack(As).mT, stack(Bs)]
        moments = [self._momentum(As, group).mT, self._momentum(Bs, group)]
        roots = [inverse_root(F) for F in tall]
        for params, F, m, R in zip((As, Bs), tall, moments, roots[::-1], strict=True):
            m = m @ R
            step = m @ inverse_root(m) @ R
            F = F * shrink - step * (group["lr"] / (2 * group["scaling"] * shrink))
            torch._foreach_copy_(params, (F.mT if params is As else F).unbind())

    def _momentum(self, params: list[Tensor], group: dict) -> Tensor:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
                self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=compute_dtype(p))
            self.state[p]["step"] += 1
            self.state[p]["exp_avg"].lerp_(p.grad.to(compute_dtype(p)), 1 - group["momentum"])
        return torch.stack([self.state[p]["exp_avg"] for p in params])


def inverse_root(F: Tensor) -> Tensor:
    """(F^T F)^(-1/2) (n, r, r) of tall F (n, d, r); zero where F^T F is rounding noise."""
    tall = F.double()
    w, V = torch.linalg.eigh(tall.mT @ tall)
    scale = torch.where(above_rounding(w, F.dtype), w.rsqrt(), 0.0)
    return ((V * scale.unsqueeze(-2)) @ V.mT).to(F.dtype)


def create_lora_muon_optimizer(
    model: PeftModel, *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
) -> LoRAMuon:
    """LoRA-Muon for the Linear layers of a LoRA model, AdamW for its other trainable parameters.

    Both at one rate. Which layers count as Linear, and what the others are: `lora_groups`.
    """
    groups = pair_groups(model, by_scaling=True)
    return LoRAMuon(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
