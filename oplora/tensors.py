"""The adapter's tensors as the optimizer sees them: N blocks, read and written as one vector."""

from collections.abc import Iterable, Sequence
from itertools import compress

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import get_total_norm


def local(tensor: Tensor) -> Tensor:
    """The part of a (possibly FSDP2-sharded) tensor that lives on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a (possibly FSDP2-sharded) tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_columns(tensor: Tensor, columns: Tensor) -> Tensor:
    """The part of `columns` (…, all values) that this rank's shard covers: (…, local values)."""
    if not isinstance(tensor, DTensor):
        return columns
    if any(not (p.is_replicate() or p == Shard(0)) for p in tensor.placements):
        raise ValueError(f"only tensors sharded along dim 0 are supported, not {tensor.placements}")
    shaped = columns.view(len(columns), *tensor.shape)
    index = torch.arange(tensor.shape[0], device=tensor.device)
    index = DTensor.from_local(index, tensor.device_mesh, run_check=False)
    rows = index.redistribute(tensor.device_mesh, tensor.placements).to_local()
    return shaped[:, rows.to(shaped.device)].flatten(1)


def state_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """fp32 under bf16 and fp16 adapters: an MLP's small steps would be lost there."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class BlockTensors:
    """The tensors of N blocks on one device, as one vector of all their values.

    Under FSDP2 the vector holds this rank's part; `total` sums over all ranks. `theta` is what was
    last written, as the tensors have rounded it, so that writes by others are noticed.

    blocks: N lists of tensors; names: N lists of their names; dtype: of theta and the gradient.
    """

    def __init__(
        self, blocks: Sequence[list[Tensor]], names: Sequence[list[str]], dtype: torch.dtype
    ):
        self.blocks, self.names = list(blocks), list(names)
        self.flat = [t for block in self.blocks for t in block]
        self.flat_names = [name for block_names in self.names for name in block_names]
        self.mesh = next((t.device_mesh for t in self.flat if isinstance(t, DTensor)), None)
        if self.mesh is not None and self.mesh.ndim > 1:
            raise ValueError(
                f"{self.flat_names[0]} is spread over a {self.mesh.ndim}-dimensional mesh (HSDP, "
                "tensor parallelism): use FSDP2 on a one-dimensional mesh"
            )
        self.device = local(self.flat[0]).device
        self.sizes = [sum(local(t).numel() for t in block) for block in self.blocks]
        self.theta = torch.empty(sum(self.sizes), dtype=dtype, device=self.device)
        self._gradient = torch.empty_like(self.theta)
        self._theta_views, self._gradient_views = map(self.views, (self.theta, self._gradient))
        self.theta_of_block = self.theta.split(self.sizes)

    def views(self, flat: Tensor) -> list[Tensor]:
        """A vector of all values as views of the tensors' shapes."""
        mine = [local(t) for t in self.flat]
        parts = flat.split([t.numel() for t in mine])
        return [part.view(t.shape) for part, t in zip(parts, mine, strict=True)]

    def values(self) -> list[Tensor]:
        """This rank's parts of the tensors, outside autograd."""
        mine = self.flat if self.mesh is None else [local(t) for t in self.flat]
        return [t.detach() for t in mine]

    def total(self, values: Tensor) -> Tensor:
        """Sum of values, over all ranks."""
        value = values.sum()
        return value if self.mesh is None else self.all_reduce(value)

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum over the ranks that hold the other parts of sharded blocks, in place."""
        if self.mesh is not None:
            dist.all_reduce(value, group=self.mesh.get_group())
        return value

    def are_zero(self, i: int) -> list[bool]:
        """Which tensors of block i are zero, on all ranks."""
        nonzero = torch.stack([local(t).detach().any().float() for t in self.blocks[i]])
        return [not flag for flag in self.all_reduce(nonzero).tolist()]

    def with_gradients(self) -> list[int]:
        """Blocks of which at least one tensor has a gradient (torch skips the others too)."""
        given = [any(t.grad is not None for t in block) for block in self.blocks]
        for names, block in compress(zip(self.names, self.blocks, strict=True), given):
            frozen = [name for name, t in zip(names, block, strict=True) if not t.requires_grad]
            if 0 < len(frozen) < len(block):
                raise RuntimeError(
                    f"{frozen[0]} was frozen after the optimizer was built, and its MLP goes on "
                    "with the rest of its block: build the optimizer anew"
                )
        return list(compress(range(len(given)), given))

    def gather_gradient(self) -> Tensor:
        """g = dL/dtheta of all blocks in the buffer of the last call; zero where there is none."""
        grads = [t.grad for t in self.flat]
        given = [grad is not None for grad in grads]
        if not all(given):
            self._gradient.zero_()
        if any(given):
            grads = list(compress(grads, given))
            if self.mesh is not None:
                grads = [local(grad) for grad in grads]
            torch._foreach_copy_(list(compress(self._gradient_views, given)), grads)
        return self._gradient

    def take_edits(self, b2: Tensor, refuse: bool) -> tuple[Tensor, list[str]] | None:
        """What others have added to the tensors since the last write, and to which; None: nothing.

        theta takes the new values over. Where b2 and W2ᵀ h cancel, differences of their rounding
        are taken over without a name. RuntimeError if `refuse`, or if new values are not finite;
        FloatingPointError if it was our own last write that was not.
        """
        values, change = self.values(), self._gradient
        torch._foreach_copy_(self._gradient_views, values)
        if self.total(change.sub_(self.theta).abs_()) == 0:
            return None
        if self.total((~self.theta.isfinite()).float()) > 0:
            raise FloatingPointError(
                "the last step overflowed, the adapter holds NaN or Inf: lower the learning rate "
                "and go on from a checkpoint"
            )
        torch._foreach_copy_(self._gradient_views, values)
        change = self._gradient - self.theta
        parts = map(self.views, (change, self.theta, b2))
        edited = [
            name
            for name, tensor, new, old, b2 in zip(self.flat_names, self.flat, *parts, strict=True)
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
        self.accept()
        return change, edited

    def accept(self, mask: Sequence[bool] | None = None):
        """Take what these tensors (all: None) hold for what was written: it is no edit."""
        mask = [True] * len(self.flat) if mask is None else mask
        views, values = (list(compress(x, mask)) for x in (self._theta_views, self.values()))
        if views:
            torch._foreach_copy_(views, values)

    def round_theta(self):
        """theta as the tensors would round it: what they hold instead will count as an edit."""
        for view, tensor in zip(self._theta_views, self.flat, strict=True):
            view.copy_(view.to(tensor.dtype))

    def write(self, mask: Sequence[bool] | None = None):
        """Write theta into these tensors (all: None) in place."""
        values, views = self.values(), self._theta_views
        if mask is not None:
            values, views = (list(compress(x, mask)) for x in (values, views))
        if values:
            torch._foreach_copy_(values, views)
        if any(value.dtype != self.theta.dtype for value in values):
            torch._foreach_copy_(views, values)  # as they have rounded it

    def of_blocks(self, members: Sequence[int]) -> list[bool]:
        """A mask of tensors from numbers of blocks."""
        chosen = set(members)
        return [i in chosen for i, block in enumerate(self.blocks) for _ in block]


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def places(tensor: Tensor) -> list:
    """What no other tensor of an optimizer may share: identity, and where its values begin."""
    mine = local(tensor)
    start = (mine.device, mine.untyped_storage().data_ptr(), mine.storage_offset())
    return [id(tensor), *([start] if mine.numel() else [])]


def check_tensor(tensor, name: str, known: dict):
    """ValueError if no MLP can predict this tensor; TypeError if it is none.

    known: names of the tensors so far, by their `places`; this one's are added.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, not a tensor")
    if id(tensor) in known:
        raise ValueError(f"{name} is given twice: a tensor belongs to one block of one group")
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(f"{name} has dtype {tensor.dtype}: quantised tensors cannot be predicted")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device: load the model before its optimizer")
    if not tensor.requires_grad:
        raise ValueError(
            f"{name} is frozen: give the trained tensors alone, or take "
            "oplora.create_oplora_optimizer(model), which finds an adapter's"
        )
    if not tensor.is_leaf:
        raise ValueError(f"{name} is computed from other tensors: give the parameter itself")
    if hasattr(tensor, "ds_id"):
        raise ValueError(
            f"{name} belongs to DeepSpeed ZeRO-3, which is not supported: use DDP or FSDP2"
        )
    for place in places(tensor):
        if place in known:
            raise ValueError(
                f"{name} shares its memory with {known[place]} (as PEFT's ensure_weight_tying "
                "makes it): two MLPs cannot predict one value, leave one of them out"
            )
        known[place] = name
    if getattr(tensor, "_is_flat_param", False) or type(tensor).__name__ == "FlatParameter":
        raise ValueError(f"{name} is an FSDP1 flat parameter: use FSDP2 (fsdp_version: 2)")


def check_gradients(named: Iterable[tuple[str, Tensor | None]]):
    """FloatingPointError that names the tensors whose gradients hold NaN or Inf; None: it has none.

    Of what is left as it is afterwards: nothing was updated yet.
    """
    given = [(name, g) for name, g in named if g is not None]
    held = [local(g) for _, g in given if local(g).numel()]  # a shard may be empty
    # one number for all tensors: a GPU is waited for once, not once a layer
    wrong = (~get_total_norm(held).isfinite()).float()
    mesh = next((g.device_mesh for _, g in given if isinstance(g, DTensor)), None)
    if mesh is not None:
        wrong = wrong.to(local(given[0][1]).device)
        dist.all_reduce(wrong, group=mesh.get_group())
    if not wrong:
        return
    bad = [name for name, g in given if not whole(g.isfinite().all())]
    if bad:  # else the squares alone are too large
        raise FloatingPointError(
            f"NaN or Inf in the gradient of {', '.join(bad[:3])}: nothing was updated. "
            "Lower the learning rate, or leave this step out"
        )
