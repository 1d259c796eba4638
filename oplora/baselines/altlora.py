"""AltLoRA: ScaledAdamW's projection, A before B, with a momentum that follows the other factor."""

from collections.abc import Iterable

import torch
from peft import PeftModel
from torch import Tensor

from oplora.baselines.pairs import PairOptimizer, pair_groups, stack


class AltLoRA(PairOptimizer):
    """As its authors' released code (algorithm 1, `altlora`), which moves A, then B, in each step:

        m_A <- b P m_A + (1 - b) (B^T B + reg I)^-1 gA,  P = (B^T B + reg I)^-1 B^T B_old

    and alike for B with the new A; A <- (1 - lr weight_decay) (A - lr m_A / (1 - b^t)). Both
    gradients are those before the step; b is betas[0]. There are no second moments; reg is the
    code's. The step is not adaptive: its rates are not Adam's. Groups with pairs=False: AdamW.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        reg: float = 1e-3,
    ):
        adam = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, **adam, reg=reg)

    def _update(self, group: dict, As: list[Tensor], Bs: list[Tensor]):
        A, B = stack(As).mT, stack(Bs)
        gA, gB = stack([p.grad for p in As]).mT, stack([p.grad for p in Bs])
        A = self._move(group, As, A, gA, B)
        torch._foreach_copy_(As, A.mT.unbind())
        torch._foreach_copy_(Bs, self._move(group, Bs, B, gB, A).unbind())

    def _move(self, group: dict, params: list[Tensor], F: Tensor, g: Tensor, other: Tensor):
        """The tall factor F (n, d, r) after the step, as seen from the other tall factor."""
        for i, p in enumerate(params):
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
                self.state[p] |= {"exp_avg": torch.zeros_like(F[i]), "other": other[i] * 0}
            self.state[p]["step"] += 1
        beta, lr = group["betas"][0], group["lr"]
        m, old = (torch.stack([self.state[p][k] for p in params]) for k in ("exp_avg", "other"))
        gram = other.mT @ other
        gram += group["reg"] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        both = beta * (m @ (old.mT @ other)) + (1 - beta) * g
        m = torch.linalg.solve(gram, both.mT).mT
        for i, p in enumerate(params):
            self.state[p]["exp_avg"].copy_(m[i])
            self.state[p]["other"].copy_(other[i])
        step = lr / (1 - beta ** int(self.state[params[0]]["step"]))
        return (F - step * m) * (1 - lr * group["weight_decay"])


def create_altlora_optimizer(
    model: PeftModel, *, lr: float, weight_decay: float = 0.0, reg: float = 1e-3
) -> AltLoRA:
    """AltLoRA for the Linear layers of a LoRA model, AdamW for its other trainable parameters."""
    groups = pair_groups(model, by_scaling=False)
    return AltLoRA(groups, lr=lr, weight_decay=weight_decay, reg=reg)
