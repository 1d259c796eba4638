"""Optimizer updates of a matrix W (rows, P) whose gradient is h ⊗ g, without forming it.

W (rows, P), h (rows,), g (P,), or all with one leading dimension for members of a batch: the
matrix factorization study updates all its runs in one call.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Values in the scratch that holds a piece of the gradient: small enough to stay in the L2 cache
# together with the pieces of W and of both moments, large enough to hide the calls.
SCRATCH = 65536


def rank1_sgd_(W: Tensor, h: Tensor, g: Tensor, lr: float | Tensor):
    """W ← W - lr h ⊗ g; lr a number or (members, 1)."""
    W.addcmul_(h.unsqueeze(-1), (lr * g).unsqueeze(-2), value=-1)


def rank1_momentum_(
    W: Tensor, buffer: Tensor, h: Tensor, g: Tensor, lr: float | Tensor, momentum: float
):
    """buffer ← momentum buffer + h ⊗ g, W ← W - lr buffer (torch.optim.SGD's momentum)."""
    buffer.mul_(momentum).addcmul_(h.unsqueeze(-1), g.unsqueeze(-2))
    if isinstance(lr, Tensor):
        W.addcmul_(buffer, lr.unsqueeze(-1), value=-1)
    else:
        W.sub_(buffer, alpha=lr)


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
    torch has it. lr: a number or (members, 1).
    """
    adam = (step, betas, eps, weight_decay, maximize)
    if fused is None:
        fused = hasattr(torch, "_fused_adamw_") and W.device.type != "mps"
    piece = _fused_piece if fused else _public_piece
    if W.ndim > 2:  # members of one rate and as many as fit the scratch at a time
        rates = lr.flatten().tolist() if isinstance(lr, Tensor) else [lr] * len(W)
        for part, rate in _equal_rates(rates, max(1, SCRATCH // W[0].numel())):
            gradient = h[part].unsqueeze(-1) * g[part].unsqueeze(-2)
            piece(W[part], gradient, exp_avg[part], exp_avg_sq[part], rate, *adam)
        return
    if not W.numel():  # no unit on yet, or a rank of FSDP2 that holds nothing of this adapter
        return
    columns = min(SCRATCH, W.shape[1])
    rows = max(1, SCRATCH // columns)
    scratch = W.new_empty(min(rows, len(W)) * columns)
    for r in range(0, len(W), rows):
        for c in range(0, W.shape[1], columns):
            part = (slice(r, r + rows), slice(c, c + columns))
            gradient = scratch[: W[part].numel()].view(W[part].shape)
            torch.mul(h[r : r + rows, None], g[None, c : c + columns], out=gradient)
            piece(W[part], gradient, exp_avg[part], exp_avg_sq[part], lr, *adam)


def _equal_rates(rates: list[float], most: int) -> Iterator[tuple[slice, float]]:
    start = 0
    for i in range(1, len(rates) + 1):
        if i == len(rates) or rates[i] != rates[start] or i - start == most:
            yield slice(start, i), rates[start]
            start = i


def _fused_piece(W, gradient, exp_avg, exp_avg_sq, lr, step, betas, eps, weight_decay, maximize):
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


def _public_piece(W, gradient, exp_avg, exp_avg_sq, lr, step, betas, eps, weight_decay, maximize):
    if maximize:
        gradient.neg_()
    if weight_decay:
        W.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(gradient, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    step = float(step)
    denominator = torch.sqrt(exp_avg_sq, out=gradient).div_((1 - betas[1] ** step) ** 0.5).add_(eps)
    W.addcdiv_(exp_avg, denominator, value=-lr / (1 - betas[0] ** step))
