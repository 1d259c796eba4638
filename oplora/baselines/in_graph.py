"""Any module that predicts an adapter, trained in the optimizer: slow, literal, for comparisons.

`GeneratorOptimizer` computes a module's values and pulls gradients back through it by autograd,
where `oplora.OPOptimizer` has closed forms for one kind of module. `RescaledMLP` is the one of the
first commit of the paper's code.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import PeftType
from torch import Tensor, nn
from torch.optim import Optimizer

from oplora.mlp import AdapterMLP, generator_for
from oplora.peft import adapter_blocks, decay_groups


class RescaledMLP(AdapterMLP):
    """B is what a head with ordinary weights predicts, times a learned scalar that starts at 0.

    As in commit b14accb of the paper's code, where both heads have torch.nn.Linear's weights and
    biases. tensors: LoRA's A (r, d_in) and B (d_out, r) of which B is zero, in any order.
    """

    def __init__(self, tensors: list[Tensor], width: int = 32, **kw):
        scaled = [not tensor.any() for tensor in tensors]
        if sorted(scaled) != [False, True]:
            raise ValueError(
                f"RescaledMLP is for LoRA's A and a B that is zero, got {len(tensors)} tensors of "
                f"which {sum(scaled)} are zero: use LoRA with PEFT's default initialisation"
            )
        super().__init__(tensors, width, ["random"] * 2, **kw)
        self.scaled = scaled
        bound = 1 / math.sqrt(width)
        nn.init.uniform_(self.b2, -bound, bound, generator=kw.get("generator"))
        self.rescale = nn.Parameter(torch.zeros((), dtype=self.b2.dtype))

    def forward(self) -> list[Tensor]:
        values = zip(super().forward(), self.scaled, strict=True)
        return [self.rescale * value if scaled else value for value, scaled in values]


class GeneratorOptimizer(Optimizer):
    """`optimizer_cls` on modules that predict blocks of tensors, and on what is trained directly.

    modules: pairs of a block's tensors and the module whose forward() returns their values, which
    are written into the tensors here and after every step. direct: parameter groups of the rest.
    The options of optimizer_cls are those of the first group, for all modules.
    """

    def __init__(
        self,
        modules: Iterable[tuple[list[Tensor], nn.Module]],
        optimizer_cls: type[Optimizer],
        direct: Iterable[dict] = (),
        **options: Any,
    ):
        self.modules = list(modules)
        weights = [p for _, module in self.modules for p in module.parameters()]
        self.inner = optimizer_cls([{"params": weights}, *map(dict, direct)], **options)
        tensors = [t for block, _ in self.modules for t in block]
        super().__init__([{"params": tensors}, *map(dict, direct)], self.inner.defaults)
        self._write()

    @torch.no_grad()
    def _write(self):
        for block, module in self.modules:
            for tensor, value in zip(block, module(), strict=True):
                tensor.copy_(value)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: outer[key] for key in self.inner.defaults})
        for block, module in self.modules:
            with torch.enable_grad():
                values = module()
            weights = list(module.parameters())
            given = [(v, t.grad.to(v.dtype)) for v, t in zip(values, block, strict=True)
                     if t.grad is not None]  # fmt: skip
            if not given:
                continue
            if not all(g.isfinite().all() for _, g in given):
                raise FloatingPointError(
                    "NaN or Inf in the adapter's gradient: nothing was updated"
                )
            outputs, gradients = zip(*given, strict=True)
            found = torch.autograd.grad(outputs, weights, gradients, allow_unused=True)
            for weight, gradient in zip(weights, found, strict=True):
                weight.grad = gradient
        self.inner.step()
        for weight in (p for _, module in self.modules for p in module.parameters()):
            weight.grad = None
        self._write()
        return loss

    @property
    def mlp_parameters(self) -> int:
        """Values in the modules: what is trained instead of the adapter."""
        return sum(p.numel() for _, module in self.modules for p in module.parameters())

    def state_dict(self) -> dict[str, Any]:
        modules = [module.state_dict() for _, module in self.modules]
        return {**super().state_dict(), "modules": modules, "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]):
        modules, inner = state_dict["modules"], state_dict["inner"]
        groups = {key: state_dict[key] for key in ("param_groups", "state")}
        super().load_state_dict(groups)
        for (_, module), saved in zip(self.modules, modules, strict=True):
            module.load_state_dict(saved)
        self.inner.load_state_dict(inner)
        self._write()


def create_rescaled_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    mlp_width: int = 32,
    seed: int = 0,
    init: str = "author",
    module: Callable[..., nn.Module] = RescaledMLP,
    **options: Any,
) -> GeneratorOptimizer:
    """OP-LoRA as in commit b14accb of the paper's code, for LoRA models; others: ValueError."""
    blocks, others = adapter_blocks(model)
    if any(getattr(b.config, "peft_type", None) != PeftType.LORA or len(b.names) != 2
           for b in blocks):  # fmt: skip
        raise ValueError("the rescaled OP-LoRA predicts LoRA's A and B: it has no other adapters")
    modules = []
    for block in blocks:
        mlp = module(
            [t.detach().float().cpu() for t in block.tensors],
            mlp_width,
            init=init,
            generator=generator_for(seed, block.names[0]),
        )
        modules.append((block.tensors, mlp.to(block.tensors[0].device)))
    direct = decay_groups(model, others)
    for group in direct:
        group["params"] = [tensor for _, tensor in group["params"]]
    return GeneratorOptimizer(modules, optimizer_cls, direct, lr=lr, **options)
