"""What the MLPs do in a training, block by block: how long a step is, and how much the trunk adds.

theta = W2ᵀ h + b2 is what a block's MLP predicts, g = dL/dtheta. As z is constant, a small step of
gradient descent moves theta along

    (1 + |h|²) g        by W2 and b2: the plain step, made longer
    W2_onᵀ W2_on g      by h: what the trunk learns, a line search

where W2_on are the rows of units that are on. `Diagnostics` writes their proportions down.
"""

import json
import math
import os
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback

from oplora.optimizer import OPOptimizer
from oplora.rows import ActiveRows
from oplora.scale import ScaleAdamW
from oplora.stack import MLPStack


@torch.no_grad()
def diagnose(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Of every block, from the gradients that its tensors hold before `optimizer.step()`:

    name: of its first tensor; h_squared: |h|²; multiplier: 1 + |h|_1 (`ScaleAdamW`, which has this
    alone: its learned s); units_on: how many h_j > 0; line_search_share: `line_search_share`, None
    without a gradient, and no such key under Lite, which does not keep W2.
    ValueError for an optimizer without MLPs and learned scales. Nothing is changed.
    """
    optimizer = _inside(optimizer)
    if isinstance(optimizer, ScaleAdamW):
        return _of_scales(optimizer)
    optimizer.follow_model()  # as its step would
    return [row for stack in optimizer.stacks for row in _of_stack(stack)]


def line_search_share(stack: MLPStack) -> Tensor:
    """|W2_onᵀ W2_on g| / (|W2_onᵀ W2_on g| + (1 + |h|²) |g|), of all blocks; NaN where g = 0."""
    tensors, rows = stack.tensors, stack.rows
    g = tensors.gather_gradient()
    dh = tensors.all_reduce(rows.backward(g.split(tensors.sizes))) * (stack.h > 0)
    line = torch.empty_like(g)
    for i, weights in enumerate(rows.weights(dh)):
        rows.predict(i, weights, line.split(tensors.sizes)[i])
    squares = ([x.square().sum() for x in v.split(tensors.sizes)] for v in (line, g))
    line, plain = (tensors.all_reduce(torch.stack(each)).sqrt() for each in squares)
    return line / (line + (1 + stack.h.square().sum(1)) * plain)


def _inside(optimizer: Optimizer) -> OPOptimizer | ScaleAdamW:
    found = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
    if isinstance(found, ScaleAdamW) or (isinstance(found, OPOptimizer) and found.stacks):
        return found
    raise ValueError(
        f"{type(found).__name__} has neither MLPs nor learned scales to diagnose: use OPAdamW, "
        "OPOptimizer or ScaleAdamW, or leave the diagnostics out"
    )


def _of_scales(optimizer: ScaleAdamW) -> list[dict[str, Any]]:
    scales, names = optimizer.scales(), []
    for group in filter(lambda group: group["scaled"], optimizer.param_groups):
        names += [group["param_names"][k] for k in accumulate(group["block_sizes"][:-1], initial=0)]
    return [{"name": name, "multiplier": scales[name]} for name in names]


def _of_stack(stack: MLPStack) -> list[dict[str, Any]]:
    h = stack.h
    found = {"h_squared": h.square().sum(1), "multiplier": 1 + h.sum(1), "units_on": (h > 0).sum(1)}
    if isinstance(stack.rows, ActiveRows):
        found["line_search_share"] = line_search_share(stack)
    known = ([v if math.isfinite(v) else None for v in each.tolist()] for each in found.values())
    rows = zip([names[0] for names in stack.tensors.names], *known, strict=True)
    return [dict(zip(("name", *found), row, strict=True)) for row in rows]


class Diagnostics(TrainerCallback):
    """HF Trainer callback: `diagnose` at the first step and every `logging_steps`.

    path: of JSON lines, one a step: {"step": …, "blocks": […]}, as in `history`; resume adds to it.
    """

    def __init__(self, path: str | Path):
        self.path, self.history = Path(path), []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        _inside(optimizer)
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []  # whole ones
        self.history = [e for e in map(json.loads, lines) if e["step"] <= state.global_step]
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in self.history))
            os.replace(partial, self.path)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if (step := state.global_step + 1) == 1 or step % state.logging_steps == 0:
            self.history.append({"step": step, "blocks": diagnose(optimizer)})
            if state.is_world_process_zero:
                with self.path.open("a") as file:  # one that is killed here leaves half a line
                    file.write(json.dumps(self.history[-1]) + "\n")
