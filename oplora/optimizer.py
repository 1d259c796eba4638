"""The MLP in the optimizer: OP-LoRA's updates from the gradients of a plain adapter.

z is a constant input, so the gradient of the MLP's parameters phi is J^T g, where g is the
gradient of the tensors that the MLP predicts. `step` gathers g, applies J^T, updates phi with
an ordinary torch optimizer and writes f(phi) back into the tensors. The model never sees the
MLP: its adapter stays a plain one, at every step.

`OPOptimizer` serves any torch.optim class; `oplora.adamw.OPAdamW` is the fast form for AdamW.
"""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from oplora.checks import check_choice, check_tensor
from oplora.stack import MLPStack, local

_MLP_OPTIONS = ("mlp_width", "z_dim", "z_init", "kaiming_a", "seed", "start")


class OPOptimizer(Optimizer):
    """`optimizer_cls` on MLPs that predict the given tensors (OP-LoRA, section 4).

    params: as for any torch optimizer, tensors or (name, tensor) pairs or groups of them, each
    tensor with an MLP of its own; or lists of these: a list is a block, predicted by one MLP.
    A group with `mlp_width=0` is trained directly, as without this class.
    mlp_width, z_dim, z_init, kaiming_a: `oplora.mlp.initial_mlp`; may differ between groups.
    start: "keep", "paper" (`oplora.mlp.resolve_starts`) or a list with one start per tensor for
        every block. Tensors that start at zero always get zero rows of W2.
    seed: with the tensors' names it fixes the MLPs' initial weights.
    clip: "mlp" clips the gradient norm of all MLPs and directly trained tensors at `max_norm`,
        as clip_grad_norm_ does where the MLPs are modules; None leaves clipping to the trainer.
    nonfinite: "raise" (FloatingPointError naming the block; nothing is changed) or "skip" (the
        whole step, counted in `skipped_steps`).
    edited: "absorb" values written into the tensors from outside (load_adapter, a merge), with a
        warning, or "raise".
    """

    _compact = False  # stacks keep the gradient of the whole W2

    def __init__(
        self,
        params: Iterable,
        optimizer_cls: type[Optimizer] = torch.optim.AdamW,
        *,
        mlp_width: int = 32,
        z_dim: int = 128,
        z_init: str = "normal",
        kaiming_a: float = math.sqrt(5),
        start: str | list[list[str]] = "keep",
        seed: int = 0,
        clip: str | None = None,
        max_norm: float = 1.0,
        nonfinite: str = "raise",
        edited: str = "absorb",
        **optimizer_kwargs: Any,
    ):
        check_choice("clip", clip, (None, "mlp"))
        check_choice("nonfinite", nonfinite, ("raise", "skip"))
        check_choice("edited", edited, ("absorb", "raise"))
        if issubclass(optimizer_cls, torch.optim.LBFGS):
            raise ValueError("LBFGS evaluates the loss within a step: use a first-order optimizer")
        if hasattr(optimizer_cls, "eval"):
            raise ValueError(
                f"{optimizer_cls.__name__} evaluates other weights than it trains (schedule-free), "
                "which the MLPs cannot follow: use AdamW, or train the adapter directly"
            )
        self.clip, self.max_norm, self.nonfinite, self.edited = clip, max_norm, nonfinite, edited
        self.skipped_steps = 0
        self._trained = False
        self.stacks: list[MLPStack] = []
        self._outer: list[int] = []  # for every inner group its group here
        self.inner = optimizer_cls([torch.zeros(1, 1)], **optimizer_kwargs)
        self.inner.param_groups.clear()
        self._inner_group: list[int] = []  # for every stack its inner group
        # for every group its tensors when the MLPs were built, the blocks' names and starts
        self._built: list[tuple[list[Tensor], list[list[str]], list]] = []
        options = (mlp_width, z_dim, z_init, kaiming_a, seed, start)
        defaults = {**self.inner.defaults, **dict(zip(_MLP_OPTIONS, options, strict=True))}
        super().__init__(params, defaults)

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
        known = {id(t) for g in self.param_groups for t in g["params"]}
        for block, block_names in zip(blocks, names, strict=True):
            for tensor, name in zip(block, block_names, strict=True):
                check_tensor(tensor, name, known)
        super().add_param_group(group)
        start = self.param_groups[index].pop("start")
        starts = [start] * len(blocks) if isinstance(start, str) else list(start)
        if len(starts) != len(blocks):
            raise ValueError(f"start lists {len(starts)} blocks, the group has {len(blocks)}")
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
            kinds.setdefault((local(block[0]).device, _state_dtype(block)), []).append(i)
        for (_, dtype), members in kinds.items():
            stack = MLPStack(
                [blocks[i] for i in members],
                [names[i] for i in members],
                [starts[i] for i in members],
                width=group["mlp_width"],
                dtype=dtype,
                seed=group["seed"],
                compact=self._compact,
                adopt=adopt,
                **{key: group[key] for key in ("z_dim", "z_init", "kaiming_a")},
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

    # The step

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_model()
        for index, inner in zip(self._outer, self.inner.param_groups, strict=True):
            outer = self.param_groups[index]
            inner.update({key: outer[key] for key in self.inner.defaults})
        gradients = [stack.gradient() for stack in self.stacks]
        if not self._finite(gradients):
            self.skipped_steps += 1
            return loss
        for stack in self.stacks:
            if names := stack.absorb_edits(refuse=self.edited == "raise"):
                warnings.warn(
                    f"{len(names)} adapter tensors were changed from outside since the last step "
                    f"(first: {names[0]}); the MLPs go on from the new values",
                    stacklevel=2,
                )
        trunks = [stack.backward(g) for stack, g in zip(self.stacks, gradients, strict=True)]
        if self.clip == "mlp":
            self._clip(gradients, trunks)
        work = zip(self.stacks, self._inner_group, gradients, trunks, strict=True)
        for stack, number, g, (dz, dW1, db1) in work:
            group = self.inner.param_groups[number]
            parts = g.split(stack.sizes)
            for i in stack.participating():
                gradient = dict(z=dz[i], W1=dW1[i], b1=db1[i], b2=parts[i])
                for name, tensor in stack.trunks[i].items():
                    tensor.grad = gradient[name]
                self._update_W2(stack, i, parts[i], group)
        self.inner.step()
        for index, inner in zip(self._outer, self.inner.param_groups, strict=True):
            # Prodigy keeps its learning rate in the groups
            self.param_groups[index].update({key: inner[key] for key in self.inner.defaults})
        for stack in self.stacks:
            stack.predict(stack.participating())
            for tensor in self._inner_parameters(stack):
                tensor.grad = None
        self._trained = True
        return loss

    def _update_W2(self, stack: MLPStack, i: int, g: Tensor, group: dict):
        """Hand the gradient of W2 to the inner optimizer."""
        stack.W2[i].grad = torch.outer(stack.rows(i), g)

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

    def _finite(self, gradients: list[Tensor]) -> bool:
        for stack, g in zip(self.stacks, gradients, strict=True):
            finite = g.isfinite().all().float()
            if stack._all_reduce(finite - 1) < 0:
                bad = [
                    names[0]
                    for names, part in zip(stack.names, g.split(stack.sizes), strict=True)
                    if not part.isfinite().all()
                ]
                if self.nonfinite == "raise":
                    raise FloatingPointError(
                        f"NaN or Inf in the gradient of {', '.join(bad[:3]) or 'another rank'}: "
                        "nothing was updated. Lower the learning rate, or use nonfinite='skip'"
                    )
                return False
        return True

    def _clip(self, gradients: list[Tensor], trunks: list[tuple]):
        direct = [
            p.grad
            for group in self.param_groups
            if not group["mlp_width"]
            for p in group["params"]
            if p.grad is not None
        ]
        norms = [
            s.squared_norm(g, t) for s, g, t in zip(self.stacks, gradients, trunks, strict=True)
        ]
        roots = [torch.linalg.vector_norm(g, dtype=_state_dtype([g])) for g in direct]
        roots = [r.full_tensor() if isinstance(r, DTensor) else r for r in roots]
        norm = sum([*norms, *(root**2 for root in roots)]) ** 0.5
        scale = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        flat = [t for trunk in trunks for t in trunk]
        for tensor in [*gradients, *flat, *direct]:
            local(tensor).mul_(scale)

    # State

    def state_dict(self) -> dict[str, Any]:
        """MLPs and moments, as tensors and numbers only (loads with weights_only=True).

        The entry of a block's first tensor holds {"mlp", "active", "inner"}; entries of directly
        trained tensors are the inner optimizer's.
        """
        result = super().state_dict()
        index = {id(p): i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        state = {index[id(p)]: s for p, s in self.inner.state.items() if id(p) in index}
        for stack in self.stacks:
            for i, block in enumerate(stack.blocks):
                state[index[id(block[0])]] = {
                    "mlp": stack.state(i),
                    "active": stack.active[i],
                    "inner": {
                        name: state_of
                        for name, tensor in self._stateful(stack, i).items()
                        if (state_of := self._state_of(tensor))
                    },
                }
        return {**result, "state": state}

    def _stateful(self, stack: MLPStack, i: int) -> dict[str, Tensor]:
        return {**stack.trunks[i], "W2": stack.W2[i]}

    def _state_of(self, tensor: Tensor) -> dict:
        return self.inner.state.get(tensor, {})

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]):
        """Resume exactly; ValueError, with nothing changed, if the MLPs have another shape."""
        params = [p for g in self.param_groups for p in g["params"]]
        index = {id(p): i for i, p in enumerate(params)}
        state = state_dict["state"]
        entries = []
        for stack in self.stacks:
            for i, block in enumerate(stack.blocks):
                entry = state.get(index[id(block[0])], {})
                if "mlp" not in entry:
                    raise ValueError(
                        f"the state holds no MLP for {stack.names[i][0]}: it was saved by an "
                        "optimizer without MLPs, or with other blocks"
                    )
                stack.check(i, entry["mlp"])
                entries.append((stack, i, entry))
        super().load_state_dict({**state_dict, "state": {}})
        loaded = {id(p): state[index[id(p)]] for p in params if index[id(p)] in state}
        changed = set()
        for stack, i, entry in entries:
            mine = stack.state(i)
            if not all(torch.equal(entry["mlp"][n].to(t), t) for n, t in mine.items()):
                changed.add(stack)
            stack.load(i, entry["mlp"], entry["active"])
            for name, tensor in self._stateful(stack, i).items():
                loaded[id(tensor)] = entry["inner"].get(name)
        self._load_inner({key: value for key, value in loaded.items() if value})
        for stack in changed:  # accelerate loads back what it has just saved
            stack.loaded()
        self._trained |= bool(changed)

    def _load_inner(self, state: dict[int, dict]):
        """Through the inner optimizer's own loading, which knows its dtypes and devices."""
        flat = [p for g in self.inner.param_groups for p in g["params"]]
        packed = self.inner.state_dict()
        packed["state"] = {i: state[id(p)] for i, p in enumerate(flat) if id(p) in state}
        self.inner.load_state_dict(packed)

    # Report

    @property
    def adapter_parameters(self) -> int:
        """Values in the tensors that the MLPs predict: what is shipped."""
        return sum(t.numel() for stack in self.stacks for t in stack.tensors)

    @property
    def mlp_parameters(self) -> int:
        """Values in the MLPs: what is trained instead."""
        return sum(
            t.numel()
            for stack in self.stacks
            for t in [stack.z, stack.W1, stack.b1, stack.b2, *stack.W2]
        )

    def state_bytes(self) -> int:
        """Bytes of MLPs and optimizer state on this rank now."""
        mlp = [t for s in self.stacks for t in [s.z, s.W1, s.b1, s.b2, *s.W2]]
        stateful = [*self.inner.state, *(W2 for s in self.stacks for W2 in s.W2)]
        states = {id(t): self._state_of(t) for t in stateful}.values()
        moments = [t for state in states for t in state.values() if torch.is_tensor(t)]
        return sum(t.numel() * t.element_size() for t in mlp + moments)

    def __repr__(self) -> str:
        starts: dict[str, int] = {}
        for stack in self.stacks:
            for start in stack.starts:
                kind = "paper" if "random" in start else "keep"
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


def _state_dtype(block: list[Tensor]) -> torch.dtype:
    """fp32 under bf16 and fp16 adapters: an MLP's small steps would be lost there."""
    return torch.float64 if any(t.dtype == torch.float64 for t in block) else torch.float32
