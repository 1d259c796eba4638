"""Many MLPs side by side: the state that the optimizer keeps for the blocks of one group.

A block is the list of tensors that one MLP predicts. z, W1 and b1 of all blocks are stacked, so
that the hidden layer costs one batched product; W2 is one (width, P) matrix a block.

Since z is a single input, a hidden unit that is off (h_j = 0) contributes nothing and gets no
gradient. With `compact`, rows of W2 are stored with the units that were ever on first, and only
these rows are read.
"""

from collections.abc import Sequence
from itertools import compress

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from oplora.mlp import MLPWeights, generator_for, hidden, initial_mlp, pullback, resolve_starts


def local(tensor: Tensor) -> Tensor:
    """The part of a (possibly FSDP2-sharded) tensor that lives on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MLPStack:
    """The MLPs of N blocks; the blocks' tensors hold their output (all on one device, one dtype).

    blocks: N lists of tensors; names: N lists of their names, which seed the random streams;
    starts: N entries, each "paper", "keep" or a list of one start per tensor (`initial_mlp`).
    Tensors with start "random" are overwritten with the MLP's value here. adopt: they were
    before, by the same MLPs; what was written into them since then counts as an edit.
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
        compact: bool,
        adopt: bool = False,
        **mlp_options,
    ):
        self.blocks, self.names, self.width = list(blocks), list(names), width
        self.tensors = [t for block in self.blocks for t in block]
        self.mesh = next((t.device_mesh for t in self.tensors if isinstance(t, DTensor)), None)
        if self.mesh is not None and self.mesh.ndim > 1:
            raise ValueError(
                f"{names[0][0]} is spread over a {self.mesh.ndim}-dimensional mesh (HSDP, tensor "
                "parallelism): use FSDP2 on a one-dimensional mesh"
            )
        self.device = local(self.tensors[0]).device
        self.sizes = [sum(local(t).numel() for t in block) for block in self.blocks]
        self.starts, mlps = [], []
        for block, block_names, start in zip(self.blocks, self.names, starts, strict=True):
            if isinstance(start, str):
                start = resolve_starts(start, self._are_zero(block))
            self.starts.append(start)
            mlps.append(self._initial_block(block, block_names, start, dtype, seed, mlp_options))
        self.z, self.W1, self.b1 = (torch.stack([m[i] for m in mlps]) for i in range(3))
        self.W2 = [m.W2 for m in mlps]
        self.b2 = torch.cat([m.b2 for m in mlps])
        self.order = torch.arange(width, device=self.device).repeat(len(mlps), 1)
        self.active = [0 if compact else width] * len(mlps)  # rows of W2 that were ever on
        self._link_views()
        self.h = self._hidden()
        self.theta = self._predict()
        self.accept()
        if adopt:
            self._expect_theta([s != "keep" for start in self.starts for s in start])
        else:
            self._write([s == "random" for start in self.starts for s in start])

    def _initial_block(self, block, names, start, dtype, seed, options) -> MLPWeights:
        whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in block]
        generator = generator_for(seed, names[0])
        mlp = initial_mlp(whole, start, self.width, generator=generator, dtype=dtype, **options)
        if self.mesh is not None:  # the same MLP on every rank, of which each keeps its columns
            parts = zip(block, mlp.W2.split([t.numel() for t in whole], 1), strict=True)
            W2 = torch.cat([_local_columns(t, part) for t, part in parts], 1)
            parts = zip(block, mlp.b2.split([t.numel() for t in whole]), strict=True)
            b2 = torch.cat([_local_columns(t, part[None])[0] for t, part in parts])
            mlp = mlp._replace(W2=W2, b2=b2)
        return MLPWeights(*(w.to(self.device) for w in mlp))

    def _are_zero(self, block) -> list[bool]:
        nonzero = torch.stack([local(t).detach().any().float() for t in block])
        return [not flag for flag in self._all_reduce(nonzero).tolist()]

    def _link_views(self):
        """Per-block tensors over the stacked storage: what a torch optimizer is given."""
        self.b2_parts = list(self.b2.split(self.sizes))
        self.trunks = [
            dict(z=self.z[i], W1=self.W1[i], b1=self.b1[i], b2=self.b2_parts[i])
            for i in range(len(self.blocks))
        ]

    def _all_reduce(self, value: Tensor) -> Tensor:
        """Sum over the ranks that hold the other parts of sharded blocks."""
        if self.mesh is not None:
            dist.all_reduce(value, group=self.mesh.get_group())
        return value

    # The step, in the order in which the optimizer calls it

    def participating(self) -> list[int]:
        """Blocks of which at least one tensor has a gradient (torch skips the others too)."""
        return [i for i, block in enumerate(self.blocks) if any(t.grad is not None for t in block)]

    def gradient(self) -> Tensor:
        """g = dL/dtheta of all blocks, flat; zero where a tensor has no gradient."""
        return torch.cat(
            [
                (local(t.grad) if t.grad is not None else torch.zeros_like(local(t)))
                .reshape(-1)
                .to(self.b2.dtype)
                for t in self.tensors
            ]
        )

    def absorb_edits(self, refuse: bool) -> list[str]:
        """Take over values that someone wrote into the tensors since the last step.

        b2 moves by the difference, so the MLP predicts the new values. Returns the edited
        tensors' names; raises RuntimeError if `refuse`, or if the new values are not finite.
        """
        current = self._read()
        if torch.equal(current, self.written):
            return []
        change = current - self.written
        names = [name for block_names in self.names for name in block_names]
        parts = (self._parts(x) for x in (change, self.written, self.b2))
        edited = [
            name
            for name, tensor, new, old, b2 in zip(names, self.tensors, *parts, strict=True)
            # b2 and W2 h of a kept value cancel: differences of their rounding are no edits
            if new.numel()
            and not new.abs().max() <= 4 * _eps(tensor) * (old.abs() + b2.abs()).max()
        ]
        where = ", ".join(edited[:3]) + (f" and {len(edited) - 3} more" if edited[3:] else "")
        if not change.isfinite().all():
            raise RuntimeError(f"NaN or Inf was written into adapter tensors: {where}")
        if refuse and edited:
            raise RuntimeError(
                f"adapter tensors were changed behind the optimizer: {where}. Build the "
                "optimizer after loading or merging, or use edited='absorb'"
            )
        self.b2 += change
        return edited

    def accept(self):
        """Take what the tensors hold now for the MLPs' own output: it will not count as edited."""
        self.written = self._read()

    def backward(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the stacked z, W1, b1 from the flat g."""
        dh = torch.zeros_like(self.h)
        for i, part in enumerate(g.split(self.sizes)):
            n = self.active[i]
            dh[i, :n] = self.W2[i][:n] @ part
        dh = torch.zeros_like(dh).scatter_(1, self.order, self._all_reduce(dh))
        return pullback(dh, self.z, self.W1, self.h)

    def rows(self, i: int) -> Tensor:
        """h of block i in the order of its W2 rows: dL/dW2 = rows ⊗ g."""
        return self.h[i, self.order[i, : self.active[i]]]

    def squared_norm(self, g: Tensor, trunk: Sequence[Tensor]) -> Tensor:
        """Squared norm of the gradient of all MLPs: the rank-1 parts need only |g| and |h|."""
        output = torch.stack([part.square().sum() for part in g.split(self.sizes)])
        output = self._all_reduce(output * (self.h.square().sum(1) + 1))
        return output.sum() + sum(t.square().sum() for t in trunk)

    def predict(self, members: Sequence[int]):
        """theta from the present MLPs, written into these blocks' tensors in place."""
        self.h = self._hidden()
        self.theta = self._predict()
        members = set(members)
        self._write([i in members for i, block in enumerate(self.blocks) for _ in block])

    # State

    def state(self, i: int) -> dict[str, Tensor]:
        """The MLP of block i, by name; tensors are views, not copies."""
        return {**self.trunks[i], "W2": self.W2[i], "order": self.order[i]}

    def check(self, i: int, state: dict[str, Tensor]):
        """ValueError if `state` is not of this MLP's shapes."""
        for name, mine in self.state(i).items():
            if name not in state or state[name].shape != mine.shape:
                found = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(
                    f"state of {self.names[i][0]}: {name} is {found}, here it is "
                    f"{tuple(mine.shape)}: it was saved with another mlp_width, z_dim or adapter"
                )

    def load(self, i: int, state: dict[str, Tensor], active: int):
        """Inverse of `state`, after `check`; call `loaded` when all blocks are in."""
        for name, mine in self.state(i).items():
            mine.copy_(state[name])
        self.active[i] = active

    def loaded(self):
        """After `load` of all blocks: the tensors are expected to hold the MLPs' values."""
        self.h = self._hidden()
        self.theta = self._predict()
        self._expect_theta([True] * len(self.tensors))

    # Inner pieces

    def _expect_theta(self, mask: Sequence[bool]):
        """Count what these tensors hold instead of the MLPs' values as an edit."""
        parts = zip(self._parts(self.written), self._parts(self.theta), self.tensors, strict=True)
        for written, theta, tensor in compress(parts, mask):
            written.copy_(theta.to(tensor.dtype))

    def _hidden(self) -> Tensor:
        h = hidden(self.z, self.W1, self.b1)
        if min(self.active) < self.width:
            self._activate(h)
        return h

    def _activate(self, h: Tensor):
        """Move the rows of units that are on for the first time behind those already active."""
        width = torch.arange(self.width, device=h.device)
        active = torch.tensor(self.active, device=h.device)
        new = (h.gather(1, self.order) > 0) & (width >= active[:, None])
        for i, row in new.nonzero().tolist():
            first = self.active[i]
            if row != first:
                pair, swapped = [first, row], [row, first]
                self.W2[i][pair] = self.W2[i][swapped]
                self.order[i, pair] = self.order[i, swapped]
            self.active[i] += 1

    def _predict(self) -> Tensor:
        parts = [self.W2[i][: self.active[i]].T @ self.rows(i) for i in range(len(self.blocks))]
        return torch.cat(parts) + self.b2

    def _read(self) -> Tensor:
        return torch.cat([local(t).detach().reshape(-1).to(self.b2.dtype) for t in self.tensors])

    def _parts(self, flat: Tensor) -> list[Tensor]:
        mine = [local(t) for t in self.tensors]
        parts = flat.split([t.numel() for t in mine])
        return [part.view(t.shape) for part, t in zip(parts, mine, strict=True)]

    def _write(self, mask: Sequence[bool]):
        mine = [local(t).detach() for t in self.tensors]
        values, written = self._parts(self.theta), self._parts(self.written)
        mine, values, written = (list(compress(x, mask)) for x in (mine, values, written))
        if mine:
            torch._foreach_copy_(mine, values)
            torch._foreach_copy_(written, mine)


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def _local_columns(tensor: Tensor, whole: Tensor) -> Tensor:
    """Columns (…, local values) of `whole` (…, all values) that this rank's shard covers."""
    if not isinstance(tensor, DTensor):
        return whole
    if any(not (p.is_replicate() or p == Shard(0)) for p in tensor.placements):
        raise ValueError(f"only tensors sharded along dim 0 are supported, not {tensor.placements}")
    shaped = whole.view(len(whole), *tensor.shape)
    index = torch.arange(tensor.shape[0], device=tensor.device)
    index = DTensor.from_local(index, tensor.device_mesh, run_check=False)
    rows = index.redistribute(tensor.device_mesh, tensor.placements).to_local()
    return shaped[:, rows.to(shaped.device)].flatten(1)
