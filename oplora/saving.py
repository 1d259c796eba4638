"""State of an `oplora.optimizer.OPOptimizer` as tensors and numbers (loads with weights_only=True).

The entry of a block's first tensor holds {"mlp", "active", "starts", "inner"}: the MLP by the names
of its tensors, how many rows of W2 are kept, how the block's tensors started, and the optimizer's
state of the MLP's tensors. Entries of directly trained tensors are the inner optimizer's. "names"
are those of all tensors, by which they are found again in another order.
torch.distributed.checkpoint, and whoever asks under FSDP2, gets the layout of `oplora.dcp`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from oplora import dcp
from oplora.tensors import local


def state_dict(optimizer, groups: dict[str, Any]) -> dict[str, Any]:
    """groups: what torch's own state_dict makes of the parameter groups."""
    if not optimizer.trained:
        optimizer.follow_model()
    tensors = optimizer.tensors()
    number = {id(p): i for i, p in enumerate(tensors)}
    inner = optimizer.inner.state.items()
    state = {number[id(p)]: s for p, s in inner if id(p) in number}
    for part, i in optimizer.blocks():
        state[number[id(part.stack.tensors.blocks[i][0])]] = {
            "mlp": part.stack.state(i),
            "active": part.stack.rows.active[i],
            "starts": part.stack.starts[i],
            "inner": optimizer.moments_of(part, i),
        }
    if dcp.asks() or any(isinstance(tensor, DTensor) for tensor in tensors):
        state = dcp.cut(optimizer, state)
    return {**groups, "state": state, "names": optimizer.tensor_names()}


@torch.no_grad()
def load_state_dict(optimizer, saved: dict[str, Any], load_groups: Callable[[dict], None]):
    """ValueError, with nothing changed, if `saved` is not of these MLPs.

    load_groups: torch's own load_state_dict.
    """
    optimizer.follow_model()
    params = optimizer.tensors()
    number = {id(p): i for i, p in zip(_keys(optimizer, saved), params, strict=True)}
    state, entries = saved["state"], []
    if any(dcp.KEY in entry for entry in state.values()):
        state = dcp.join(optimizer, state, number)
    for part, i in optimizer.blocks():
        block = part.stack.tensors.blocks[i]
        entry = state.get(number[id(block[0])], {})
        if "mlp" not in entry:
            raise ValueError(
                f"the state holds no MLP for {part.stack.tensors.names[i][0]}: it was saved by an "
                "optimizer without MLPs, or with other blocks"
            )
        part.stack.check(i, entry["mlp"], entry["active"])
        entries.append((part, i, entry))
    first = {id(part.stack.tensors.blocks[i][0]) for part, i in optimizer.blocks()}
    others = {id(p): state.get(number[id(p)], {}) for p in params if id(p) not in first}
    if any("mlp" in entry for entry in others.values()):
        raise ValueError(
            "the state holds MLPs for tensors that are trained directly here (mlp_width=0)"
        )
    load_groups({**saved, "state": {}})
    changed = []
    for part, i, entry in entries:
        mine = part.stack.state(i)
        same = all(torch.equal(entry["mlp"][name].to(t), t) for name, t in mine.items())
        if not same and part.stack not in changed:
            changed.append(part.stack)
        part.stack.load(i, entry["mlp"], entry["active"], entry["starts"])
    optimizer.load_moments([(part, i, entry["inner"]) for part, i, entry in entries], others)
    for stack in changed:  # accelerate loads back what it has just saved
        stack.loaded()
    optimizer.trained |= bool(changed)


def _keys(optimizer, saved: dict[str, Any]) -> list:
    """The key in saved["state"] of every tensor: of the same name, else of the same place."""
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    mine, theirs = optimizer.tensor_names(), saved.get("names") or optimizer.tensor_names()
    if len(keys) != len(mine):
        raise ValueError(
            f"the state is of {len(keys)} tensors, here there are {len(mine)}: it was saved with "
            "another adapter, or with other blocks"
        )
    if missing := [name for name in mine if name not in theirs]:
        others = [name for name in theirs if name not in mine]
        missing, others = ", ".join(missing[:3]), ", ".join(others[:3])
        raise ValueError(f"the state holds nothing for {missing}; it is of {others}")
    key_of = dict(zip(theirs, keys, strict=True))
    return [key_of[name] for name in mine]


def load_inner(inner: Optimizer, states: dict[int, dict | None]):
    """Load states, by id of their tensors, as the optimizer itself does: it knows its dtypes."""
    flat = [p for group in inner.param_groups for p in group["params"]]
    packed = inner.state_dict()
    packed["state"] = {i: states[id(p)] for i, p in enumerate(flat) if states.get(id(p))}
    defaults = dict(inner.defaults)
    inner.load_state_dict(packed)
    inner.defaults = defaults  # torch adds "differentiable" where a class does not know it


def load_uncast(optimizer: Optimizer, saved: dict[str, Any], load_groups: Callable[[dict], None]):
    """Load into an optimizer of any class; torch's own way casts the state to the tensors' dtype.

    load_groups: torch's own load_state_dict.
    """
    load_groups({**saved, "state": {}})
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for key, p in zip(keys, params, strict=True):
        for name, value in saved["state"].get(key, {}).items():
            device = "cpu" if name == "step" else p.device
            optimizer.state[p][name] = value.to(device, copy=True)


def state_by_tensor(optimizer) -> dict[torch.Tensor, dict[str, Any]]:
    """`OPOptimizer.state`: what torch code looks for at the tensors that it knows."""
    params = {id(p) for p in optimizer.tensors()}
    result = {p: state for p, state in optimizer.inner.state.items() if id(p) in params}
    for part, i in optimizer.blocks():
        moments, first = optimizer.moments_of(part, i), 0
        for number, tensor in enumerate(part.stack.tensors.blocks[i]):
            own = result[tensor] = {"step": torch.zeros((), dtype=torch.float32)}
            mine = local(tensor)
            columns = slice(first, first + mine.numel())
            first = columns.stop
            for name, values in moments.items():
                for key, value in values.items():
                    whole = not torch.is_tensor(value) or not value.ndim
                    if name == "W2":
                        rows = () if whole else (len(value), *mine.shape)
                        own[key] = value if whole else value[:, columns].view(rows)
                    elif name == "b2":
                        own[f"b2_{key}"] = value if whole else value[columns].view(mine.shape)
                    elif not number:
                        own[f"{name}_{key}"] = value
    return result
