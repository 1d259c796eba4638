"""The MLP in the optimizer: OP-LoRA's updates from the gradients of a plain adapter.

z is a constant input, so the gradient of the MLP's parameters phi is J^T g, where g is the
gradient of the tensors that the MLP predicts. `step` gathers g, applies J^T, updates phi with
an ordinary torch optimizer and writes f(phi) back into the tensors. The model never sees the
MLP: its adapter stays a plain one, at every step.

`OPOptimizer` serves any torch.optim class; `oplora.adamw.OPAdamW` is the fast form for AdamW.
"""

import difflib
import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from oplora import dcp, saving
from oplora.arguments import blocks_of, check_choice, check_optimizer
from oplora.stack import MLPStack
from oplora.tensors import check_tensor, local, places, state_dtype, whole

INITIAL = ("init", "z_dim", "z_std", "trunk_bias", "head_gain")  # options of `initial_mlp`


@dataclass
class Part:
    """What one group of the inner optimizer trains: the MLPs of a stack, or tensors directly."""

    group: int  # number of the group that it belongs to
    stack: MLPStack | None = None
    moments: Any = None  # the MLPs' AdamW moments, where the inner optimizer does not keep them


@dataclass
class Work:
    """One step of one stack: which blocks, the gradient of theta, and those of z, W1 and b1."""

    part: Part
    members: list[int]
    g: Tensor
    trunk: tuple[Tensor, Tensor, Tensor] | None = None


class OPOptimizer(Optimizer):
    """`optimizer_cls` on MLPs that predict the given tensors (OP-LoRA, section 4).

    params: as for any torch optimizer, tensors or (name, tensor) pairs or groups of them, each
    tensor with an MLP of its own; or lists of these: a list is a block, predicted by one MLP.
    A group with `mlp_width=0` is trained directly, as without this class.
    mlp_width, init, z_dim, z_std, trunk_bias, head_gain: `oplora.mlp.initial_mlp`; may differ
        between groups.
    start: "keep", "still", "paper" (`oplora.mlp.resolve_starts`) or a list with one start per
        tensor for every block.
    seed: with the tensors' names it fixes the MLPs' initial weights.
    clip: "mlp" clips the gradient norm of all MLPs and directly trained tensors at `max_norm`,
        as clip_grad_norm_ does where the MLPs are modules; None leaves clipping to the trainer.
    nonfinite: "raise" (FloatingPointError naming the block; nothing is updated) or "skip" (the
        whole step, counted in `skipped_steps`).
    edited: "absorb" values written into the tensors from outside (load_adapter, a merge), with a
        warning, "quiet" without one (code that edits every step), or "raise".
    """

    rows = "every"  # the form of W2 (`oplora.rows`): all rows, for any inner optimizer

    def __init__(
        self,
        params: Iterable,
        optimizer_cls: type[Optimizer] = torch.optim.AdamW,
        *,
        mlp_width: int = 32,
        init: str = "author",
        z_dim: int = 128,
        z_std: float | None = None,
        trunk_bias: bool | None = None,
        head_gain: float = 1.0,
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
        check_choice("edited", edited, ("absorb", "quiet", "raise"))
        check_optimizer(optimizer_cls)
        if clip and not (isinstance(max_norm, int | float) and max_norm > 0):
            raise ValueError(f"max_norm={max_norm!r} must be a number above 0")
        self.clip, self.max_norm, self.nonfinite, self.edited = clip, max_norm, nonfinite, edited
        self.skipped_steps = 0
        self.trained = False  # has a step been made, or a state been loaded?
        self.parts: list[Part] = []
        self.stacks: list[MLPStack] = []  # those of the parts
        # for every group its tensors when the MLPs were built, the blocks' names and starts
        self._built: list[tuple[list[Tensor], list[list[str]], list]] = []
        self.inner = _inner_optimizer(optimizer_cls, optimizer_kwargs)
        self.inner.param_groups.clear()
        initial = (init, z_dim, z_std, trunk_bias, head_gain)
        mlp = dict(zip(INITIAL, initial, strict=True), mlp_width=mlp_width, seed=seed, start=start)
        super().__init__(params, {**self.inner.defaults, **mlp})

    # The step

    @torch.compiler.disable  # as torch's own optimizers where they cannot be compiled
    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.follow_model()
        kind = self.stacks[0].tensors.device.type if self.stacks else "cpu"
        with torch.autocast(kind, enabled=False):  # Lightning's step is within the model's
            self._step()
        return loss

    def _step(self):
        self._absorb_edits()
        work = [
            Work(part, part.stack.tensors.with_gradients(), part.stack.tensors.gather_gradient())
            for part in self.parts
            if part.stack is not None
        ]
        if not self._finite(work):
            self.skipped_steps += 1
            return
        for each in work:
            each.trunk = each.part.stack.backward(each.g)
        if self.clip == "mlp":
            self._clip(work)
        groups = [self.param_groups[part.group] for part in self.parts]
        for outer, inner in zip(groups, self.inner.param_groups, strict=True):
            inner.update({key: outer[key] for key in self.inner.defaults})
        self._train([each for each in work if each.members])
        for outer, inner in zip(groups, self.inner.param_groups, strict=True):
            # Prodigy keeps its learning rate in the groups
            outer.update({key: inner[key] for key in self.inner.defaults})
        self.trained = True

    def _train(self, work: list[Work]):
        """Update the MLPs and what is trained directly; write what the MLPs predict."""
        for each in work:
            stack = each.part.stack
            gradients = stack.per_block(
                dict(zip(stack.stacked, (*each.trunk, each.g), strict=True))
            )
            factors, gs = stack.rows.factors(stack.h), each.g.split(stack.tensors.sizes)
            for i in each.members:
                for name, tensor in stack.trunks[i].items():
                    tensor.grad = gradients[i][name]
                stack.rows.W2[i].grad = torch.outer(factors[i], gs[i])
        self.inner.step()
        for each in work:
            each.part.stack.predict(each.members)
            for tensor in self._inner_parameters(each.part.stack):
                tensor.grad = None

    def _absorb_edits(self):
        for stack in self.stacks:
            names = stack.absorb_edits(refuse=self.edited == "raise")
            if names and self.edited == "absorb":
                warnings.warn(
                    f"{len(names)} adapter tensors were changed from outside since the last step "
                    f"(first: {names[0]}); the MLPs go on from the new values",
                    stacklevel=4,
                )

    def _finite(self, work: list[Work]) -> bool:
        """Are all gradients finite? If not, and nonfinite="raise", FloatingPointError."""
        bad: list[str] = []
        for each in work:
            tensors, g = each.part.stack.tensors, each.g
            # The sum is ten times as fast as isfinite(), but it may overflow.
            if tensors.total(g).isfinite() or tensors.total((~g.isfinite()).float()) == 0:
                continue
            parts = zip(tensors.names, g.split(tensors.sizes), strict=True)
            bad += [names[0] for names, part in parts if not part.isfinite().all()] or [
                "another rank's block"
            ]
        direct = self._direct_gradients()
        sums = [whole(g.sum(dtype=state_dtype([g]))) for g in direct.values()]
        if sums and not sum(sums).isfinite():
            bad += [name for name, g in direct.items() if not whole(g.isfinite().all())]
        if bad and self.nonfinite == "raise":
            raise FloatingPointError(
                f"NaN or Inf in the gradient of {', '.join(bad[:3])}: "
                "nothing was updated. Lower the learning rate, or use nonfinite='skip'"
            )
        return not bad

    def _direct_gradients(self) -> dict[str, Tensor]:
        """Gradients of the tensors that are trained without MLPs, by name."""
        return {
            name: tensor.grad
            for group, (_, names, _) in zip(self.param_groups, self._built, strict=True)
            if not group["mlp_width"]
            for name, tensor in zip(chain(*names), group["params"], strict=True)
            if tensor.grad is not None
        }

    def _clip(self, work: list[Work]):
        direct = list(self._direct_gradients().values())
        norms = [each.part.stack.squared_norm(each.g, each.trunk) for each in work]
        roots = [torch.linalg.vector_norm(g, dtype=state_dtype([g])) for g in direct]
        norm = sum([*norms, *(whole(root) ** 2 for root in roots)]) ** 0.5
        scale = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        for tensor in [*chain(*((each.g, *each.trunk) for each in work)), *direct]:
            local(tensor).mul_(scale)

    # Groups

    def add_param_group(self, group: dict):
        """Add tensors, (name, tensor) pairs or blocks (lists of these) with their options."""
        index = len(self.param_groups)
        blocks, names = blocks_of(group["params"], f"group {index}")
        group = {**group, "params": list(chain(*blocks))}
        width = group.get("mlp_width", self.defaults["mlp_width"])
        if not isinstance(width, int) or width < 0:
            raise ValueError(f"mlp_width={width!r} must be a positive integer (0: no MLP)")
        known = {
            place: name
            for group_of, (_, names_of, _) in zip(self.param_groups, self._built, strict=True)
            for tensor, name in zip(group_of["params"], chain(*names_of), strict=True)
            for place in places(tensor)
        }
        for tensor, name in zip(group["params"], chain(*names), strict=True):
            check_tensor(tensor, name, known)
        start = group.get("start", self.defaults["start"])
        starts = [start] * len(blocks) if isinstance(start, str) else list(start)
        if len(starts) != len(blocks):
            raise ValueError(f"start lists {len(starts)} blocks, the group has {len(blocks)}")
        super().add_param_group(group)
        del self.param_groups[index]["start"]
        self._built.append((list(group["params"]), names, starts))
        self._build(index, already_written=False)

    def _build(self, index: int, already_written: bool):
        """The parts of one group; already_written: as in `MLPStack`."""
        group = self.param_groups[index]
        tensors, names, starts = self._built[index]
        if not group["mlp_width"]:
            self._add_part(index, group["params"])
            return
        unused = iter(tensors)
        blocks = [[next(unused) for _ in block_names] for block_names in names]
        kinds: dict[tuple, list[int]] = {}
        for i, block in enumerate(blocks):
            kinds.setdefault((local(block[0]).device, state_dtype(block)), []).append(i)
        for (_, dtype), members in kinds.items():
            stack = MLPStack(
                *([each[i] for i in members] for each in (blocks, names, starts)),
                width=group["mlp_width"],
                dtype=dtype,
                seed=group["seed"],
                restarts=group.get("restarts", 0),
                rows=self.rows,
                already_written=already_written,
                **{key: group[key] for key in INITIAL},
            )
            for i, resolved in zip(members, stack.starts, strict=True):
                starts[i] = resolved
            self._add_part(index, self._inner_parameters(stack), stack)

    def _add_part(self, index: int, params: list[Tensor], stack: MLPStack | None = None):
        self.inner.add_param_group({"params": params})
        self.parts.append(Part(index, stack))
        if stack is not None:
            self.stacks.append(stack)

    def _inner_parameters(self, stack: MLPStack) -> list[Tensor]:
        """Tensors of the MLPs that the inner optimizer trains."""
        return [tensor for trunk in stack.trunks for tensor in trunk.values()] + stack.rows.W2

    def follow_model(self):
        """Build untrained MLPs again if the model moved or accelerate's FSDP2 replaced tensors."""
        groups = list(zip(self.param_groups, self._built, strict=True))
        replaced = any(
            new is not old
            for group, (tensors, _, _) in groups
            for new, old in zip(group["params"], tensors, strict=True)
        )
        places = [(stack.tensors.flat[0].device, stack.tensors.device) for stack in self.stacks]
        moved = any(now != built for now, built in places)
        if not (replaced or moved):
            return
        if self.trained:
            raise RuntimeError(
                "the adapter's tensors were moved to another device or replaced between two "
                "steps: move and wrap the model before training and before load_state_dict"
            )
        self._built = [(list(group["params"]), *rest) for group, (_, *rest) in groups]
        self._build_all(already_written=True)

    def _build_all(self, already_written: bool):
        self.parts.clear()
        self.stacks.clear()
        self.inner.param_groups.clear()
        for index in range(len(self.param_groups)):
            self._build(index, already_written)

    @torch.no_grad()
    def restart(self, number: int):
        """New MLPs without moments for what the tensors hold now, as at the start (chains of LoRA).

        number: of the restart; with the seed it fixes the new MLPs, and is part of the state.
        """
        for group in self.param_groups:
            group["restarts"] = number
        direct = {p for g in self.param_groups if not g["mlp_width"] for p in g["params"]}
        for tensor in list(self.inner.state):
            if tensor not in direct:
                del self.inner.state[tensor]
        self._build_all(already_written=False)

    # State

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """For every tensor the optimizer's state of its part of the MLP, as views: in place alone.

        "exp_avg" and the like are those of its columns of W2, (rows, *shape of the tensor);
        "b2_exp_avg", … those of b2; a block's first tensor has those of z, W1 and b1, too.
        """
        if dcp.asks():
            return {tensor: {dcp.KEY: {}} for tensor in self.tensors()}
        return saving.state_by_tensor(self)

    @state.setter
    def state(self, _):
        """torch's constructor and its loading assign what `inner` and the parts hold here."""

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the groups."""
        return [tensor for group in self.param_groups for tensor in group["params"]]

    def blocks(self) -> list[tuple[Part, int]]:
        """Part and number of the block of all MLPs."""
        parts = [part for part in self.parts if part.stack is not None]
        return [(part, i) for part in parts for i in range(len(part.stack.trunks))]

    def tensor_names(self) -> list[str]:
        """Names of all tensors, in the order of the groups."""
        return [name for _, names, _ in self._built for name in chain(*names)]

    def reset_moments(self):
        """Forget the inner optimizer's moments and steps; the MLPs stay as they are (ReLoRA)."""
        self.inner.state.clear()
        for part in self.parts:
            part.moments = None

    def __reduce_ex__(self, protocol):
        raise TypeError(
            f"{type(self).__name__} cannot be copied, pickled or saved whole, as its MLPs belong "
            "to the tensors of one model: save state_dict(), and load it into one built anew"
        )

    def state_dict(self) -> dict[str, Any]:
        """MLPs and moments, as tensors and numbers only (`oplora.saving`, for DCP `oplora.dcp`)."""
        return saving.state_dict(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]):
        """Resume exactly; ValueError, with nothing changed, if the state is not of these MLPs."""
        saving.load_state_dict(self, state_dict, super().load_state_dict)

    def mlp_tensors(self, part: Part, i: int) -> dict[str, Tensor]:
        """The tensors of block i's MLP, by name."""
        return {**part.stack.trunks[i], "W2": part.stack.rows.W2[i]}

    def moments_of(self, part: Part, i: int) -> dict[str, dict]:
        """State of the optimizer for the MLP of block i, by the names of its tensors."""
        tensors = self.mlp_tensors(part, i).items()
        found = {name: self.inner.state.get(tensor, {}) for name, tensor in tensors}
        return {name: state for name, state in found.items() if state}

    def load_moments(self, saved: list[tuple[Part, int, dict[str, dict]]], direct: dict[int, dict]):
        """Inverse of `moments_of` for all blocks; direct: by id, of directly trained tensors."""
        states = dict(direct)
        for part, i, moments in saved:
            tensors = self.mlp_tensors(part, i).items()
            states |= {id(tensor): moments.get(name) for name, tensor in tensors}
        saving.load_inner(self.inner, states)

    # Report

    @property
    def adapter_parameters(self) -> int:
        """Values in the tensors that the MLPs predict: what is shipped."""
        return sum(t.numel() for stack in self.stacks for t in stack.tensors.flat)

    @property
    def mlp_parameters(self) -> int:
        """Values in the MLPs: what is trained instead."""
        return sum(stack.mlp_parameters for stack in self.stacks)

    def state_bytes(self) -> int:
        """Bytes of MLPs and optimizer state on this rank now."""
        mlp = [tensor for stack in self.stacks for tensor in stack.in_memory()]
        states = [s for part, i in self.blocks() for s in self.moments_of(part, i).values()]
        own = {id(t) for stack in self.stacks for t in self._inner_parameters(stack)}
        states += [state for tensor, state in self.inner.state.items() if id(tensor) not in own]
        moments = [t for state in states for t in state.values() if torch.is_tensor(t)]
        return sum(t.numel() * t.element_size() for t in mlp + moments)

    def __repr__(self) -> str:
        starts: dict[str, int] = {}
        for start in chain(*(stack.starts for stack in self.stacks)):
            kind = next((kind for kind in ("random", "keep") if kind in start), "still")
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


def _inner_optimizer(cls: type[Optimizer], kwargs: dict[str, Any]) -> Optimizer:
    """TypeError for an argument that neither cls nor `OPOptimizer` knows, with a near name."""
    takes = inspect.signature(cls).parameters
    known = {*takes, *inspect.signature(OPOptimizer).parameters}
    anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    for name in () if anything else kwargs:
        if name not in takes:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise TypeError(f"{name}={kwargs[name]!r} is no argument of {cls.__name__}{hint}")
    return cls([torch.zeros(1, 1)], **kwargs)
