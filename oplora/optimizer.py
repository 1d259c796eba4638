"""The MLP in the optimizer: OP-LoRA's updates from the gradients of a plain adapter.

z is a constant input, so the gradient of the MLP's parameters phi is J^T g, where g is the
gradient of the tensors that the MLP predicts. `step` gathers g, applies J^T, updates phi with
an ordinary torch optimizer and writes f(phi) back into the tensors. The model never sees the
MLP: its adapter stays a plain one, at every step.

`OPOptimizer` serves any torch.optim class; `oplora.adamw.OPAdamW` is the fast form for AdamW.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from oplora.blocks import BlockOptimizer, state_dtype
from oplora.checks import check_choice, check_optimizer
from oplora.shards import local, whole
from oplora.stack import MLPStack


class OPOptimizer(BlockOptimizer):
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
        warning, or "raise".
    """

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
        check_choice("edited", edited, ("absorb", "raise"))
        check_optimizer(optimizer_cls)
        if clip and not (isinstance(max_norm, int | float) and max_norm > 0):
            raise ValueError(f"max_norm={max_norm!r} must be a number above 0")
        self.clip, self.max_norm, self.nonfinite, self.edited = clip, max_norm, nonfinite, edited
        self.skipped_steps = 0
        mlp_options = dict(
            mlp_width=mlp_width,
            init=init,
            z_dim=z_dim,
            z_std=z_std,
            trunk_bias=trunk_bias,
            head_gain=head_gain,
            seed=seed,
            start=start,
        )
        super().__init__(params, optimizer_cls, mlp_options, optimizer_kwargs)

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
        for stack in self.stacks:
            if names := stack.absorb_edits(refuse=self.edited == "raise"):
                warnings.warn(
                    f"{len(names)} adapter tensors were changed from outside since the last step "
                    f"(first: {names[0]}); the MLPs go on from the new values",
                    stacklevel=2,
                )
        gradients = [stack.gradient() for stack in self.stacks]
        if not self._finite(gradients):
            self.skipped_steps += 1
            return loss
        trunks = [stack.backward(g) for stack, g in zip(self.stacks, gradients, strict=True)]
        if self.clip == "mlp":
            self._clip(gradients, trunks)
        groups = [self.inner.param_groups[number] for number in self._inner_group]
        members = [stack.participating() for stack in self.stacks]
        work = list(zip(self.stacks, members, gradients, groups, strict=True))
        for (stack, blocks, g, group), trunk in zip(work, trunks, strict=True):
            self._update(stack, blocks, g, trunk, group)
        self.inner.step()
        for index, inner in zip(self._outer, self.inner.param_groups, strict=True):
            # Prodigy keeps its learning rate in the groups
            self.param_groups[index].update({key: inner[key] for key in self.inner.defaults})
        for stack, blocks, g, group in work:
            self._predict(stack, blocks, g, group)
        self._trained = True
        return loss

    def _update(self, stack: MLPStack, members: list[int], g: Tensor, trunk: tuple, group: dict):
        """Hand the gradients of these blocks' MLPs to the inner optimizer."""
        rows, parts = stack.rows(stack.h), g.split(stack.sizes)
        gradients = stack.per_block(dict(zip(stack.stacked, (*trunk, g), strict=True)))
        for i in members:
            for name, tensor in stack.trunks[i].items():
                tensor.grad = gradients[i][name]
            stack.W2[i].grad = torch.outer(rows[i], parts[i])

    def _predict(self, stack: MLPStack, members: list[int], g: Tensor, group: dict):
        """Write what the updated MLPs of these blocks predict; g is lost."""
        stack.predict(members)
        for tensor in self._inner_parameters(stack):
            tensor.grad = None

    def _finite(self, gradients: list[Tensor]) -> bool:
        bad: list[str] = []
        for stack, g in zip(self.stacks, gradients, strict=True):
            # The sum is ten times as fast as isfinite(), but it may overflow.
            if stack.total(g).isfinite() or stack.total((~g.isfinite()).float()) == 0:
                continue
            parts = zip(stack.names, g.split(stack.sizes), strict=True)
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
            for name, tensor in zip(
                (n for block in names for n in block), group["params"], strict=True
            )
            if tensor.grad is not None
        }

    def _clip(self, gradients: list[Tensor], trunks: list[tuple]):
        direct = list(self._direct_gradients().values())
        norms = [
            s.squared_norm(g, t) for s, g, t in zip(self.stacks, gradients, trunks, strict=True)
        ]
        roots = [torch.linalg.vector_norm(g, dtype=state_dtype([g])) for g in direct]
        norm = sum([*norms, *(whole(root) ** 2 for root in roots)]) ** 0.5
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
        if not self._trained:
            self._follow_model()
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
        """Resume exactly; ValueError, with nothing changed, if the state is not of these MLPs."""
        self._follow_model()
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
                stack.check(i, entry["mlp"], entry["active"])
                entries.append((stack, i, entry))
        first = {id(block[0]) for stack in self.stacks for block in stack.blocks}
        if any("mlp" in state.get(index[id(p)], {}) for p in params if id(p) not in first):
            raise ValueError(
                "the state holds MLPs for tensors that are trained directly here (mlp_width=0)"
            )
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
