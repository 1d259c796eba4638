"""Tensors that FSDP2 shards: what of them lives on this rank."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


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
