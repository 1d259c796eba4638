"""Optimizer updates of a matrix W (rows, P) whose gradient is h ⊗ g, without forming it.

W (rows, P), h (rows,), g (P,), or all with one leading dimension for members of a batch: the
matrix factorization study updates all its runs in one call.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Values in the scratch that holds pieces of the gradient. On a CPU small enough to stay in the
# cache, large enough to hide the calls; elsewhere what keeps the device busy.
SCRATCH = 2**20
SCRATCH_OTHERWISE = 2**24


def _scratch_values(W: Tensor) -> int:
    return SCRATCH if W.device.type == "cpu" else SCRATCH_OTHERWISE


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
    **adam: Any,
):
    """AdamW (torch.optim.AdamW's order of operations) on W with the gradient h ⊗ g.

    lr: a number or (members, 1). step, adam: `foreach_rank1_adamw_`.
    """
    if W.ndim == 2:
        foreach_rank1_adamw_([W], [exp_avg], [exp_avg_sq], [h], [g], [step], lr=lr, **adam)
        return
    # members of one rate and as many as fit the scratch at a time
    most = max(1, _scratch_values(W) // W[0].numel())
    rates = lr.flatten().tolist() if isinstance(lr, Tensor) else [lr] * len(W)
    for part, rate in _equal_rates(rates, most):
        gradient = h[part].unsqueeze(-1) * g[part].unsqueeze(-2)
        piece = ([W[part]], [gradient], [exp_avg[part]], [exp_avg_sq[part]], [step])
        adamw_(*piece, lr=rate, **adam)


def foreach_rank1_adamw_(
    Ws: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    hs: Sequence[Tensor],
    gs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    updated: Callable[[int], None] | None = None,
    **adam: Any,
):
    """`rank1_adamw_` on many matrices of one device and dtype, as many a call as fit the scratch.

    steps count this update too. updated(k) is called when matrix k is through and may still be
    in the cache. adam: betas, eps, weight_decay, maximize and `fused`: use torch's
    fused kernel (bit-identical to `AdamW(fused=True)` on the whole gradient if P is a multiple
    of 16: the kernel rounds the last values of an odd length differently) or public operations;
    None takes the kernel where torch has it.
    """
    if not Ws:
        return
    scratch = Ws[0].new_empty(min(_scratch_values(Ws[0]), sum(W.numel() for W in Ws)))
    matrices = list(zip(Ws, exp_avgs, exp_avg_sqs, hs, gs, steps, strict=True))
    for batch, complete in _batches(matrices, len(scratch)):
        gradients, used = [], 0
        for *_, h, g, _ in batch:
            gradient = scratch[used : used + len(h) * len(g)].view(len(h), -1)
            gradients.append(torch.outer(h, g, out=gradient))
            used += gradient.numel()
        if batch:
            W, exp_avg, exp_avg_sq, _, _, step = map(list, zip(*batch, strict=True))
            adamw_(W, gradients, exp_avg, exp_avg_sq, step, lr=lr, **adam)
        if updated:
            for k in complete:
                updated(k)


def _batches(
    matrices: list[tuple[Tensor, ...]], most: int
) -> Iterator[tuple[list[tuple[Tensor, ...]], list[int]]]:
    """Pieces of (W, exp_avg, exp_avg_sq, h, g, step), `most` values at a time.

    With each batch the numbers of the matrices of which it is the last.
    """
    batch, complete, free = [], [], most
    for number, matrix in enumerate(matrices):
        for piece in _pieces(*matrix, most):
            size = piece[0].numel()
            if size > free:
                yield batch, complete
                batch, complete, free = [], [], most
            batch.append(piece)
            free -= size
        complete.append(number)
    if complete:
        yield batch, complete


def _pieces(W, exp_avg, exp_avg_sq, h, g, step, most: int) -> Iterator[tuple[Tensor, ...]]:
    """One matrix whole, or if it is too large, contiguous pieces of `most` values."""
    if W.numel() <= most:
        if W.numel():  # else no unit is on yet, or a rank of FSDP2 holds nothing of this adapter
            yield W, exp_avg, exp_avg_sq, h, g, step
        return
    columns = min(most, W.shape[1])
    rows = most // columns
    for r in range(0, len(W), rows):
        for c in range(0, W.shape[1], columns):
            part = (slice(r, r + rows), slice(c, c + columns))
            tensors = (tensor[part] for tensor in (W, exp_avg, exp_avg_sq))
            yield *tensors, h[part[0]], g[part[1]], step


def _equal_rates(rates: list[float], most: int) -> Iterator[tuple[slice, float]]:
    start = 0
    for i in range(1, len(rates) + 1):
        if i == len(rates) or rates[i] != rates[start] or i - start == most:
            yield slice(start, i), rates[start]
            start = i


def adamw_(
    Ws: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
    fused: bool | None = None,
):
    """AdamW on contiguous tensors; arguments as of `foreach_rank1_adamw_`."""
    if fused is None:
        fused = hasattr(torch, "_fused_adamw_") and Ws[0].device.type != "mps"
    if fused:
        torch._fused_adamw_(
            Ws,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=maximize,
        )
        return
    for W, g, exp_avg, exp_avg_sq, step in zip(
        Ws, gradients, exp_avgs, exp_avg_sqs, map(float, steps), strict=True
    ):
        if maximize:
            g = -g
        if weight_decay:
            W.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(g, 1 - betas[0])
        exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        denominator = exp_avg_sq.sqrt().div_((1 - betas[1] ** step) ** 0.5).add_(eps)
        W.addcdiv_(exp_avg, denominator, value=-lr / (1 - betas[0] ** step))
