"""Many MLPs side by side: what the optimizer keeps for blocks of one group and device.

A block is the list of tensors that one MLP predicts. z, W1 and b1 of all blocks are stacked, so
that the hidden layer costs one batched product, b2 is one vector, and W2 is kept block by block
(`oplora.rows`).
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from oplora.mlp import MLPWeights, generator_for, hidden, initial_mlp, pullback, resolve_starts
from oplora.rows import ActiveRows, SharedRow
from oplora.tensors import BlockTensors, local, local_columns, whole


class MLPStack:
    """The MLPs of N blocks; the blocks' tensors hold what they predict.

    blocks: N lists of tensors of one device; names: N lists of their names, which seed the random
    streams; starts: N entries, each a word or a list of one start per tensor (`resolve_starts`).
    dtype: of the state. rows: the form of W2, "active" or "every" (`ActiveRows`) or "shared".
    Tensors with start "random" are overwritten with the MLP's value here. already_written: they
    were before, by the same MLPs; what was written into them since then counts as an edit.
    initial: other arguments of `initial_mlp`.
    """

    def __init__(
        self,
        blocks: Sequence[list[Tensor]],
        names: Sequence[list[str]],
        starts: Sequence[str | list[str]],
        *,
        width: int,
        dtype: torch.dtype,
        seed: int,
        rows: str,
        restarts: int = 0,
        already_written: bool = False,
        **initial,
    ):
        self.tensors = BlockTensors(blocks, names, dtype)
        self.width, self._initial = width, dict(seed=seed, dtype=dtype, **initial)
        self._restarts = f"{restarts}/" if restarts else ""
        self.starts = [
            resolve_starts(start, self.tensors.are_zero(i)) if isinstance(start, str) else start
            for i, start in enumerate(starts)
        ]
        # Which rows of W2 are needed is known when all are stacked: never hold all of them at once.
        mlps = [self._draw(i)._replace(W2=None) for i in range(len(blocks))]
        self.z, self.W1, self.b1 = (torch.stack([m[k] for m in mlps]) for k in range(3))
        self.b2 = torch.cat([m.b2 for m in mlps])
        self.stacked = dict(z=self.z, W1=self.W1, b1=self.b1, b2=self.b2)  # in `backward`'s order
        self.trunks = self.per_block(self.stacked)
        draw = lambda i: self._draw(i).W2  # noqa: E731
        place = (width, draw, self.tensors.sizes, self.b2)
        if rows == "shared":
            columns = [self._moving_columns(i) for i in range(len(blocks))]
            self.rows = SharedRow(*place, columns=columns)
        else:
            self.rows = ActiveRows(*place, every=rows == "every")
        self.predict(range(len(blocks)), write=False)
        random = [start == "random" for starts in self.starts for start in starts]
        self.tensors.accept([not r for r in random])
        if already_written:
            self.tensors.round_theta()
        else:
            self.tensors.write(random)

    def _draw(self, i: int) -> MLPWeights:
        """The initial weights of block i, the same at every call but for b2 of kept tensors.

        On all ranks the same MLP, of which each keeps the columns of its part of the tensors.
        """
        block, options = self.tensors.blocks[i], dict(self._initial)
        tensors = [whole(t) for t in block]
        generator = generator_for(options.pop("seed"), self._restarts + self.tensors.names[i][0])
        mlp = initial_mlp(tensors, self.starts[i], self.width, generator=generator, **options)
        if self.tensors.mesh is not None:
            sizes = [t.numel() for t in tensors]
            parts = zip(block, mlp.W2.split(sizes, 1), strict=True)
            W2 = torch.cat([local_columns(t, part) for t, part in parts], 1)
            parts = zip(block, mlp.b2.split(sizes), strict=True)
            b2 = torch.cat([local_columns(t, part[None])[0] for t, part in parts])
            mlp = mlp._replace(W2=W2, b2=b2)
        return MLPWeights(*(w.to(self.tensors.device) for w in mlp))

    def _moving_columns(self, i: int) -> list[slice]:
        """The columns of block i's W2 whose first values are not zero."""
        ends = list(accumulate(local(t).numel() for t in self.tensors.blocks[i]))
        slices = map(slice, [0, *ends[:-1]], ends)
        return [s for s, start in zip(slices, self.starts[i], strict=True) if start != "still"]

    def per_block(self, stacked: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Views of tensors like `self.stacked`, block by block: what a torch optimizer is given."""
        views = {
            name: tensor.split(self.tensors.sizes) if name == "b2" else tensor.unbind()
            for name, tensor in stacked.items()
        }
        blocks = zip(*views.values(), strict=True)
        return [dict(zip(views, of_block, strict=True)) for of_block in blocks]

    # The step, in the order in which the optimizer calls it

    def absorb_edits(self, refuse: bool) -> list[str]:
        """Let b2 follow what others wrote into the tensors; the names of the edited tensors."""
        found = self.tensors.take_edits(self.b2, refuse)
        if found is None:
            return []
        change, names = found
        self.b2 += change
        return names

    def backward(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the stacked z, W1, b1 from g = dL/dtheta of all blocks."""
        dh = self.rows.backward(g.split(self.tensors.sizes))
        if self.tensors.mesh is not None:
            self.tensors.all_reduce(dh)
        return pullback(dh, self.z, self.W1, self.h)

    def squared_norm(self, g: Tensor, trunk: Sequence[Tensor]) -> Tensor:
        """Squared norm of the gradient of all MLPs: the rank-1 parts need only |g| and |h|."""
        output = torch.stack([part.square().sum() for part in g.split(self.tensors.sizes)])
        output = self.tensors.all_reduce(output * (self.h.square().sum(1) + 1))
        return output.sum() + sum(t.square().sum() for t in trunk)

    def refresh(self):
        """h from the present trunks; W2 gets the rows of units that are on for the first time."""
        self.h = hidden(self.z, self.W1, self.b1)
        self.rows.grow(self.h)

    def write(self, members: Sequence[int]):
        """Add b2 to theta of these blocks, which is W2ᵀ h, and write it into their tensors."""
        if len(members) == len(self.trunks):
            self.tensors.theta += self.b2
            self.tensors.write()
        else:
            for i in members:
                self.tensors.theta_of_block[i].add_(self.trunks[i]["b2"])
            self.tensors.write(self.tensors.of_blocks(members))

    def predict(self, members: Sequence[int], write: bool = True):
        """theta of these blocks from the present MLPs, written into their tensors."""
        self.refresh()
        weights = self.rows.weights(self.h)
        for i in members:
            self.rows.predict(i, weights[i], self.tensors.theta_of_block[i])
        if write:
            self.write(members)
        else:
            self.tensors.theta += self.b2

    # What it holds

    @property
    def mlp_parameters(self) -> int:
        """Values that are trained in all MLPs."""
        P = sum(tensor.numel() for tensor in self.tensors.flat)
        return self.z.numel() + self.W1.numel() + self.b1.numel() + P + self.rows.trained(P)

    def in_memory(self) -> list[Tensor]:
        """What the MLPs occupy memory with."""
        return [*self.stacked.values(), *self.rows.in_memory()]

    def state(self, i: int) -> dict[str, Tensor]:
        """The MLP of block i, by name."""
        return {**self.trunks[i], **self.rows.state(i)}

    def check(self, i: int, state: dict[str, Tensor], active: int):
        """ValueError if `state` is not of this MLP's shapes, or has moments of some rows only."""
        name = self.tensors.names[i][0]
        if self.rows.every and active < self.rows.active[i]:
            raise ValueError(
                f"state of {name}: it has moments of the rows of W2 that were ever on only, as "
                "OPAdamW saves it: load it into OPAdamW"
            )
        trunk = {key: tensor.shape for key, tensor in self.trunks[i].items()}
        for key, shape in {**trunk, **self.rows.shapes(i, active)}.items():
            if key not in state or state[key].shape != shape:
                found = tuple(state[key].shape) if key in state else "missing"
                raise ValueError(
                    f"state of {name}: {key} is {found}, here it is {tuple(shape)}: it was saved "
                    "with another mlp_width, z_dim or adapter"
                )

    def load(self, i: int, state: dict[str, Tensor], active: int, starts: list[str]):
        """Inverse of `state`, after `check`; call `loaded` when all blocks are in.

        starts: of the saved block, which tell what its first rows of W2 were.
        """
        self.starts[i] = starts
        if isinstance(self.rows, SharedRow):
            self.rows.columns[i] = self._moving_columns(i)
        for name, mine in self.trunks[i].items():
            mine.copy_(state[name])
        self.rows.load(i, state, active)

    def loaded(self):
        """After `load` of all blocks: what the tensors hold but the MLPs do not is an edit."""
        self.predict(range(len(self.trunks)), write=False)
        self.tensors.round_theta()
