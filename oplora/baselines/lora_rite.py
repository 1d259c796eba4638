"""LoRA-RITE: an adaptive step on A and B that depends on their product alone.

Yen, Si, Meng, Yu, Duvvuri, Dhillon, Hsieh, Kumar 2025, arXiv 2410.20625, algorithm 1. A -> T A,
B -> B T^-1 leaves B A as it is; under Adam it changes the next step, under LoRA-RITE it does not.
Both factors are treated alike, as tall matrices F = B (d_out, r) or A^T (d_in, r), each seen
from the other one's orthonormal basis.
"""

from collections.abc import Iterable

import torch
from peft import PeftModel
from torch import Tensor

from oplora.baselines.pairs import (
    PairOptimizer,
    above_rounding,
    compute_dtype,
    pair_groups,
    stack,
)


class LoRARITE(PairOptimizer):
    """LoRA-RITE (arXiv 2410.20625, algorithm 1).

    For a factor F (d, r) and the other factor H = U R (U orthonormal), at every step:
        g   = (dL/dF) R^-1                            unmagnified gradient
        P   = U^T U_old                               from the old basis to the new one
        V   = P V_old P^T,  rho = rho_old + max_i (lambda_i(V_old) - lambda_i(V))
        V  <- beta2 V + (1 - beta2) g^T g / d,  rho <- beta2 rho
        M   = beta1 M_old P^T + (1 - beta1) g ((V + rho I)^1/2 + eps I)^-1
        F  <- F - lr (M R^-T + weight_decay F)
    with Adam's bias correction put into beta1 and beta2 (both are 0 at the first step). The
    average in place of the paper's sum of g^T g, the correction, 1/d and eps are those of the
    released code.
    rho, the escaped mass, is always on; the code has it off by default. Left out: the code's
    clipping (global norm 1) and skipping (RMS above 1) of unmagnified gradients.
    R: any with R^T R = H^T H gives the same steps. The paper takes QR; here U and R come from the
    eigenvectors of H^T H, because these batch on every device and tall QR does not. Directions
    with a singular value of H below sqrt(r precision) of the largest (1e-3 in fp32) get no step,
    so at B = 0 only B moves. The code's pseudo-inverse of R cuts at r precision; between the two,
    g is amplified rounding, and 1 / sigma blew up fp32 runs on gradients of rank below r.
    The scaling s enters through the gradients alone.
    Other groups, missing and non-finite gradients: `PairOptimizer`.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _update(self, group: dict, As: list[Tensor], Bs: list[Tensor]):
        t = self._steps(As[0]) + 1
        beta1, beta2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in group["betas"])
        lr, shrink = group["lr"], 1 - group["lr"] * group["weight_decay"]
        for A, B in zip(As, Bs, strict=True):
            if not self.state[A]:
                self.state[A].update(_pair_state(A), **_factor_state(A.mT))
                self.state[B].update(_factor_state(B))
            self.state[A]["step"] += 1
        A, B = stack(As).mT, stack(Bs)
        (UA, inverse_A), (UB, inverse_B) = orthonormal_basis(A), orthonormal_basis(B)
        # each factor is seen from the other's basis
        g = (
            stack([p.grad for p in As]).mT @ inverse_B,
            stack([p.grad for p in Bs]) @ inverse_A,
        )
        P = torch.stack([UB.mT @ self._stacked(Bs, "basis"), UA.mT @ self._stacked(As, "basis")], 1)
        root = self._second_moment(As, g, P, beta2, group["eps"])
        parts = ((As, A, UA, inverse_B), (Bs, B, UB, inverse_A))
        for i, (params, F, U, inverse) in enumerate(parts):
            M = self._stacked(params, "exp_avg") @ P[:, i].mT
            M.baddbmm_(g[i], root[:, i], beta=beta1, alpha=1 - beta1)
            F = torch.baddbmm(F, M, inverse.mT, beta=shrink, alpha=-lr)
            self._store(params, exp_avg=M, basis=U)
            torch._foreach_copy_(params, (F.mT if params is As else F).unbind())

    def _second_moment(self, As, g: tuple[Tensor, Tensor], P: Tensor, beta2: float, eps: float):
        """Carry V and rho of both factors on; ((V + rho I)^1/2 + eps I)^-1 (n, 2, r, r)."""
        new = torch.stack([x.mT @ x / x.shape[1] for x in g], 1).double()
        P = P.double()
        V = P @ self._stacked(As, "second_moment") @ P.mT
        V = (V + V.mT) / 2
        # P is a contraction: the i-th eigenvalue never grows, but for rounding
        lost = (self._stacked(As, "eigenvalues") - torch.linalg.eigvalsh(V)).amax(-1).clamp(min=0)
        rho = beta2 * (self._stacked(As, "escaped") + lost)
        V = V.lerp(new, 1 - beta2)
        w, Q = torch.linalg.eigh(V)
        self._store(As, second_moment=V, eigenvalues=w, escaped=rho)
        scale = 1 / ((w.clamp(min=0) + rho.unsqueeze(-1)).sqrt() + eps)
        return ((Q * scale.unsqueeze(-2)) @ Q.mT).to(g[0].dtype)

    def _stacked(self, params: list[Tensor], name: str) -> Tensor:
        return torch.stack([self.state[p][name] for p in params])

    def _store(self, params: list[Tensor], **new: Tensor):
        for name, tensor in new.items():
            torch._foreach_copy_([self.state[p][name] for p in params], tensor.unbind())


def orthonormal_basis(H: Tensor) -> tuple[Tensor, Tensor]:
    """U (n, d, r) orthonormal and R^-1 (n, r, r) with H = U R, for tall H (n, d, r).

    R = diag(sigma) V^T from the singular values of H. Where sigma is near zero
    (`above_rounding`), the column of U and that of R^-1 are zero.
    """
    # float64: H^T H has the squared condition number of H
    tall = H.double()
    w, V = torch.linalg.eigh(tall.mT @ tall)
    inverse = V * torch.where(above_rounding(w, H.dtype), w.rsqrt(), 0.0).unsqueeze(-2)
    return (tall @ inverse).to(H.dtype), inverse.to(H.dtype)


def _factor_state(F: Tensor) -> dict[str, Tensor]:
    """M, and the basis of the last step, both of the tall factor's shape (d, r)."""
    zeros = torch.zeros(F.shape, dtype=compute_dtype(F), device=F.device)
    return {"exp_avg": zeros, "basis": zeros.clone()}


def _pair_state(A: Tensor) -> dict[str, Tensor]:
    """V, its eigenvalues and rho, for A and B in this order; float64, as V is squared."""
    r = len(A)
    shapes = {"second_moment": (2, r, r), "eigenvalues": (2, r), "escaped": (2,)}
    zeros = {n: torch.zeros(s, dtype=torch.float64, device=A.device) for n, s in shapes.items()}
    return {"step": torch.zeros((), dtype=torch.float32), **zeros}


def create_lora_rite_optimizer(
    model: PeftModel,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> LoRARITE:
    """LoRA-RITE for the Linear layers of a LoRA model, AdamW for its other trainable parameters.

    Which layers count as Linear, and what the others are: `lora_groups`. AdamW's eps is 1e-8.
    """
    groups = pair_groups(model, by_scaling=False, eps=1e-8)
    return LoRARITE(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
