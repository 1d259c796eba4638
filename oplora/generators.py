"""What may stand between the learned parameters and an adapter, and an optimizer for any of them.

A generator is a module whose forward() returns values for the tensors of a block. `AdapterMLP` is
the paper's; the others leave parts of it out, so that runs tell what each part does. They are
trained by `GeneratorOptimizer` through autograd: slow, literal, for comparisons; `oplora.OPAdamW`
is the fast form of the paper's.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oplora.mlp import AdapterMLP, generator_for, hidden
from oplora.peft import adapter_blocks, decay_groups, starts_of


class LinearMLP(AdapterMLP):
    """The paper's MLP without its nonlinearity: h = W1 z + b1."""

    def __init__(self, tensors: list[Tensor], width: int = 32, start="paper", **kw):
        super().__init__(tensors, width, start, **kw)
        starts = ["random"] * len(tensors) if isinstance(start, str) else start
        kept = [torch.full((t.numel(),), s == "keep") for t, s in zip(tensors, starts, strict=True)]
        with torch.no_grad():  # b2 makes up for the ReLU's h
            self.b2 += torch.cat(kept) * (self.W2 @ (super().hidden() - self.hidden()))

    def hidden(self) -> Tensor:
        return self.W1 @ self.z + self.b1


class FreeHidden(AdapterMLP):
    """h itself is learned and there is no trunk: theta = W2 h + b2 (Arora et al., 2018).

    h starts as the paper's MLP would have it.
    """

    def __init__(self, tensors: list[Tensor], width: int = 32, start="paper", **kw):
        super().__init__(tensors, width, start, **kw)
        self.h = nn.Parameter(hidden(self.z, self.W1, self.b1).detach())
        del self.z, self.W1, self.b1

    def hidden(self) -> Tensor:
        return self.h


class Scalar(nn.Module):
    """One learned number s a block: theta = theta_0 + s S; S is learned from 0, s from 1."""

    def __init__(self, tensors: list[Tensor], width: int = 1, **kw):
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"first{i}", tensor.detach().clone())
        self.S = nn.ParameterList([torch.zeros_like(tensor) for tensor in tensors])
        self.s = nn.Parameter(torch.ones((), dtype=tensors[0].dtype))

    def forward(self) -> list[Tensor]:
        return [self.get_buffer(f"first{i}") + self.s * S for i, S in enumerate(self.S)]


class NOLA(nn.Module):
    """theta = theta_0 + Σ h_i U_i: U, rows of U(-1, 1), is drawn and frozen, h alone is learned.

    A number h_i a row and tensor (NOLA, arXiv 2310.02556: α for A, β for B), all zero at first.
    """

    def __init__(self, tensors: list[Tensor], width: int = 32, *, generator=None, **kw):
        super().__init__()
        self.h = nn.ParameterList()
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"first{i}", tensor.detach().clone())
            U = torch.empty(width, tensor.numel(), dtype=tensor.dtype)
            self.register_buffer(f"U{i}", U.uniform_(-1, 1, generator=generator))
            self.h.append(nn.Parameter(torch.zeros(width, dtype=tensor.dtype)))

    def forward(self) -> list[Tensor]:
        return [
            (first := self.get_buffer(f"first{i}"))
            + (h @ self.get_buffer(f"U{i}")).view(first.shape)
            for i, h in enumerate(self.h)
        ]


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


GENERATORS = {
    "relu": AdapterMLP,
    "linear": LinearMLP,
    "free": FreeHidden,
    "scalar": Scalar,
    "nola": NOLA,
    "rescaled": RescaledMLP,
}
_STARTED = ("relu", "linear", "free")  # as `oplora.create_oplora_optimizer` starts


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


def create_generator_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    generator: str = "relu",
    mlp_width: int = 32,
    seed: int = 0,
    **options: Any,
) -> GeneratorOptimizer:
    """An optimizer with one generator per adapted layer (`GENERATORS`), for any PEFT model.

    What else is trained is trained directly. ValueError for an unknown generator, or where a
    generator is not for the model's adapter.
    """
    if generator not in GENERATORS:
        raise ValueError(f"generator={generator!r} is unknown: use {', '.join(GENERATORS)}")
    blocks, others = adapter_blocks(model)
    modules = []
    for block in blocks:
        first = [t.detach().float().cpu() for t in block.tensors]
        stream = generator_for(seed, block.names[0])
        starts = {"start": starts_of(block, "auto", "author")} if generator in _STARTED else {}
        module = GENERATORS[generator](first, mlp_width, generator=stream, **starts)
        modules.append((block.tensors, module.to(block.tensors[0].device)))
    direct = decay_groups(model, others)
    for group in direct:
        group["params"] = [tensor for _, tensor in group["params"]]
    return GeneratorOptimizer(modules, optimizer_cls, direct, lr=lr, **options)
