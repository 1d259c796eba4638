"""ScaledAdamW's projection of LoRA's gradients, and OP-LoRA behind it (the paper's second text).

Zhang, Pilanci 2024, arXiv 2402.02347: gA becomes (B^T B + reg I)^-1 gA, and gB becomes
gB (A A^T + reg I)^-1; Adam's moments are those of the projected gradients. PEFT's
`create_riemannian_optimizer` is that; its authors' code differs from it in the order (B's
projection there sees the A that this step has made), in no bias correction and eps 1e-6, and in
reg: 1e-6, and up to 4.5 by task.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oplora.baselines.pairs import compute_dtype, lora_groups
from oplora.optimizer import OPOptimizer
from oplora.peft import create_oplora_optimizer


def scaled_gradients(
    A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, reg: float
) -> tuple[Tensor, Tensor]:
    """((B^T B + reg I)^-1 gA, gB (A A^T + reg I)^-1), in at least fp32."""
    A, B, gA, gB = (t.to(compute_dtype(t)) for t in (A, B, gA, gB))
    damping = reg * torch.eye(len(A), dtype=A.dtype, device=A.device)
    dA = torch.linalg.solve(B.T @ B + damping, gA)
    return dA, torch.linalg.solve(A @ A.T + damping, gB.T).T


def create_op_scaled_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    reg: float = 1e-2,
    **options: Any,
) -> OPOptimizer:
    """OP-ScaledAdamW: the gradients of A and B are projected in front of the MLPs' pullback.

    options: `oplora.create_oplora_optimizer`. What is clipped by the trainer is the gradient
    before the projection. Which layers are projected: `lora_groups`; others are as in OP-LoRA.
    ValueError: no LoRA on a Linear layer, or a sharded one (FSDP).
    """
    groups, _ = lora_groups(model)
    params = [p for named in groups.values() for _, p in named]
    if any(hasattr(p, "full_tensor") for p in params):
        raise ValueError("the projection needs whole A and B, these are sharded (FSDP): use DDP")
    optimizer = create_oplora_optimizer(model, optimizer_cls, lr=lr, **options)

    @torch.no_grad()
    def project(optimizer, args, kwargs):
        for A, B in zip(params[::2], params[1::2], strict=True):
            if A.grad is not None and B.grad is not None:
                dA, dB = scaled_gradients(A, B, A.grad, B.grad, reg)
                A.grad.copy_(dA)
                B.grad.copy_(dB)

    optimizer.register_step_pre_hook(project)
    return optimizer
