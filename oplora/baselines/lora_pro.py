"""LoRA-Pro: gradients of A and B whose joint effect is closest to the full gradient.

Wang, Liang, He, Wang, Tan 2025, arXiv 2407.18242. With W = W0 + s B A, a step along (dA, dB)
moves W along s (B dA + dB A), the "equivalent gradient". LoRA-Pro takes the (dA, dB) for which
that is closest to dL/dW in the Frobenius norm, computed from dL/dA and dL/dB alone.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from oplora.baselines.pairs import PairOptimizer, above_rounding, pair_groups, stack

# Values of the equivalent gradient held at once: on a CPU a piece that stays in the L2 cache,
# elsewhere few launches.
SCRATCH_VALUES = {"cpu": 2**17}
SCRATCH_VALUES_OTHERWISE = 2**26


class LoRAPro(PairOptimizer):
    """LoRA-Pro with AdamW (arXiv 2407.18242).

    moments: "equivalent" is the paper's algorithm and its released code: Adam's moments are those
        of the equivalent gradient, (d_out, d_in) each, as large as for full fine-tuning (8 bytes
        per value of W in fp32; the code keeps them in bf16). Adam's direction, a full matrix, is
        then projected onto A and B once more. "factor" is the "efficient" mode of earlier
        released code: AdamW on (dA, dB), with moments of the factors' shapes.
    scaling: s of W = W0 + s B A; a group with another s gives its own.
    delta: added to the diagonals of B^T B and A A^T where they are inverted (1e-8 in the code).
        With B = 0 it leaves dA = 0, so the first step moves B alone, as in the paper. An adapter
        that starts elsewhere (PiSSA, LoRA-GA) gets the whole formula at once, where the code
        takes dL/dA unchanged for one step.
    weight_decay: with "equivalent", A and B shrink by sqrt(1 - lr weight_decay) each, so that B A
        shrinks as under AdamW on W (earlier released code; it shrinks the frozen W0 too, here W0
        stays); with "factor", A and B shrink by 1 - lr weight_decay each.
    Other groups, missing and non-finite gradients: `PairOptimizer`.
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
        delta: float = 1e-8,
        moments: str = "equivalent",
    ):
        adam = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, **adam, scaling=scaling, delta=delta, moments=moments)

    def _update(self, group: dict, As: list[Tensor], Bs: list[Tensor]):
        s = group["scaling"]
        A, B = stack(As), stack(Bs)
        gA, gB = stack([p.grad for p in As]), stack([p.grad for p in Bs])
        grams = gram_spectra(A, B, group["delta"])
        dA, dB = closest(A, B, gA, gB, grams)
        if group["moments"] == "factor":
            dA, dB = (d.div_(s**2) for d in balance(A, B, dA, dB, grams))
            self._adamw(group, As + Bs, [*dA.unbind(), *dB.unbind()])
            return
        # 1/s^2 of the formula times s of the equivalent gradient s (B dA + dB A)
        dA, dB = dA.div_(s), dB.div_(s)
        for i, param in enumerate(As):
            self._adam_direction(self.state[param], group, A[i], B[i], dA[i], dB[i], gA[i], gB[i])
        dA, dB = balance(A, B, *closest(A, B, gA, gB, grams), grams)
        shrink = math.sqrt(max(0.0, 1 - group["lr"] * group["weight_decay"]))
        for params, old, change in ((As, A, dA), (Bs, B, dB)):
            new = old.mul_(shrink).sub_(change, alpha=group["lr"] / s)
            torch._foreach_copy_(params, new.unbind())

    def _adam_direction(self, state: dict, group: dict, A, B, dA, dB, UA, UB):
        """Adam's direction U for the gradient G = B dA + dB A: writes B^T U to UA, U A^T to UB.

        One pair, with the state of its A. G and U, (d_out, d_in), exist a few rows at a time.
        """
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = A.new_zeros(len(B), A.shape[1])
        state["step"] += 1
        (beta1, beta2), t = group["betas"], int(state["step"])
        size = max(1, SCRATCH_VALUES.get(A.device.type, SCRATCH_VALUES_OTHERWISE) // A.shape[1])
        UA.zero_()
        for first in range(0, len(B), size):
            rows = slice(first, first + size)
            m, v = state["exp_avg"][rows], state["exp_avg_sq"][rows]
            G = torch.mm(B[rows], dA).addmm_(dB[rows], A)
            m.lerp_(G, 1 - beta1)
            v.mul_(beta2).addcmul_(G, G, value=1 - beta2)
            denominator = torch.sqrt(v, out=G).div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
            U = torch.div(m, denominator, out=G).div_(1 - beta1**t)
            UA.addmm_(B[rows].T, U)
            torch.mm(U, A.T, out=UB[rows])


class Spectrum(NamedTuple):
    """Of n matrices V diag(w) V^T: V (n, r, r), w (n, r, 1) and 1 / (w + delta) (n, r, 1)."""

    V: Tensor
    w: Tensor
    inverse: Tensor

    def solve(self, M: Tensor) -> Tensor:
        """(V diag(w) V^T + delta I)^-1 M for M (n, r, k)."""
        # error here: about cond(B) eps; with the inverse formed first: cond(B)^2 eps
        return self.V @ (self.V.mT @ M).mul_(self.inverse)


def gram_spectra(A: Tensor, B: Tensor, delta: float) -> tuple[Spectrum, Spectrum]:
    """Spectra of A A^T and B^T B, for A (n, r, d_in) and B (n, d_out, r).

    The inverse is zero for eigenvalues not `above_rounding`, as in the code's pseudo-inverse.
    """
    # float64: squaring the factors squares their condition number, and r x r costs nothing
    A64, B64 = A.double(), B.double()
    w, V = torch.linalg.eigh(torch.cat([A64 @ A64.mT, B64.mT @ B64]))
    inverse = torch.where(above_rounding(w, A.dtype), 1 / (w + delta), 0.0)
    parts = (V, w.clamp(min=0).unsqueeze(-1), inverse.unsqueeze(-1))
    of_A, of_B = zip(*(x.to(A.dtype).chunk(2) for x in parts), strict=True)
    return Spectrum(*of_A), Spectrum(*of_B)


def closest(A, B, gA, gB, grams: tuple[Spectrum, Spectrum]) -> tuple[Tensor, Tensor]:
    """(dA, dB) of LoRA-Pro's theorem with X = 0 and s = 1: B dA + dB A is closest to dL/d(BA).

    dA = (B^T B)^-1 gA,  dB = (I - B (B^T B)^-1 B^T) gB (A A^T)^-1; all stacked, leading n.
    """
    AAt, BtB = grams
    dA = BtB.solve(gA)
    rest = gB - B @ BtB.solve(B.mT @ gB)
    return dA, AAt.solve(rest.mT).mT


def balance(A, B, dA, dB, grams: tuple[Spectrum, Spectrum]) -> tuple[Tensor, Tensor]:
    """(dA + X A, dB - B X) nearest to the original gradients; B dA + dB A does not change.

    X solves B^T B X + X A A^T = -dA A^T, the paper's Sylvester equation: diagonal in the
    eigenbases of the two Gram matrices.
    """
    AAt, BtB = grams
    # a sum of eigenvalues is zero only where both factors, and with them the right side, vanish
    sums = (BtB.w + AAt.w.mT).clamp(min=torch.finfo(A.dtype).tiny)  # (n, r, r)
    X = -BtB.V @ ((BtB.V.mT @ (dA @ A.mT) @ AAt.V) / sums) @ AAt.V.mT
    return torch.baddbmm(dA, X, A), torch.baddbmm(dB, B, X, alpha=-1)


def create_lora_pro_optimizer(
    model: PeftModel,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 1e-8,
    moments: str = "equivalent",
) -> LoRAPro:
    """LoRA-Pro for the Linear layers of a LoRA model, AdamW for its other trainable parameters.

    s is read from every layer (alpha_pattern, rank_pattern and rsLoRA differ in it). Which layers
    count as Linear, and what the others are: `lora_groups`.
    """
    groups = pair_groups(model, by_scaling=True)
    adam = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    return LoRAPro(groups, **adam, delta=delta, moments=moments)
