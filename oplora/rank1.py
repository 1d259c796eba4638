"""Optimizer updates of a matrix W (rows, P) whose gradient is h ⊗ g, without forming it.

All take any leading batch dimensions: W (…, rows, P), h (…, rows), g (…, P); the matrix
factorization study updates all its runs in one call.
"""

import torch
from torch import Tensor

# Values in the scratch that holds a piece of the gradient: small enough to stay in the L2 cache
# together with the pieces of W and of both moments, large enough to hide the calls.
SCRATCH = 32768


def rank1_sgd_(W: Tensor, h: Tensor, g: Tensor, lr: float | Tensor):
    """W ← W - lr h ⊗ g; lr a number or (…, 1)."""
    W.addcmul_(h.unsqueeze(-1), (lr * g).unsqueeze(-2), value=-1)


def rank1_momentum_(
    W: Tensor, buffer: Tensor, h: Tensor, g: Tensor, lr: float | Tensor, momentum: float
):
    """buffer ← momentum buffer + h ⊗ g, W ← W - lr buffer (torch.optim.SGD's momentum)."""
    buffer.mul_(momentum).addcmul_(h.unsqueeze(-1), g.unsqueeze(-2))
    rate = lr.unsqueeze(-1) if isinstance(lr, Tensor) else lr
    W.sub_(rate * buffer)


def rank1_adamw_(
    W: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    h: Tensor,
    g: Tensor,
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
    fused: bool | None = None,
):
    """AdamW (torch.optim.AdamW's order of operations) on W with the gradient h ⊗ g.

    step counts this update too. fused: use torch's fused kernel (bit-identical to
    `AdamW(fused=True)` on the whole gradient if P is a multiple of 16: the kernel rounds the
    last values of an odd length differently) or public operations; None takes the kernel where
    torch has it and lr is one number.
    """
    if fused is None:
        fused = W.ndim == 2 and hasattr(torch, "_fused_adamw_") and W.device.type != "mps"
    columns = min(SCRATCH, W.shape[-1])
    rows = max(1, SCRATCH // columns)
    piece = _fused_piece if fused else _public_piece
    scratch = W.new_empty(0)
    for r in range(0, W.shape[-2], rows):
        for c in range(0, W.shape[-1], columns):
            part = (..., slice(r, r + rows), slice(c, c + columns))
            size = W[part].numel()
            if scratch.numel() < size:
                scratch = W.new_empty(size)
            gradient = scratch[:size].view(W[part].shape)
            torch.mul(
                h[..., r : r + rows].unsqueeze(-1),
                g[..., c : c + columns].unsqueeze(-2),
                out=gradient,
            )
            tensors = [W[part], gradient, exp_avg[part], exp_avg_sq[part]]
            piece(*tensors, step, lr, betas, eps, weight_decay, maximize)


def _fused_piece(W, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay, maximize):
    torch._fused_adamw_(
        [W],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=maximize,
    )


def _public_piece(W, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay, maximize):
    if maximize:
        gradient.neg_()
    rate = lr.unsqueeze(-1) if isinstance(lr, Tensor) and lr.ndim else lr
    if weight_decay:
        W.mul_(1 - rate * weight_decay)
    exp_avg.lerp_(gradient, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    step = float(step)
    denominator = torch.sqrt(exp_avg_sq, out=gradient).div_((1 - betas[1] ** step) ** 0.5).add_(eps)
    W.sub_(exp_avg / denominator * (rate / (1 - betas[0] ** step)))
