"""Controls for OP-LoRA: plain LoRA with what the MLP brings along, but without the MLP.

While h stands still, Adam on the MLP moves the adapter like Adam on the adapter itself at
1 + |h|_1 times the learning rate; and the MLP's first A is larger than LoRA's. Only what OP-LoRA
does beyond plain LoRA with both belongs to the MLP.
"""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from oplora.adamw import OPAdamW
from oplora.peft import adapter_blocks, create_plain_optimizer, oplora_groups


class MatchedAdamW(OPAdamW):
    """AdamW on the blocks' tensors at 1 + |h|_1 times the learning rate.

    The MLPs are trained beside it, by the same gradients, as OP-LoRA's are; of them only h is
    used. Tensors of groups with mlp_width=0 are trained at the plain rate. Arguments: `OPAdamW`.
    """

    def __init__(self, params, **options: Any):
        if options.get("maximize") or options.get("clip"):
            raise ValueError("the control knows neither maximize nor clip: leave them out")
        super().__init__(params, **options)
        blocks = [block for stack in self.stacks for block in stack.tensors.blocks]
        self.plain = torch.optim.AdamW([{"params": block} for block in blocks], fused=True)

    @torch.no_grad()
    def step(self, closure=None):
        multipliers = [1 + total for s in self.stacks for total in s.h.sum(1).tolist()]
        tensors = [t.detach() for stack in self.stacks for t in stack.tensors.flat]
        values, skipped = [t.clone() for t in tensors], self.skipped_steps
        loss = super().step(closure)  # checks the gradients, trains the MLPs
        torch._foreach_copy_(tensors, values)  # what they wrote is replaced
        if self.skipped_steps == skipped:
            stacked = [part for part in self.parts if part.stack is not None]
            outer = [self.param_groups[part.group] for part in stacked for _ in part.stack.trunks]
            work = zip(self.plain.param_groups, multipliers, outer, strict=True)
            for plain, multiplier, group in work:
                plain.update({key: group[key] for key in ("betas", "eps", "weight_decay")})
                plain["lr"] = group["lr"] * multiplier
            self.plain.step()
        self.accept()
        return loss

    def accept(self):
        """Take what the tensors hold now as their own values, not as an edit."""
        for stack in self.stacks:
            stack.tensors.accept()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "plain": self.plain.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]):
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "plain"})
        self.plain.load_state_dict(state_dict["plain"])
        self.accept()


def create_control_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    matched_steps: bool,
    mlp_start: bool,
    mlp_width: int,
    mlp_options: dict[str, Any],
    **adam: Any,
) -> Optimizer:
    """Plain LoRA with OP-LoRA's step sizes, with its first A, or with both.

    mlp_options: seed, z_dim, … of the OP-LoRA that is matched (`OPOptimizer`).
    """
    if optimizer_cls is not torch.optim.AdamW:
        raise ValueError(f"the controls need optimizer=adamw, not {optimizer_cls.__name__}")
    tensors = [t.detach() for block in adapter_blocks(model)[0] for t in block.tensors]
    first = [t.clone() for t in tensors]
    init = mlp_options.get("init", "author")
    matched = MatchedAdamW(oplora_groups(model, mlp_width, init=init), **mlp_options, **adam)
    if not mlp_start:
        torch._foreach_copy_(tensors, first)
        matched.accept()
    if matched_steps:
        return matched
    return create_plain_optimizer(model, optimizer_cls, **adam)
