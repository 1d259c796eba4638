"""State of an `oplora.optimizer.OPOptimizer` as tensors and numbers (loads with weights_only=True).

The entry of a block's first tensor holds {"mlp", "active", "inner"}: the MLP by the names of its
tensors, how many rows of W2 have moments, and the optimizer's state of the MLP's tensors. Entries
of directly trained tensors are the inner optimizer's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


def state_dict(optimizer, groups: dict[str, Any]) -> dict[str, Any]:
    """groups: what torch's own state_dict makes of the parameter groups."""
    if not optimizer.trained:
        optimizer.follow_model()
    number = {id(p): i for i, p in enumerate(_parameters(optimizer))}
    inner = optimizer.inner.state.items()
    state = {number[id(p)]: s for p, s in inner if id(p) in number}
    for part, i in _blocks(optimizer):
        state[number[id(part.stack.tensors.blocks[i][0])]] = {
            "mlp": part.stack.state(i),
            "active": part.stack.rows.active[i],
            "inner": optimizer.moments_of(part, i),
        }
    return {**groups, "state": state}


@torch.no_grad()
def load_state_dict(optimizer, saved: dict[str, Any], load_groups: Callable[[dict], None]):
    """ValueError, with nothing changed, if `saved` is not of these MLPs.

    load_groups: torch's own load_state_dict.
    """
    optimizer.follow_model()
    params = _parameters(optimizer)
    number = {id(p): i for i, p in enumerate(params)}
    state, entries = saved["state"], []
    for part, i in _blocks(optimizer):
        block = part.stack.tensors.blocks[i]
        entry = state.get(number[id(block[0])], {})
        if "mlp" not in entry:
            raise ValueError(
                f"the state holds no MLP for {part.stack.tensors.names[i][0]}: it was saved by an "
                "optimizer without MLPs, or with other blocks"
            )
        part.stack.check(i, entry["mlp"], entry["active"])
        entries.append((part, i, entry))
    first = {id(part.stack.tensors.blocks[i][0]) for part, i in _blocks(optimizer)}
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
        part.stack.load(i, entry["mlp"], entry["active"])
    optimizer.load_moments([(part, i, entry["inner"]) for part, i, entry in entries], others)
    for stack in changed:  # accelerate loads back what it has just saved
        stack.loaded()
    optimizer.trained |= bool(changed)


def load_inner(inner: Optimizer, states: dict[int, dict | None]):
    """Load states, by id of their tensors, as the optimizer itself does: it knows its dtypes."""
    flat = [p for group in inner.param_groups for p in group["params"]]
    packed = inner.state_dict()
    packed["state"] = {i: states[id(p)] for i, p in enumerate(flat) if states.get(id(p))}
    inner.load_state_dict(packed)


def _parameters(optimizer) -> list:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _blocks(optimizer) -> list[tuple]:
    """(part, number of a block) of all MLPs."""
    parts = [part for part in optimizer.parts if part.stack is not None]
    return [(part, i) for part in parts for i in range(len(part.stack.trunks))]
