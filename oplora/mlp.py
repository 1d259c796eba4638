"""The paper's MLP: a learned vector z goes in, all tensors of one adapter come out.

    (A; B) = W2 relu(W1 z + b1) + b2                                   (OP-LoRA, section 4)

`AdapterMLP` is the definition, trained through autograd like any module.
`generate` and `pullback` are the same equation and its gradient as plain functions over any
number of MLPs at once; the optimizer (`oplora.optimizer`) is built on them.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

STARTS = ("zero", "random", "keep")


class MLPWeights(NamedTuple):
    """Parameters of one MLP (or of many, with leading batch dimensions)."""

    z: Tensor  # (z_dim,) the learned input
    W1: Tensor  # (width, z_dim)
    b1: Tensor  # (width,)
    W2: Tensor  # (width, P): the transpose of the paper's W2, so that a hidden unit owns a row
    b2: Tensor  # (P,) P = number of values in all tensors of the adapter


def generate(mlp: MLPWeights) -> tuple[Tensor, Tensor]:
    """Hidden units h (…, width) and predicted values theta (…, P) (OP-LoRA, section 4)."""
    h = hidden(mlp.z, mlp.W1, mlp.b1)
    return h, (h.unsqueeze(-2) @ mlp.W2).squeeze(-2) + mlp.b2


def hidden(z: Tensor, W1: Tensor, b1: Tensor) -> Tensor:
    """h = relu(W1 z + b1), shape (…, width)."""
    return torch.relu((W1 @ z.unsqueeze(-1)).squeeze(-1) + b1)


def pullback(dh: Tensor, z: Tensor, W1: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, W1 and b1 from dh = dL/dh (…, width).

    The other two need no computation: with g = dL/dtheta, dL/db2 = g and dL/dW2 = h ⊗ g.
    """
    db1 = dh * (h > 0)
    dz = (db1.unsqueeze(-2) @ W1).squeeze(-2)
    return dz, db1.unsqueeze(-1) * z.unsqueeze(-2), db1


def initial_mlp(
    tensors: Sequence[Tensor],
    starts: Sequence[str],
    width: int = 32,
    *,
    z_dim: int = 128,
    z_init: str = "normal",
    kaiming_a: float = math.sqrt(5),
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> MLPWeights:
    """Initial weights, on the CPU (OP-LoRA, supplement 2.1: Kaiming uniform, biases zero).

    One entry of `starts` per tensor says what its rows of W2 and b2 are:
    "zero": both zero, so the tensor starts at zero (the paper's B);
    "random": Kaiming rows, b2 zero: the tensor takes the MLP's value (the paper's A);
    "keep": Kaiming rows, and b2 = tensor - W2 h, so the tensor keeps its present value.
    The paper leaves open: z_dim and z's distribution ("normal" N(0, 1) or "uniform" U(0, 1)),
    and `kaiming_a` (sqrt 5 is the bound of torch.nn.Linear, 0 that of kaiming_uniform_).
    """
    if not (isinstance(width, int) and isinstance(z_dim, int) and width > 0 and z_dim > 0):
        raise ValueError(f"mlp width={width!r} and z_dim={z_dim!r} must be integers from 1")
    if z_init not in ("normal", "uniform"):
        raise ValueError(f"z_init={z_init!r} is unknown: use 'normal' or 'uniform'")
    draw = torch.randn if z_init == "normal" else torch.rand
    z = draw(z_dim, generator=generator, dtype=dtype)
    W1 = torch.empty(width, z_dim, dtype=dtype)
    nn.init.kaiming_uniform_(W1, a=kaiming_a, generator=generator)
    b1 = torch.zeros(width, dtype=dtype)
    h = hidden(z, W1, b1)
    bound = math.sqrt(6 / ((1 + kaiming_a**2) * width))  # Kaiming's, with fan-in = width
    rows, biases = [], []
    for tensor, start in zip(tensors, starts, strict=True):
        if start not in STARTS:
            raise ValueError(f"start={start!r} is unknown: use one of {', '.join(STARTS)}")
        size = tensor.numel()
        W2 = torch.zeros(width, size, dtype=dtype)
        b2 = torch.zeros(size, dtype=dtype)
        if start != "zero":
            W2.uniform_(-bound, bound, generator=generator)
        if start == "keep":
            b2 = tensor.detach().reshape(-1).to("cpu", dtype) - h @ W2
        rows.append(W2)
        biases.append(b2)
    return MLPWeights(z, W1, b1, torch.cat(rows, 1), torch.cat(biases))


def resolve_starts(start: str, zero: Sequence[bool]) -> list[str]:
    """A start for every tensor of a block, from "paper" or "keep" and which tensors are zero.

    A tensor that is zero gets the zero rows in both. "paper" lets the MLP replace the others,
    which leaves the model unchanged only if a zero tensor multiplies them.
    """
    if start not in ("paper", "keep"):
        raise ValueError(f"start={start!r} is unknown: use 'paper', 'keep' or a list per block")
    if start == "paper" and not any(zero):
        raise ValueError(
            "start='paper' needs a tensor that starts at zero (LoRA's B), else the MLP would "
            "replace trained values: use start='keep'"
        )
    other = "random" if start == "paper" else "keep"
    return ["zero" if is_zero else other for is_zero in zero]


def generator_for(seed: int, name: str) -> torch.Generator:
    """A random stream of this name alone: the same on every rank, whatever was drawn before."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class AdapterMLP(nn.Module):
    """The paper's MLP for one adapted layer as an ordinary module.

    `forward` returns tensors of the shapes of `tensors`. Its memory and time grow with the full
    W2 in the graph; for training use `oplora.OPAdamW`, which computes the same updates.
    For one MLP per tensor (two trunks, as in the paper's matrix factorization) build one module
    for A and one for B. Other arguments: `initial_mlp`; `start`: `resolve_starts`.
    """

    def __init__(
        self, tensors: Sequence[Tensor], width: int = 32, start: str | Sequence[str] = "paper", **kw
    ):
        super().__init__()
        if isinstance(start, str):
            start = resolve_starts(start, [not t.any() for t in tensors])
        kw.setdefault("dtype", tensors[0].dtype)
        z, W1, b1, W2, b2 = initial_mlp(tensors, start, width, **kw)
        self.shapes = [t.shape for t in tensors]
        self.z = nn.Parameter(z)
        self.W1, self.b1 = nn.Parameter(W1), nn.Parameter(b1)
        self.W2, self.b2 = nn.Parameter(W2.T.contiguous()), nn.Parameter(b2)

    def forward(self) -> list[Tensor]:
        theta = self.W2 @ torch.relu(self.W1 @ self.z + self.b1) + self.b2
        values = theta.split([shape.numel() for shape in self.shapes])
        return [value.view(shape) for value, shape in zip(values, self.shapes, strict=True)]
