"""Which tensors one MLP predicts, and the inner optimizer that trains the MLPs.

`BlockOptimizer` is `oplora.optimizer.OPOptimizer` without its step and its state.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from oplora.checks import check_tensor, places
from oplora.shards import local
from oplora.stack import MLPStack

INITIAL = ("init", "z_dim", "z_std", "trunk_bias", "head_gain")  # options of `initial_mlp`


class BlockOptimizer(Optimizer):
    """Parameter groups of blocks, a stack of MLPs for each, and an optimizer inside for these.

    params, mlp_options, optimizer_kwargs: `oplora.optimizer.OPOptimizer`.
    """

    _compact = False  # stacks keep all rows of W2, for any inner optimizer
    _stack_cls = MLPStack

    def __init__(
        self,
        params: Iterable,
        optimizer_cls: type[Optimizer],
        mlp_options: dict[str, Any],
        optimizer_kwargs: dict[str, Any],
    ):
        self._trained = False
        self.stacks: list[MLPStack] = []
        self._outer: list[int] = []  # for every inner group its group here
        self.inner = optimizer_cls([torch.zeros(1, 1)], **optimizer_kwargs)
        self.inner.param_groups.clear()
        self._inner_group: list[int] = []  # for every stack its inner group
        # for every group its tensors when the MLPs were built, the blocks' names and starts
        self._built: list[tuple[list[Tensor], list[list[str]], list]] = []
        super().__init__(params, {**self.inner.defaults, **mlp_options})

    def add_param_group(self, group: dict):
        """Add tensors, (name, tensor) pairs or blocks (lists of these) with their options."""
        index = len(self.param_groups)
        items = group["params"]
        items = [items] if isinstance(items, Tensor) else list(items)
        blocks, names = [], []
        for number, item in enumerate(items):
            pairs = [
                e if isinstance(e, tuple) else (f"group {index} tensor {number}.{k}", e)
                for k, e in enumerate(item if isinstance(item, list) else [item])
            ]
            names.append([name for name, _ in pairs])
            blocks.append([tensor for _, tensor in pairs])
        group = {**group, "params": [tensor for block in blocks for tensor in block]}
        width = group.get("mlp_width", self.defaults["mlp_width"])
        if not isinstance(width, int) or width < 0:
            raise ValueError(f"mlp_width={width!r} must be a positive integer (0: no MLP)")
        known = {
            place: name
            for group_of, (_, names_of, _) in zip(self.param_groups, self._built, strict=True)
            for tensor, name in zip(group_of["params"], chain(*names_of), strict=True)
            for place in places(tensor)
        }
        for block, block_names in zip(blocks, names, strict=True):
            for tensor, name in zip(block, block_names, strict=True):
                check_tensor(tensor, name, known)
        start = group.get("start", self.defaults["start"])
        starts = [start] * len(blocks) if isinstance(start, str) else list(start)
        if len(starts) != len(blocks):
            raise ValueError(f"start lists {len(starts)} blocks, the group has {len(blocks)}")
        super().add_param_group(group)
        del self.param_groups[index]["start"]
        self._built.append((list(group["params"]), names, starts))
        self._build(index, adopt=False)

    def _build(self, index: int, adopt: bool):
        """MLPs of one group; adopt: the tensors hold their output already (`MLPStack`)."""
        group = self.param_groups[index]
        tensors, names, starts = self._built[index]
        if not group["mlp_width"]:
            self._add_inner(index, group["params"])
            return
        unused = iter(tensors)
        blocks = [[next(unused) for _ in block_names] for block_names in names]
        kinds: dict[tuple, list[int]] = {}
        for i, block in enumerate(blocks):
            kinds.setdefault((local(block[0]).device, state_dtype(block)), []).append(i)
        for (_, dtype), members in kinds.items():
            stack = self._stack_cls(
                [blocks[i] for i in members],
                [names[i] for i in members],
                [starts[i] for i in members],
                width=group["mlp_width"],
                dtype=dtype,
                seed=group["seed"],
                compact=self._compact,
                adopt=adopt,
                **{key: group[key] for key in INITIAL},
            )
            for i, resolved in zip(members, stack.starts, strict=True):
                starts[i] = resolved
            self.stacks.append(stack)
            self._inner_group.append(len(self._outer))
            self._add_inner(index, self._inner_parameters(stack))

    def _add_inner(self, index: int, params: list[Tensor]):
        self.inner.add_param_group({"params": params})
        self._outer.append(index)

    def _inner_parameters(self, stack: MLPStack) -> list[Tensor]:
        trunks = [tensor for trunk in stack.trunks for tensor in trunk.values()]
        return trunks + stack.W2

    def _follow_model(self):
        """Build untrained MLPs again if the model moved or accelerate's FSDP2 replaced tensors."""
        groups = list(zip(self.param_groups, self._built, strict=True))
        replaced = any(
            new is not old
            for group, (tensors, _, _) in groups
            for new, old in zip(group["params"], tensors, strict=True)
        )
        moved = any(local(stack.tensors[0]).device != stack.device for stack in self.stacks)
        if not (replaced or moved):
            return
        if self._trained:
            raise RuntimeError(
                "the adapter's tensors were moved to another device or replaced between two "
                "steps: move and wrap the model before training and before load_state_dict"
            )
        for known in (self.stacks, self._outer, self._inner_group, self.inner.param_groups):
            known.clear()
        self._built = [(list(group["params"]), *rest) for group, (_, *rest) in groups]
        for index in range(len(groups)):
            self._build(index, adopt=True)

    # Report

    @property
    def adapter_parameters(self) -> int:
        """Values in the tensors that the MLPs predict: what is shipped."""
        return sum(t.numel() for stack in self.stacks for t in stack.tensors)

    @property
    def mlp_parameters(self) -> int:
        """Values in the MLPs: what is trained instead."""
        return sum(stack.mlp_parameters for stack in self.stacks)

    def state_bytes(self) -> int:
        """Bytes of MLPs and optimizer state on this rank now."""
        mlp = [t for stack in self.stacks for t in stack.held()]
        mine = [(s, i) for s in self.stacks for i in range(len(s.blocks))]
        stateful = [*self.inner.state, *(t for s, i in mine for t in self._stateful(s, i).values())]
        states = {id(t): self._state_of(t) for t in stateful}.values()
        moments = [t for state in states for t in state.values() if torch.is_tensor(t)]
        return sum(t.numel() * t.element_size() for t in mlp + moments)

    def __repr__(self) -> str:
        starts: dict[str, int] = {}
        for stack in self.stacks:
            for start in stack.starts:
                kind = next((k for k in ("random", "keep") if k in start), "still")
                kind = "paper" if kind == "random" else kind
                starts[kind] = starts.get(kind, 0) + 1
        chosen = ", ".join(f"{count} start={kind!r}" for kind, count in starts.items())
        direct = sum(len(g["params"]) for g in self.param_groups if not g["mlp_width"])
        lines = [
            f"{type(self).__name__}({type(self.inner).__name__}, blocks: {chosen or 'none'}; "
            f"{self.adapter_parameters:,} adapter values from {self.mlp_parameters:,} MLP "
            f"parameters; {direct} tensors trained directly)"
        ]
        keys = [*self.inner.defaults, "mlp_width"]
        for group in self.param_groups:
            lines.append("  " + ", ".join(f"{key}={group[key]}" for key in keys))
        return "\n".join(lines)


def state_dtype(block: list[Tensor]) -> torch.dtype:
    """fp32 under bf16 and fp16 adapters: an MLP's small steps would be lost there."""
    return torch.float64 if any(t.dtype == torch.float64 for t in block) else torch.float32
