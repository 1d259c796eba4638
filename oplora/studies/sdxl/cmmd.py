"""MMD between two sets of image embeddings; with CLIP's it is CMMD (Table 1, arXiv 2401.09603).

    scale · (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),  k(a, b) = exp(-‖a - b‖² / 2σ²)

Biased, as in the official code: the means contain the diagonals. So two sets from one distribution
have an expected value above zero, the floor, that falls as 1/n.
"""

import torch
from torch import Tensor


def mmd(x: Tensor, y: Tensor, *, sigma=10.0, scale=1000.0, block: int = 1024) -> float:
    """MMD of the rows of x (n, d) and y (m, d), which are L2-normalised here.

    In float64, by blocks of the kernel: memory grows with n·d, never with n². A single row is
    allowed. ValueError names a row that is zero or not finite.
    """
    x, y = _unit_rows(x, y)
    return scale * _squared_mmd(x, y, _equal(x), _equal(y), sigma, block).item()


def mmd_interval(
    x: Tensor,
    y: Tensor,
    draws: int = 1000,
    seed: int = 0,
    *,
    sigma=10.0,
    scale=1000.0,
    block: int = 1024,
) -> tuple[float, float]:
    """95% bootstrap interval over images for what `mmd` is expected to give at these n and m.

    Each resample adds about one more floor, so the draws as they are lie too high. They are
    therefore moved until their mean is the value itself; then their percentiles are taken, cut
    off at zero. x and y are resampled independently: rather too wide than too narrow where they
    are pairs that resemble each other, and near the floor. All draws come from one pass over the
    kernel, with multiplicities (draws, n) as weights.
    """
    x, y = _unit_rows(x, y)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{len(x)} and {len(y)} images: an interval needs at least 2 of each")
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.cat([_equal(rows), _resampled(len(rows), draws, generator)]) for rows in (x, y)
    ]
    values = scale * _squared_mmd(x, y, *weights, sigma, block)
    value, drawn = values[0], values[1:]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (drawn - drawn.mean() + value).clamp(min=0).quantile(ends).tolist()
    return low, high


def _squared_mmd(x, y, weights_x, weights_y, sigma: float, block: int) -> Tensor:
    """MMD² (draws,) of unit rows with weights (draws, n) and (draws, m) that sum to one."""
    within_x = _mean_kernel(x, x, weights_x, weights_x, sigma, block)
    within_y = _mean_kernel(y, y, weights_y, weights_y, sigma, block)
    across = _mean_kernel(x, y, weights_x, weights_y, sigma, block)
    return (within_x + within_y - 2 * across).clamp(min=0)  # rounding alone can make it negative


def _mean_kernel(x, y, weights_x, weights_y, sigma: float, block: int) -> Tensor:
    """Weighted mean of k - 1 over all pairs (draws,).

    The ones cancel in the MMD; without them none of the digits is spent on them.
    """
    total = x.new_zeros(len(weights_x))
    for i in range(0, len(x), block):
        rows = slice(i, i + block)
        for j in range(0, len(y), block):
            columns = slice(j, j + block)
            # ‖a - b‖² = 2 - 2 a·b for unit vectors
            kernel = torch.expm1((x[rows] @ y[columns].T - 1) / sigma**2)
            total += ((weights_x[:, rows] @ kernel) * weights_y[:, columns]).sum(1)
    return total


def _equal(rows: Tensor) -> Tensor:
    return rows.new_full((1, len(rows)), 1 / len(rows))


def _resampled(n: int, draws: int, generator: torch.Generator) -> Tensor:
    """How often each of n images is drawn in n draws with replacement, as shares (draws, n)."""
    chosen = torch.randint(n, (draws, n), generator=generator)
    shares = torch.zeros(draws, n, dtype=torch.float64)
    return shares.scatter_add_(1, chosen, torch.full_like(shares, 1 / n))


def _unit_rows(x: Tensor, y: Tensor) -> list[Tensor]:
    """Both sets in float64 with rows of length one; ValueError where that is impossible."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"embeddings of shapes {tuple(x.shape)} and {tuple(y.shape)}: give (n, d) and (m, d)"
            " from the same encoder"
        )
    unit = []
    for name, rows in (("first", x), ("second", y)):
        if not len(rows):
            raise ValueError(f"the {name} set is empty: give at least one embedding")
        rows = rows.detach().to("cpu", torch.float64)
        lengths = rows.norm(dim=1, keepdim=True)
        # A length is NaN or infinite exactly if an entry of the row is.
        bad = ~(lengths.isfinite() & (lengths > 0)).squeeze(1)
        if bad.any():
            row = bad.nonzero()[0].item()
            raise ValueError(
                f"row {row} of the {name} set is zero, NaN or infinite: no embedding to compare"
            )
        unit.append(rows / lengths)
    return unit
