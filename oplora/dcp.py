"""State of an `oplora.optimizer.OPOptimizer` in a layout for torch.distributed.checkpoint (DCP).

DCP loads in place, into what an optimizer built anew gives: keys and shapes may not depend on how
long it has trained. And it knows from DTensors alone what is sharded. So every tensor has an entry
{"oplora": {…}} of its own here, its columns of W2 and b2 and of their moments ("W2/exp_avg", …) as
(rows, *shape of the tensor), sharded as the tensor is. W2 has all its rows, zeros where a row is
not kept (`oplora.rows`); moments that no step has made are there in their shapes, and "begun" is
false. The first tensor of a block has the rest of its MLP. World sizes may differ.
"""

import sys
from collections import defaultdict
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from oplora.mlp import STARTS
from oplora.stack import MLPStack
from oplora.tensors import local, local_columns, whole

KEY = "oplora"  # one key for all: DCP's flat form asks `Optimizer.state` for an entry's keys


def asks() -> bool:
    """Is DCP among the callers? It calls `state_dict()` as those do who want a small file."""
    frames = (frame for frame, _ in walk_stack(sys._getframe()))
    names = (frame.f_globals.get("__name__", "") for frame in frames)
    return any(name.startswith("torch.distributed.checkpoint") for name in names)


def cut(optimizer, state: dict[int, dict]) -> dict[int, dict]:
    """Entries as `oplora.saving` makes them, by number of the tensor, in this layout, as copies."""
    tensors, result = optimizer.tensors(), {}
    number = {id(tensor): k for k, tensor in enumerate(tensors)}
    first = _first_states(optimizer.inner)
    for part, i in optimizer.blocks():
        block = part.stack.tensors.blocks[i]
        entry = state[number[id(block[0])]]
        inner = entry["inner"] or {
            name: first.get(id(t), {}) for name, t in optimizer.mlp_tensors(part, i).items()
        }
        moments = {f"{name}/{key}": v for name, s in inner.items() for key, v in s.items()}
        pieces = _pieces(part.stack, i, {**entry["mlp"], **moments})
        pieces[0] |= _numbers(active=entry["active"], begun=bool(entry["inner"]))
        for tensor, piece, start in zip(block, pieces, entry["starts"], strict=True):
            result[number[id(tensor)]] = {KEY: piece | _numbers(start=STARTS.index(start))}
    for k, tensor in enumerate(tensors):
        if k not in result:
            values = state.get(k) or first.get(id(tensor), {})
            copies = {key: _copy(value) for key, value in values.items()}
            result[k] = {KEY: copies | _numbers(begun=bool(state.get(k)))}
    return result


def join(optimizer, state: dict, keys: dict[int, Any]) -> dict:
    """Inverse of `cut`; keys: of every tensor's entry, by id. Foreign blocks are left out."""
    pieces = {id(t): state.get(keys[id(t)], {}).get(KEY, {}) for t in optimizer.tensors()}
    result = {}
    for part, i in optimizer.blocks():
        block = part.stack.tensors.blocks[i]
        mine = [pieces.pop(id(tensor)) for tensor in block]
        if ["z" in piece for piece in mine] != [k == 0 for k in range(len(block))]:
            continue
        active, entry = int(mine[0]["active"]), {"mlp": {}, "inner": defaultdict(dict)}
        for key, value in mine[0].items():
            name, _, moment = key.partition("/")
            parts = [piece.get(key) for piece in mine]
            if all(_is_piece(name, t, part) for t, part in zip(block, parts, strict=True)):
                columns = [_columns(t, part) for t, part in zip(block, parts, strict=True)]
                value = torch.cat(columns, 1)
                value = value[0] if name == "b2" else value[:active]
            if moment:
                entry["inner"][name][moment] = value
            elif key not in ("active", "begun", "start"):
                entry["mlp"][name] = value
        result[keys[id(block[0])]] = {
            "mlp": entry["mlp"],
            "inner": dict(entry["inner"]) if mine[0]["begun"] else {},
            "active": active,
            "starts": [STARTS[piece["start"]] for piece in mine],
        }
    for tensor, piece in pieces.items():
        values = {key: value for key, value in piece.items() if key != "begun"}
        begun = piece.get("begun")
        result[keys[tensor]] = {"mlp": {}} if "W2" in piece else values if begun else {}
    return result


def _pieces(stack: MLPStack, i: int, values: dict[str, Any]) -> list[dict[str, Any]]:
    """Values with W2's columns, cut for every tensor of block i; the first gets the others."""
    tensors = stack.tensors.blocks[i]
    P, sizes = stack.tensors.sizes[i], [local(t).numel() for t in tensors]
    pieces: list[dict[str, Any]] = [{} for _ in tensors]
    for key, value in values.items():
        name = key.partition("/")[0]
        ndim = {"W2": 2, "b2": 1}.get(name, 0)
        shape = tuple(value.shape) if torch.is_tensor(value) else ()
        if not ndim or len(shape) != ndim or shape[-1] != P:
            if ndim and shape and stack.tensors.mesh is not None:
                raise ValueError(
                    f"{stack.tensors.names[i][0]}: the optimizer keeps {key} {shape} of a W2 and "
                    "b2 that are spread over ranks: it is not elementwise, use another one"
                )
            pieces[0][key] = _copy(value)
            continue
        rows = value if ndim == 2 else value[None]
        if name == "W2" and not stack.rows.every:
            rows = torch.cat([rows, rows.new_zeros(stack.width - len(rows), P)])
        for tensor, piece, columns in zip(tensors, pieces, rows.split(sizes, 1), strict=True):
            piece[key] = _sharded(tensor, columns.clone(memory_format=torch.contiguous_format))
    return pieces


def _sharded(tensor: Tensor, columns: Tensor) -> Tensor:
    """Columns (rows, values of this rank) as (rows, *shape of the tensor), sharded as it is."""
    columns = columns.view(len(columns), *local(tensor).shape)
    if not isinstance(tensor, DTensor):
        return columns
    shape = torch.Size([len(columns), *tensor.shape])
    return DTensor.from_local(
        columns,
        tensor.device_mesh,
        [Shard(p.dim + 1) if p.is_shard() else p for p in tensor.placements],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def _is_piece(name: str, tensor: Tensor, value) -> bool:
    return name in ("W2", "b2") and torch.is_tensor(value) and value.shape[1:] == tensor.shape


def _columns(tensor: Tensor, value: Tensor) -> Tensor:
    """Inverse of `_sharded`, also of what was sharded otherwise."""
    if isinstance(tensor, DTensor) and isinstance(value, DTensor):
        return value.to_local().flatten(1)
    return local_columns(tensor, whole(value).flatten(1))


def _numbers(**values: int) -> dict[str, Tensor]:
    """As tensors: DCP loses other things when an optimizer itself is given to it."""
    return {key: torch.tensor(value) for key, value in values.items()}


def _copy(value):
    return value.clone() if torch.is_tensor(value) else value


def _first_states(inner: Optimizer) -> dict[int, dict]:
    """What a step would keep of tensors that have no state yet, by id: it is made on copies."""
    twin = object.__new__(type(inner))
    twin.__dict__.update(inner.__dict__, state=defaultdict(dict), param_groups=[])
    tensors: list[Tensor] = []
    for group in inner.param_groups:
        missing = [tensor for tensor in group["params"] if not inner.state.get(tensor)]
        copies = [tensor.detach().clone() for tensor in missing]
        for tensor in copies:
            tensor.grad = torch.zeros_like(tensor)
        tensors += missing
        twin.param_groups.append({**group, "params": copies})
    if tensors:
        twin.step()
    copies = [tensor for group in twin.param_groups for tensor in group["params"]]
    return {id(t): twin.state.get(c, {}) for t, c in zip(tensors, copies, strict=True)}
