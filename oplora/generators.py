"""What may stand between the learned parameters and an adapter, and an optimizer for any of them.

A generator is a module whose forward() returns values for the tensors of a block. `AdapterMLP` is
the paper's; the others leave parts of it out, so that runs tell what each part does. They are
trained by `GeneratorOptimizer` through autograd: slow, literal, for comparisons; `oplora.OPAdamW`
is the fast form of the paper's.
"""

import math
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from oplora.mlp import AdapterMLP, generator_for, hidden, initial_mlp
from oplora.peft import Block, adapter_blocks, decay_groups, starts_of
from oplora.tensors import state_dtype


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


class Buffers(nn.Module):
    """Copies of tensors that are not trained, as part of a module's state."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_buffer(str(i), tensor.detach().clone())

    def __iter__(self):
        return self.buffers()


class Scalar(nn.Module):
    """One learned number s a block: theta = theta_0 + s S; S is learned from 0, s from 1."""

    def __init__(self, tensors: list[Tensor], width: int = 1, **kw):
        super().__init__()
        self.first = Buffers(tensors)
        self.S = nn.ParameterList([torch.zeros_like(tensor) for tensor in tensors])
        self.s = nn.Parameter(torch.ones((), dtype=tensors[0].dtype))

    def forward(self) -> list[Tensor]:
        return [first + self.s * S for first, S in zip(self.first, self.S, strict=True)]


class NOLA(nn.Module):
    """theta = theta_0 + Σ h_i U_i: U, rows of U(-1, 1), is drawn and frozen, h alone is learned.

    A number h_i a row and tensor (NOLA, arXiv 2310.02556: α for A, β for B), all zero at first.
    A theta_0 whose start is "random" is drawn, too, as torch.nn.Linear's weight.
    """

    def __init__(self, tensors: list[Tensor], width: int = 32, *, start=(), generator=None, **kw):
        super().__init__()
        self.first = Buffers(tensors)
        for i, tensor in enumerate(self.first):
            if start and start[i] == "random":
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
        rows = [torch.empty(width, tensor.numel(), dtype=tensor.dtype) for tensor in tensors]
        self.U = Buffers(U.uniform_(-1, 1, generator=generator) for U in rows)
        self.h = nn.ParameterList(torch.zeros(width, dtype=tensor.dtype) for tensor in tensors)

    def forward(self) -> list[Tensor]:
        parts = zip(self.first, self.h, self.U, strict=True)
        return [first + (h @ U).view(first.shape) for first, h, U in parts]


class RescaledMLP(AdapterMLP):
    """B is what a head with ordinary weights predicts, times a learned scalar that starts at 0.

    As in commit b14accb of the paper's code, where both heads have torch.nn.Linear's weights and
    biases. tensors: LoRA's A (r, d_in) and B (d_out, r).
    """

    def __init__(self, tensors: list[Tensor], width: int = 32, **kw):
        super().__init__(tensors, width, ["random"] * 2, **kw)
        bound = 1 / math.sqrt(width)
        nn.init.uniform_(self.b2, -bound, bound, generator=kw.get("generator"))
        self.rescale = nn.Parameter(torch.zeros((), dtype=self.b2.dtype))

    def forward(self) -> list[Tensor]:
        A, B = super().forward()
        return [A, self.rescale * B]


class DeepLoRA(nn.Module):
    """ΔW = B C A with a third factor C (r, r), the identity at first; A = C A' is what is shipped.

    As the paper's second text runs Deep LoRA (arXiv 2406.04112), whose own three factors start
    orthogonal and small. tensors: A, B.
    """

    def __init__(self, tensors: list[Tensor], width: int = 0, **kw):
        super().__init__()
        self.A, self.B = (nn.Parameter(tensor.detach().clone()) for tensor in tensors)
        self.C = nn.Parameter(torch.eye(len(self.A), dtype=self.A.dtype))

    def forward(self) -> list[Tensor]:
        return [self.C @ self.A, self.B]


class SharedMLP(nn.Module):
    """One MLP for all layers, which it tells apart by a learned vector z ~ N(0, 1) each.

    As the paper's second text runs HyperLoader (arXiv 2407.01411). A head for every shape of
    tensor; those of B are zero at first, and A takes the MLP's value. tensors: A1, B1, A2, B2, …
    """

    def __init__(self, tensors: list[Tensor], width: int = 32, *, z_dim=128, generator=None, **kw):
        super().__init__()
        dtype, kinds = tensors[0].dtype, [(t.shape, i % 2) for i, t in enumerate(tensors)]
        self.shapes = [t.shape for t in tensors]
        heads = list(dict.fromkeys(kinds))
        self.head_of = [heads.index(kind) for kind in kinds]
        drawn = dict(z_dim=z_dim, generator=generator, dtype=dtype)
        starts = ["still" if is_B else "random" for _, is_B in heads]
        _, W1, b1, W2, b2 = initial_mlp([torch.zeros(s) for s, _ in heads], starts, width, **drawn)
        sizes = [shape.numel() for shape, _ in heads]
        z = torch.randn(len(tensors) // 2, z_dim, generator=generator, dtype=dtype)
        self.z, self.W1, self.b1 = nn.Parameter(z), nn.Parameter(W1), nn.Parameter(b1)
        self.W2 = nn.ParameterList(part.clone() for part in W2.split(sizes, 1))
        self.b2 = nn.ParameterList(part.clone() for part in b2.split(sizes))

    def forward(self) -> list[Tensor]:
        h = torch.relu(self.z @ self.W1.T + self.b1)
        return [
            (h[i // 2] @ self.W2[head] + self.b2[head]).view(shape)
            for i, (head, shape) in enumerate(zip(self.head_of, self.shapes, strict=True))
        ]


class Shortcuts(nn.Module):
    """ΔW_n = Σ_k B_(n-k) A_(n-k): a layer adds the products of the layers before it, too.

    ResLoRA (arXiv 2402.18039) with its block "bs", the one of three that merges into the weights
    exactly ("is" and "ms" add earlier layers' inputs). tensors: A1, B1, A2, B2, … of rank
    (previous + 1) r, which holds the sum: layers before are those whose names differ in numbers
    alone and whose shapes are the same.
    """

    def __init__(
        self, tensors: list[Tensor], width: int = 0, *, names: Sequence[str] = (), previous=1, **kw
    ):
        super().__init__()
        As, Bs = tensors[::2], tensors[1::2]
        if any(len(A) % (previous + 1) for A in As):
            raise ValueError(f"rank {len(As[0])} must be a multiple of previous + 1={previous + 1}")
        self.ranks = [len(A) for A in As]
        chains: dict[tuple, list[int]] = {}
        self.before: list[list[int]] = []  # of every layer itself and the layers that it adds
        for n, (A, B) in enumerate(zip(As, Bs, strict=True)):
            name = re.sub(r"\d+", "#", names[2 * n]) if names else ""
            chain = chains.setdefault((name, A.shape, B.shape), [])
            chain.append(n)
            self.before.append(chain[: -previous - 2 : -1])
        self.A = nn.ParameterList(A[: len(A) // (previous + 1)].clone() for A in As)
        self.B = nn.ParameterList(B[:, : B.shape[1] // (previous + 1)].clone() for B in Bs)

    def forward(self) -> list[Tensor]:
        values = []
        for rank, before in zip(self.ranks, self.before, strict=True):
            A, B = torch.cat([self.A[n] for n in before]), torch.cat([self.B[n] for n in before], 1)
            missing = rank - len(A)
            values += [F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))]
        return values


GENERATORS = {
    "relu": AdapterMLP,
    "linear": LinearMLP,
    "free": FreeHidden,
    "scalar": Scalar,
    "nola": NOLA,
    "rescaled": RescaledMLP,
    "deep": DeepLoRA,
    "shared": SharedMLP,
    "shortcuts": Shortcuts,
}
_STARTED = ("relu", "linear", "free", "nola")  # as `oplora.create_oplora_optimizer` starts
_OF_PAIRS = ("rescaled", "deep", "shared", "shortcuts")  # LoRA's A and B, in this order
_REPLACING = ("rescaled", "shared", "shortcuts")  # A, so that B must start at zero
_OF_MODELS = ("shared", "shortcuts")  # one module for all layers


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
    generator_options: dict[str, Any] | None = None,
    **options: Any,
) -> GeneratorOptimizer:
    """An optimizer with one generator per adapted layer (`GENERATORS`), for any PEFT model.

    What else is trained is trained directly. ValueError for an unknown generator, or where a
    generator is not for the model's adapter. generator_options: of the generator's class.
    """
    if generator not in GENERATORS:
        raise ValueError(f"generator={generator!r} is unknown: use {', '.join(GENERATORS)}")
    blocks, others = adapter_blocks(model)
    if generator in _OF_PAIRS and any(block.kinds != ["lora_A", "lora_B"] for block in blocks):
        raise ValueError(f"generator={generator!r} is for plain LoRA, whose layers have A and B")
    starts = {block.config.init_lora_weights for block in blocks if generator in _REPLACING}
    if starts - {True, "gaussian"}:
        raise ValueError(
            f"generator={generator!r} replaces A, so B must start at zero: use PEFT's default "
            "init_lora_weights"
        )
    if generator in _OF_MODELS:
        parts = zip(*(block[:3] for block in blocks), strict=True)
        blocks = [Block(*(list(chain(*part)) for part in parts), blocks[0].config)]
    modules = []
    for block in blocks:
        first = [t.detach().cpu().to(state_dtype(block.tensors)) for t in block.tensors]
        stream = generator_for(seed, block.names[0])
        starts = {"start": starts_of(block, "auto", "author")} if generator in _STARTED else {}
        given = {**starts, **(generator_options or {})}
        given |= {"names": block.names} if generator in _OF_MODELS else {}
        module = GENERATORS[generator](first, mlp_width, generator=stream, **given)
        modules.append((block.tensors, module.to(block.tensors[0].device)))
    direct = decay_groups(model, others)
    for group in direct:
        group["params"] = [tensor for _, tensor in group["params"]]
    return GeneratorOptimizer(modules, optimizer_cls, direct, lr=lr, **options)
