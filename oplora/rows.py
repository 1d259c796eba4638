"""W2 of N MLPs, in two forms with one interface: `ActiveRows` is exact, `SharedRow` approximate.

W2[i] (rows, P) is block i's, a hidden unit owns a row. Since z is a single input, a unit that is
off (h_j = 0) contributes nothing and gets no gradient, and about half of the units never are on.

Both forms: `grow(h)` before anything that uses a new h; `weights(h)` and `predict` give W2ᵀ h,
`factors(h)` is u in dL/dW2 = u ⊗ g, `backward` is dL/dh = W2 g; `decay` is weight decay of what
no gradient reaches; `state`, `shapes` and `load` are for checkpoints.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class ActiveRows:
    """W2 itself. Only rows of units that were ever on are kept; `every`: all rows.

    The others are as they were drawn but for weight decay, which is one factor a block, `shrink`:
    they are drawn again by draw(i) (width, P) when they are needed, and not saved.
    """

    def __init__(
        self, width: int, draw: Callable[[int], Tensor], sizes: Sequence[int], like: Tensor,
        *, every: bool,
    ):  # fmt: skip
        self.width, self.draw, self.sizes, self.every = width, draw, sizes, every
        count = len(sizes)
        self.unit_of_row = torch.arange(width, device=like.device).repeat(count, 1)
        self.active = [width if every else 0] * count  # rows of W2 that are kept
        self.W2 = [draw(i) if every else like.new_empty(0, sizes[i]) for i in range(count)]
        self.shrink = torch.ones(count, dtype=torch.float64)

    def grow(self, h: Tensor):
        """Append the rows of units that are on for the first time in h (blocks, width)."""
        if min(self.active) == self.width:
            return
        place = torch.arange(self.width, device=h.device)
        active = torch.tensor(self.active, device=h.device)
        new = (h.gather(1, self.unit_of_row) > 0) & (place >= active[:, None])
        for i in new.any(1).nonzero().flatten().tolist():
            rest, first = self.inactive(i), self.active[i]
            for row in new[i].nonzero().flatten().tolist():
                pair, swapped = [self.active[i], row], [row, self.active[i]]
                self.unit_of_row[i, pair] = self.unit_of_row[i, swapped]
                rest[[k - first for k in pair]] = rest[[k - first for k in swapped]]
                self.active[i] += 1
            count = self.active[i] - first
            self.W2[i].resize_(self.active[i], self.sizes[i])[first:] = rest[:count]

    def weights(self, h: Tensor) -> list[Tensor]:
        ordered = h.gather(1, self.unit_of_row)
        return [row[:n] for row, n in zip(ordered, self.active, strict=True)]

    factors = weights

    def predict(self, i: int, weights: Tensor, out: Tensor):
        """out (P,) = W2ᵀ h of block i."""
        torch.mv(self.W2[i].T, weights, out=out)

    def backward(self, gs: Sequence[Tensor]) -> Tensor:
        """dL/dh (blocks, width) of this rank from dL/dtheta of every block."""
        dh = gs[0].new_zeros(len(gs), self.width)
        for i, g in enumerate(gs):
            torch.mv(self.W2[i], g, out=dh[i, : self.active[i]])
        return torch.zeros_like(dh).scatter_(1, self.unit_of_row, dh)

    def decay(self, members: Sequence[int], factor: float):
        self.shrink[members] *= factor

    def inactive(self, i: int) -> Tensor:
        """Rows of block i's W2 whose units never were on, in the order of `unit_of_row`."""
        return self.draw(i)[self.unit_of_row[i, self.active[i] :]] * self.shrink[i].item()

    def in_memory(self) -> list[Tensor]:
        return self.W2

    def trained(self, P: int) -> int:
        """Values that are trained for P predicted ones."""
        return self.width * P

    def state(self, i: int) -> dict[str, Tensor]:
        """The rows of W2 that are kept, and the unit of each and of the others."""
        return {"W2": self.W2[i], "order": self.unit_of_row[i], "shrink": self.shrink[i]}

    def shapes(self, i: int, active: int) -> dict[str, tuple[int, ...]]:
        return {"W2": (active, self.sizes[i]), "order": (self.width,), "shrink": ()}

    def load(self, i: int, state: dict[str, Tensor], active: int):
        self.unit_of_row[i].copy_(state["order"])
        self.shrink[i].copy_(state["shrink"])
        self.active[i] = active
        self.W2[i].resize_(active, self.sizes[i]).copy_(state["W2"])


class SharedRow:
    """W2_0 and one change S (1, P) that all rows of units that are on share; W2[i] is S.

    Under Adam every such row j has the gradient h_j g, and Adam's step does not depend on the
    scale of a gradient. As long as the h_j keep their proportions, these rows therefore move by
    the same S, and

        theta = W2_0ᵀ h + |h|_1 S + b2

    needs the first rows, which never change, and S with its two moments in place of (width, P)
    matrices. S's gradient is g times the mean of the h_j above zero, so that its moments remember
    how large h was. Not exact: rows whose h_j move differently, and units that turn on later,
    which share S from their first step on. Of W2_0 the rows of units that were ever on are kept,
    of the columns that do not start at zero; later ones are drawn again by draw(i) (width, P).

    columns: for every block the slices of P whose rows do not start at zero.
    """

    every = True  # moments are of S, which is whole

    def __init__(
        self, width: int, draw: Callable[[int], Tensor], sizes: Sequence[int], like: Tensor,
        *, columns: Sequence[list[slice]],
    ):  # fmt: skip
        self.width, self.draw, self.sizes, self.columns = width, draw, sizes, columns
        count = len(sizes)
        self.on = torch.zeros(count, width, dtype=torch.bool, device=like.device)  # rows kept
        self.shrink = like.new_ones(count)  # weight decay of W2_0
        self.active = [1] * count
        self.W2 = [like.new_zeros(1, size) for size in sizes]
        # for every block the units whose rows are kept, and the rows, piece by piece of columns
        self.units: list[Tensor] = [self.on[i].nonzero().flatten() for i in range(count)]
        self.first: list[list[Tensor]] = [[] for _ in sizes]

    def grow(self, h: Tensor):
        """Draw the rows of units that are on for the first time in h (blocks, width)."""
        new = (h > 0) & ~self.on
        for i in new.any(1).nonzero().flatten().tolist():
            self.on[i] |= new[i]
            self._keep(i)

    def _keep(self, i: int):
        self.units[i] = self.on[i].nonzero().flatten()
        if self.columns[i]:
            W2 = self.draw(i)
            self.first[i] = [W2[self.units[i], piece] for piece in self.columns[i]]

    def weights(self, h: Tensor) -> list[tuple[Tensor, Tensor]]:
        """|h|_1, and h of the kept rows with their weight decay."""
        totals = h.sum(1)
        return [(totals[i], h[i, u] * self.shrink[i]) for i, u in enumerate(self.units)]

    def predict(self, i: int, weights: tuple[Tensor, Tensor], out: Tensor):
        """out (P,) = W2_0ᵀ h + |h|_1 S of block i."""
        total, h = weights
        torch.mul(self.W2[i][0], total, out=out)
        for piece, rows in zip(self.columns[i], self.first[i], strict=True):
            out[piece].addmv_(rows.T, h)

    def backward(self, gs: Sequence[Tensor]) -> Tensor:
        """dL/dh (blocks, width) of this rank from dL/dtheta of every block."""
        dh = gs[0].new_zeros(len(gs), self.width)
        for i, g in enumerate(gs):
            pieces = zip(self.columns[i], self.first[i], strict=True)
            of_first = sum(rows @ g[piece] for piece, rows in pieces)
            dh[i, self.units[i]] = self.W2[i][0] @ g + self.shrink[i] * of_first
        return dh

    def factors(self, h: Tensor) -> list[Tensor]:
        return list(h.sum(1, keepdim=True) / (h > 0).sum(1, keepdim=True).clamp(min=1))

    def decay(self, members: Sequence[int], factor: float):
        self.shrink[members] *= factor

    def in_memory(self) -> list[Tensor]:
        return [*self.W2, *(rows for pieces in self.first for rows in pieces)]

    def trained(self, P: int) -> int:
        return P

    def state(self, i: int) -> dict[str, Tensor]:
        return {"W2": self.W2[i], "on": self.on[i], "shrink": self.shrink[i]}

    def shapes(self, i: int, active: int) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.state(i).items()}

    def load(self, i: int, state: dict[str, Tensor], active: int):
        for name, mine in self.state(i).items():
            mine.copy_(state[name])
        self._keep(i)
