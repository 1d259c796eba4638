"""AdamW on MLPs without ever forming the gradient of W2: OP-LoRA at the price of its W2."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from oplora.optimizer import OPOptimizer
from oplora.rank1 import foreach_rank1_adamw_
from oplora.stack import MLPStack


class OPAdamW(OPOptimizer):
    """AdamW on MLPs that predict the given tensors: OP-LoRA at the price of its W2.

    Equal to `OPOptimizer(params, torch.optim.AdamW, …)`, but the rank-1 gradient h ⊗ g of W2 is
    formed a few rows at a time in a scratch that stays in cache, and moments exist only for rows
    whose unit was ever on (about half of them). Other arguments: `OPOptimizer`.
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
        **mlp_options: Any,
    ):
        self._moments: dict[int, dict[str, Tensor]] = {}  # by id of W2
        adam = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, torch.optim.AdamW, **adam, fused=True, **mlp_options)

    def _inner_parameters(self, stack: MLPStack) -> list[Tensor]:
        return [tensor for trunk in stack.trunks for tensor in trunk.values()]

    def _update_W2(self, stack: MLPStack, members: list[int], gs: list[Tensor], group: dict):
        states = [self._moments_of(stack, i) for i in members]
        torch._foreach_add_([state["step"] for state in states], 1)
        rows = stack.rows()
        foreach_rank1_adamw_(
            [stack.W2[i] for i in members],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [rows[i] for i in members],
            gs,
            [state["step"] for state in states],
            **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "maximize")},
        )
        if group["weight_decay"]:
            for i in members:
                stack.rest[i] = stack.inactive(i)
            shrink = 1 - group["lr"] * group["weight_decay"]
            torch._foreach_mul_([stack.rest[i] for i in members], shrink)

    def _moments_of(self, stack: MLPStack, i: int) -> dict[str, Tensor]:
        """Moments of the rows of W2 that were ever on; new rows start at zero."""
        W2, n = stack.W2[i], stack.active[i]
        state = self._moments.setdefault(id(W2), {})
        if not state:
            state["step"] = torch.zeros((), device=W2.device)
            state["exp_avg"] = state["exp_avg_sq"] = W2.new_zeros(0, W2.shape[1])
        if missing := n - len(state["exp_avg"]):
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.cat([state[name], W2.new_zeros(missing, W2.shape[1])])
        return state

    def _state_of(self, tensor: Tensor) -> dict:
        return self._moments.get(id(tensor)) or super()._state_of(tensor)

    def _load_inner(self, state: dict[int, dict]):
        super()._load_inner(state)
        self._moments = {
            id(W2): {
                # `step` stays fp32 like torch's; moments follow W2 whatever they were saved on
                name: value.to(W2.device, torch.float32 if name == "step" else W2.dtype)
                for name, value in state[id(W2)].items()
            }
            for stack in self.stacks
            for W2 in stack.W2
            if id(W2) in state
        }
