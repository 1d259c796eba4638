"""Many MLPs side by side: the state that the optimizer keeps for the blocks of one group.

A block is the list of tensors that one MLP predicts. z, W1 and b1 of all blocks are stacked, so
that the hidden layer costs one batched product; W2 is one (width, P) matrix a block.

Since z is a single input, a hidden unit that is off (h_j = 0) contributes nothing and gets no
gradient. With `compact`, `W2` has the rows of units that were ever on alone. The others still
are what they were drawn as, and are drawn again when they are needed; only weight decay changes
them, so with it they are kept in `rest`.
"""

from collections.abc import Sequence
from itertools import compress

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from oplora.mlp import MLPWeights, generator_for, hidden, initial_mlp, pullback, resolve_starts
from oplora.shards import local, local_columns, whole


class MLPStack:
    """The MLPs of N blocks; the blocks' tensors hold their output (one device, one type of state).

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
        self.compact = compact
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
        self.starts, self._drawn, mlps = [], [], []
        for block, block_names, start in zip(self.blocks, self.names, starts, strict=True):
            if isinstance(start, str):
                start = resolve_starts(start, self._are_zero(block))
            self.starts.append(start)
            self._drawn.append((block, block_names, start, dtype, seed, mlp_options))
            mlp = self._initial_block(*self._drawn[-1])
            # Which rows are needed is known when all are stacked: never hold all of them at once.
            mlps.append(mlp._replace(W2=mlp.W2[:0].clone()) if compact else mlp)
        self.z, self.W1, self.b1 = (torch.stack([m[i] for m in mlps]) for i in range(3))
        self.b2 = torch.cat([m.b2 for m in mlps])
        self.order = torch.arange(width, device=self.device).repeat(len(mlps), 1)
        self.active = [0 if compact else width] * len(mlps)  # rows of W2 that were ever on
        self.W2 = [m.W2 for m in mlps]
        # Rows of units that never were on, unless they are as they were drawn.
        self.rest: list[Tensor | None] = [None] * len(mlps)
        self._link_views()
        self.written = torch.empty_like(self.b2)
        # One buffer for both: a block's theta is predicted when its gradient g is used up.
        self.theta = self._g = torch.empty_like(self.b2)
        self._written_parts, self._theta_parts = self._parts(self.written), self._parts(self.theta)
        self._theta_blocks = self.theta.split(self.sizes)
        self.accept()
        self._predict_all()
        if adopt:
            self._expect_theta([s != "keep" for start in self.starts for s in start])
        else:
            self._write([s == "random" for start in self.starts for s in start])

    def _initial_block(self, block, names, start, dtype, seed, options) -> MLPWeights:
        tensors = [whole(t) for t in block]
        generator = generator_for(seed, names[0])
        mlp = initial_mlp(tensors, start, self.width, generator=generator, dtype=dtype, **options)
        if self.mesh is not None:  # the same MLP on every rank, of which each keeps its columns
            parts = zip(block, mlp.W2.split([t.numel() for t in tensors], 1), strict=True)
            W2 = torch.cat([local_columns(t, part) for t, part in parts], 1)
            parts = zip(block, mlp.b2.split([t.numel() for t in tensors]), strict=True)
            b2 = torch.cat([local_columns(t, part[None])[0] for t, part in parts])
            mlp = mlp._replace(W2=W2, b2=b2)
        return MLPWeights(*(w.to(self.device) for w in mlp))

    def _are_zero(self, block) -> list[bool]:
        nonzero = torch.stack([local(t).detach().any().float() for t in block])
        return [not flag for flag in self._all_reduce(nonzero).tolist()]

    def _link_views(self):
        self.stacked = dict(z=self.z, W1=self.W1, b1=self.b1, b2=self.b2)  # in backward's order
        self.trunks = self.per_block(self.stacked)

    def per_block(self, stacked: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Views of tensors like `self.stacked`, block by block: what a torch optimizer is given."""
        views = {
            name: tensor.unbind() if name in ("z", "W1", "b1") else tensor.split(self.sizes, -1)
            for name, tensor in stacked.items()
        }
        return [
            dict(zip(views, of_block, strict=True))
            for of_block in zip(*views.values(), strict=True)
        ]

    def _all_reduce(self, value: Tensor) -> Tensor:
        """Sum over the ranks that hold the other parts of sharded blocks."""
        if self.mesh is not None:
            dist.all_reduce(value, group=self.mesh.get_group())
        return value

    def total(self, values: Tensor) -> Tensor:
        """Sum of values, over all ranks."""
        return self._all_reduce(values.sum())

    # The step, in the order in which the optimizer calls it

    def participating(self) -> list[int]:
        """Blocks of which at least one tensor has a gradient (torch skips the others too)."""
        given = [[t.grad is not None for t in block] for block in self.blocks]
        for names, block, flags in zip(self.names, self.blocks, given, strict=True):
            if any(flags) and not all(t.requires_grad for t in block):
                frozen = [n for n, t in zip(names, block, strict=True) if not t.requires_grad]
                raise RuntimeError(
                    f"{frozen[0]} was frozen after the optimizer was built, and its MLP goes on "
                    "with the rest of its block: build the optimizer anew"
                )
        return [i for i, flags in enumerate(given) if any(flags)]

    def gradient(self) -> Tensor:
        """g = dL/dtheta of all blocks, flat; zero where a tensor has no gradient."""
        grads = [None if t.grad is None else local(t.grad) for t in self.tensors]
        given = [grad is not None for grad in grads]
        if not all(given):
            self._g.zero_()
        if any(given):
            parts = list(compress(self._theta_parts, given))
            torch._foreach_copy_(parts, list(compress(grads, given)))
        return self._g

    def absorb_edits(self, refuse: bool) -> list[str]:
        """Take over values that someone wrote into the tensors since the last step.

        b2 moves by the difference, so the MLP predicts the new values. Returns the edited
        tensors' names; raises RuntimeError if `refuse`, or if the new values are not finite.
        """
        torch._foreach_copy_(self._theta_parts, self._values())
        if self.total(self.theta.sub_(self.written).abs_()) == 0:
            return []
        if self.total((~self.written.isfinite()).float()) > 0:
            raise FloatingPointError(
                "the last step overflowed, the adapter holds NaN or Inf: lower the learning rate "
                "and go on from a checkpoint"
            )
        torch._foreach_copy_(self._theta_parts, self._values())
        change = self.theta - self.written
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
        where = where or "on another rank"
        if self.total((~change.isfinite()).float()) > 0:
            raise RuntimeError(f"NaN or Inf was written into adapter tensors: {where}")
        if refuse and self.total(change.new_tensor([len(edited)])) > 0:
            raise RuntimeError(
                f"adapter tensors were changed behind the optimizer: {where}. Build the "
                "optimizer after loading or merging, or use edited='absorb'"
            )
        self.b2 += change
        self.accept()
        return edited

    def accept(self):
        """Take what the tensors hold now for the MLPs' own output: it will not count as edited."""
        torch._foreach_copy_(self._written_parts, self._values())

    def backward(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the stacked z, W1, b1 from the flat g."""
        dh = torch.zeros_like(self.h)
        for i, part in enumerate(g.split(self.sizes)):
            n = self.active[i]
            torch.mv(self.W2[i], part, out=dh[i, :n])
        dh = torch.zeros_like(dh).scatter_(1, self.order, self._all_reduce(dh))
        return pullback(dh, self.z, self.W1, self.h)

    def rows(self, h: Tensor) -> list[Tensor]:
        """h (blocks, width) of every block in the order of its W2 rows: dL/dW2 = rows ⊗ g."""
        ordered = h.gather(1, self.order)
        return [row[:n] for row, n in zip(ordered, self.active, strict=True)]

    def squared_norm(self, g: Tensor, trunk: Sequence[Tensor]) -> Tensor:
        """Squared norm of the gradient of all MLPs: the rank-1 parts need only |g| and |h|."""
        output = torch.stack([part.square().sum() for part in g.split(self.sizes)])
        output = self._all_reduce(output * (self.h.square().sum(1) + 1))
        return output.sum() + sum(t.square().sum() for t in trunk)

    def predict(self, members: Sequence[int]):
        """theta from the present MLPs, written into these blocks' tensors in place."""
        self._outputs(members)
        self.write(members)

    def refresh(self):
        """h from the present trunks; W2 gets the rows of units that are on for the first time."""
        self.h = self._hidden()
        self._rows = self.rows(self.h)

    def decay(self, members: Sequence[int], factor: float):
        """Weight decay of what no gradient reaches: rows of units that never were on."""
        for i in members:
            self.rest[i] = self.inactive(i)
        torch._foreach_mul_([self.rest[i] for i in members], factor)

    def output(self, i: int):
        """theta of block i without b2, from its present W2; its gradient g is lost."""
        torch.mv(self.W2[i].T, self._rows[i], out=self._theta_blocks[i])

    def write(self, members: Sequence[int]):
        """theta of these blocks, of which `output` was called, into their tensors in place."""
        self.theta += self.b2
        chosen = set(members)
        self._write([i in chosen for i, block in enumerate(self.blocks) for _ in block])

    # State

    @property
    def mlp_parameters(self) -> int:
        """Values in all MLPs."""
        trunks = self.z.numel() + self.W1.numel() + self.b1.numel()
        return trunks + (self.width + 1) * sum(tensor.numel() for tensor in self.tensors)

    def held(self) -> list[Tensor]:
        """What the MLPs occupy memory with."""
        rest = [rows for rows in self.rest if rows is not None]
        return [self.z, self.W1, self.b1, self.b2, *self.W2, *rest]

    def inactive(self, i: int) -> Tensor:
        """Rows of block i's W2 whose units never were on, in the order of `order`."""
        if self.rest[i] is not None:
            return self.rest[i]
        if self.active[i] == self.width:
            return self.W2[i][self.width :]
        return self._initial_block(*self._drawn[i]).W2[self.order[i, self.active[i] :]]

    def state(self, i: int) -> dict[str, Tensor]:
        """The MLP of block i, by name, with all rows of W2 in the order of `order`."""
        W2 = (
            torch.cat([self.W2[i], self.inactive(i)]) if self.active[i] < self.width else self.W2[i]
        )
        return {**self.trunks[i], "W2": W2, "order": self.order[i]}

    def check(self, i: int, state: dict[str, Tensor], active: int):
        """ValueError if `state` is not of this MLP's shapes, or has moments of some rows only."""
        if active < self.width and not self.compact:
            raise ValueError(
                f"state of {self.names[i][0]}: it has moments of the rows of W2 that were ever on "
                "only, as OPAdamW saves it: load it into OPAdamW"
            )
        for name, shape in self._shapes(i).items():
            if name not in state or state[name].shape != shape:
                found = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(
                    f"state of {self.names[i][0]}: {name} is {found}, here it is "
                    f"{tuple(shape)}: it was saved with another mlp_width, z_dim or adapter"
                )

    def _shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        trunk = {name: tensor.shape for name, tensor in self.trunks[i].items()}
        return {**trunk, "W2": (self.width, self.sizes[i]), "order": (self.width,)}

    def load(self, i: int, state: dict[str, Tensor], active: int):
        """Inverse of `state`, after `check`; call `loaded` when all blocks are in."""
        for name, mine in [*self.trunks[i].items(), ("order", self.order[i])]:
            mine.copy_(state[name])
        self.active[i] = active
        self.W2[i].resize_(active, self.sizes[i]).copy_(state["W2"][:active])
        self.rest[i] = None
        rest = state["W2"][active:].to(self.W2[i])
        if not torch.equal(rest, self.inactive(i)):
            self.rest[i] = rest.clone()

    def loaded(self):
        """After `load` of all blocks: the tensors are expected to hold the MLPs' values."""
        self._predict_all()
        self._expect_theta([True] * len(self.tensors))

    # Inner pieces

    def _expect_theta(self, mask: Sequence[bool]):
        """Count what these tensors hold instead of the MLPs' values as an edit."""
        parts = zip(self._written_parts, self._theta_parts, self.tensors, strict=True)
        for written, theta, tensor in compress(parts, mask):
            written.copy_(theta.to(tensor.dtype))

    def _hidden(self) -> Tensor:
        h = hidden(self.z, self.W1, self.b1)
        if min(self.active) < self.width:
            self._activate(h)
        return h

    def _activate(self, h: Tensor):
        """Append the rows of units that are on for the first time to those already active."""
        width = torch.arange(self.width, device=h.device)
        active = torch.tensor(self.active, device=h.device)
        new = (h.gather(1, self.order) > 0) & (width >= active[:, None])
        for i in new.any(1).nonzero().flatten().tolist():
            rest, first = self.inactive(i), self.active[i]
            for row in new[i].nonzero().flatten().tolist():
                pair, swapped = [self.active[i], row], [row, self.active[i]]
                self.order[i, pair] = self.order[i, swapped]
                rest[[k - first for k in pair]] = rest[[k - first for k in swapped]]
                self.active[i] += 1
            count = self.active[i] - first
            self.W2[i].resize_(self.active[i], self.sizes[i])[first:] = rest[:count]
            if self.rest[i] is not None:
                self.rest[i] = rest[count:].clone()

    def _outputs(self, members: Sequence[int]):
        self.refresh()
        for i in members:
            self.output(i)

    def _predict_all(self):
        self._outputs(range(len(self.blocks)))
        self.theta += self.b2

    def _values(self) -> list[Tensor]:
        return [local(t).detach() for t in self.tensors]

    def _parts(self, flat: Tensor) -> list[Tensor]:
        mine = [local(t) for t in self.tensors]
        parts = flat.split([t.numel() for t in mine])
        return [part.view(t.shape) for part, t in zip(parts, mine, strict=True)]

    def _write(self, mask: Sequence[bool]):
        lists = (self._values(), self._theta_parts, self._written_parts)
        values, theta, written = (list(compress(x, mask)) for x in lists)
        if values:
            torch._foreach_copy_(values, theta)
        if all(mask) and all(value.dtype == self.theta.dtype for value in values):
            self.written.copy_(self.theta)
        elif values:  # as the tensors have rounded them
            torch._foreach_copy_(written, values)


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps
