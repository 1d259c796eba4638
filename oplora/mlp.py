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

STARTS = ("random", "keep", "still")  # of one tensor
INITS = {  # z's standard deviation, and does the trunk start with a bias?
    "author": (0.01, True),
    "text": (1.0, False),
}


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
    init: str = "author",
    z_dim: int = 128,
    z_std: float | None = None,
    trunk_bias: bool | None = None,
    head_gain: float = 1.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> MLPWeights:
    """Initial weights, on the CPU.

    One entry of `starts` per tensor says what its columns of W2 and b2 are:
    "random": W2 ~ U(±head_gain/√width), b2 zero: the tensor takes the MLP's value (the paper's A);
    "keep": the same W2, and b2 = tensor - W2ᵀ h, so the tensor keeps its present value;
    "still": W2 zero and b2 = tensor (the paper's B, and in its code DoRA's magnitude).
    init: "author" as in the paper's code, z ~ N(0, 0.01²) and torch.nn.Linear's trunk,
    W1, b1 ~ U(±1/√z_dim); "text" as in its text (supplement 2.1), b1 zero and z, which it leaves
    open, ~ N(0, 1). z_std and trunk_bias replace what `init` says of them.
    """
    if not (isinstance(width, int) and isinstance(z_dim, int) and width > 0 and z_dim > 0):
        raise ValueError(f"mlp width={width!r} and z_dim={z_dim!r} must be integers from 1")
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown: use {' or '.join(map(repr, INITS))}")
    z_std = INITS[init][0] if z_std is None else z_std
    trunk_bias = INITS[init][1] if trunk_bias is None else trunk_bias
    for name, value in (("z_std", z_std), ("head_gain", head_gain)):
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{name}={value!r} must be a number above 0")
    z = z_std * torch.randn(z_dim, generator=generator, dtype=dtype)
    W1 = torch.empty(width, z_dim, dtype=dtype)
    nn.init.kaiming_uniform_(W1, a=math.sqrt(5), generator=generator)  # U(±1/√z_dim)
    b1 = torch.zeros(width, dtype=dtype)
    if trunk_bias:
        b1.uniform_(-1 / math.sqrt(z_dim), 1 / math.sqrt(z_dim), generator=generator)
    h = hidden(z, W1, b1)
    bound = head_gain / math.sqrt(width)
    rows, biases = [], []
    for tensor, start in zip(tensors, starts, strict=True):
        if start not in STARTS:
            raise ValueError(f"start={start!r} is unknown: use one of {', '.join(STARTS)}")
        size = tensor.numel()
        W2 = torch.zeros(width, size, dtype=dtype)
        b2 = torch.zeros(size, dtype=dtype)
        if start != "still":
            W2.uniform_(-bound, bound, generator=generator)
        if start != "random":
            b2 = tensor.detach().reshape(-1).to("cpu", dtype, copy=True) - h @ W2
        rows.append(W2)
        biases.append(b2)
    return MLPWeights(z, W1, b1, torch.cat(rows, 1), torch.cat(biases))


def resolve_starts(start: str, zero: Sequence[bool]) -> list[str]:
    """A start for every tensor of a block, from one word and which tensors are zero.

    A tensor that is zero stands "still" in all. "paper" lets the MLP replace the others, which
    leaves the model unchanged only if a zero tensor multiplies them.
    """
    if start not in ("paper", "keep", "still"):
        raise ValueError(
            f"start={start!r} is unknown: use 'paper', 'keep', 'still' or a list per block"
        )
    if start == "paper" and not any(zero):
        raise ValueError(
            "start='paper' needs a tensor that starts at zero (LoRA's B), else the MLP would "
            "replace trained values: use start='keep'"
        )
    other = "random" if start == "paper" else start
    return ["still" if is_zero else other for is_zero in zero]


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

    def hidden(self) -> Tensor:
        return torch.relu(self.W1 @ self.z + self.b1)

    def forward(self) -> list[Tensor]:
        theta = self.W2 @ self.hidden() + self.b2
        values = theta.split([shape.numel() for shape in self.shapes])
        return [value.view(shape) for value, shape in zip(values, self.shapes, strict=True)]
