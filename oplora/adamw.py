"""AdamW on MLPs without ever forming the gradient of W2: OP-LoRA at the price of its W2."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from oplora.optimizer import OPOptimizer
from oplora.rank1 import adamw_, foreach_rank1_adamw_
from oplora.stack import MLPStack


class OPAdamW(OPOptimizer):
    """AdamW on MLPs that predict the given tensors: OP-LoRA at the price of its W2.

    Equal to `OPOptimizer(params, torch.optim.AdamW, …)`, but the rank-1 gradient h ⊗ g of W2 is
    formed a few rows at a time in a scratch that stays in cache, moments exist only for rows
    whose unit was ever on (about half of them), and z, W1, b1 and b2 of all blocks are updated
    in one call. fused, foreach: accepted as AdamW's, but it has its own form. Other arguments:
    `OPOptimizer`.
    """

    _compact = True

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        foreach: bool | None = None,
        **mlp_options: Any,
    ):
        self._states: dict[int, dict[str, Tensor]] = {}  # by id of a tensor: step and moments
        self._uneven: set[MLPStack] = set()  # whose blocks have made different numbers of steps
        adam = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, torch.optim.AdamW, **adam, fused=True, **mlp_options)

    def add_param_group(self, group: dict):
        if group.get("amsgrad", self.defaults.get("amsgrad")):
            raise ValueError(
                "amsgrad needs the whole gradient of W2: use "
                "oplora.OPOptimizer(params, torch.optim.AdamW, amsgrad=True)"
            )
        super().add_param_group(group)

    def _inner_parameters(self, stack: MLPStack) -> list[Tensor]:
        return []

    def _update(self, stack: MLPStack, members: list[int], g: Tensor, trunk: tuple, group: dict):
        """AdamW on everything but W2."""
        if not members:
            return
        if id(stack.z) not in self._states:
            self._allocate(stack)
        if len(members) < len(stack.blocks):
            self._uneven.add(stack)
        torch._foreach_add_([self._state_of(stack.trunks[i]["z"])["step"] for i in members], 1)
        gradients = dict(zip(stack.stacked, [*trunk, g], strict=True))
        chosen = [(stack.stacked, gradients)]
        if stack in self._uneven:
            by_block = stack.per_block(gradients)
            chosen = [(stack.trunks[i], by_block[i]) for i in members]
        tensors = [tensor for tensors, _ in chosen for tensor in tensors.values()]
        gradients = [gradient for _, gradients in chosen for gradient in gradients.values()]
        states = [self._state_of(tensor) for tensor in tensors]
        adamw_(tensors, gradients, **_lists(states), **_options(group))

    def _predict(self, stack: MLPStack, members: list[int], g: Tensor, group: dict):
        """AdamW on W2, and what the MLP predicts with it while it is in the cache."""
        if not members:
            return
        before = stack.h
        stack.refresh()
        if group["weight_decay"]:
            stack.decay(members, 1 - group["lr"] * group["weight_decay"])
        rows, gs = stack.rows(before), g.split(stack.sizes)
        foreach_rank1_adamw_(
            [stack.W2[i] for i in members],
            hs=[rows[i] for i in members],
            gs=[gs[i] for i in members],
            updated=lambda k: stack.output(members[k]),
            **_lists([self._state_of_W2(stack, i) for i in members]),
            **_options(group),
        )
        stack.write(members)

    # State

    def _allocate(self, stack: MLPStack):
        """Zero moments of all blocks together, and the same block by block."""
        steps = [torch.zeros((), device=stack.device) for _ in stack.blocks]
        moments = [
            {name: torch.zeros_like(tensor) for name, tensor in stack.stacked.items()}
            for _ in range(2)
        ]
        whole = (steps[0], stack.stacked, *moments)
        by_block = zip(steps, stack.trunks, *map(stack.per_block, moments), strict=True)
        for step, tensors, exp_avg, exp_avg_sq in [whole, *by_block]:
            for name, tensor in tensors.items():
                state = dict(step=step, exp_avg=exp_avg[name], exp_avg_sq=exp_avg_sq[name])
                self._states[id(tensor)] = state

    def _state_of_W2(self, stack: MLPStack, i: int) -> dict[str, Tensor]:
        """Moments of the rows of W2 that were ever on; new rows start at zero."""
        W2, n = stack.W2[i], stack.active[i]
        state = self._states.get(id(W2))
        if state is None:
            step, empty = self._state_of(stack.trunks[i]["z"])["step"], W2.new_zeros(0, W2.shape[1])
            state = self._states[id(W2)] = dict(step=step, exp_avg=empty, exp_avg_sq=empty)
        if missing := n - len(state["exp_avg"]):
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.cat([state[name], W2.new_zeros(missing, W2.shape[1])])
        return state

    def _state_of(self, tensor: Tensor) -> dict[str, Tensor]:
        return self._states.get(id(tensor)) or super()._state_of(tensor)

    def _load_inner(self, state: dict[int, dict]):
        super()._load_inner(state)
        self._states, self._uneven = {}, set()
        for stack in self.stacks:
            saved = [
                (i, name, state[id(tensor)])
                for i in range(len(stack.blocks))
                for name, tensor in self._stateful(stack, i).items()
                if id(tensor) in state
            ]
            if not saved:
                continue
            self._allocate(stack)
            for i, name, values in saved:
                trunk = stack.trunks[i]
                mine = self._state_of(trunk[name]) if name in trunk else self._state_of_W2(stack, i)
                for key, value in mine.items():
                    # another device may round a unit of W2 on that has no moments yet
                    (value[: len(values[key])] if value.ndim else value).copy_(values[key])
            if len({float(self._state_of(trunk["z"])["step"]) for trunk in stack.trunks}) > 1:
                self._uneven.add(stack)


def _lists(states: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    names = dict(exp_avgs="exp_avg", exp_avg_sqs="exp_avg_sq", steps="step")
    return {plural: [state[name] for state in states] for plural, name in names.items()}


def _options(group: dict) -> dict[str, Any]:
    return {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "maximize")}
