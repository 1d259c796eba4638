"""RunLoRA (arXiv 2312.03415): LoRA layers that take their products in the cheapest order.

For y = x W^T + s (x A^T) B^T + b and the gradients of x, A and B: every product with B A can go
through the rank or through W + s B A, and those of A and B through the rank or dW = dy^T x.
"""

from itertools import product
from typing import NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Order(NamedTuple):
    """What y and dx go through, rank or merged; and dA and dB, rank or full."""

    y: str
    dx: str
    factors: str


ORDERS = [
    Order(*ways) for ways in product(("rank", "merged"), ("rank", "merged"), ("rank", "full"))
]


def products(order: Order, tokens: int, d_in: int, d_out: int, rank: int) -> int:
    """Multiplications of a call and its gradients, besides those without any LoRA."""
    through, merged = tokens * rank * (d_in + d_out), rank * d_in * d_out
    count = sum(through if way == "rank" else merged for way in order[:2])
    count += 2 * through if order.factors == "rank" else tokens * d_in * d_out + 2 * merged
    shared = order.dx == order.factors == "rank"  # dy B
    return count - shared * tokens * rank * d_out


def cheapest(tokens: int, d_in: int, d_out: int, rank: int) -> Order:
    return min(ORDERS, key=lambda order: products(order, tokens, d_in, d_out, rank))


class Ordered(torch.autograd.Function):
    """x (tokens, d_in), frozen W (d_out, d_in) and b (d_out) or None, A (r, d_in), B (d_out, r)."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float, order):
        ctx.save_for_backward(x, W, A, B)
        ctx.s, ctx.order = s, order
        if order.y == "merged":
            return nn.functional.linear(x, torch.addmm(W, B, A, alpha=s), b)
        return nn.functional.linear(x, W, b).addmm_(x @ A.T, B.T, alpha=s)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (x, W, A, B), s = ctx.saved_tensors, ctx.s
        _, of_x, of_factors = ctx.order
        dyB = dy @ B if "rank" in (of_x, of_factors) else None  # (tokens, r)
        dx = None
        if ctx.needs_input_grad[0]:
            if of_x == "merged":
                dx = dy @ torch.addmm(W, B, A, alpha=s)
            else:
                dx = (dy @ W).addmm_(dyB, A, alpha=s)
        if of_factors == "full":
            dW = dy.T @ x
            dA, dB = B.T @ dW, dW @ A.T
        else:
            dA, dB = dyB.T @ x, dy.T @ (x @ A.T)
        return dx, None, None, s * dA, s * dB, None, None


class RunLoraLinear(lora.Linear):
    """PEFT's LoRA layer in the cheapest order where it is plain LoRA; else as PEFT has it."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapter = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if args or kwargs or not self._is_plain(adapter, x):
            return super().forward(x, *args, **kwargs)
        base, A, B = self.base_layer, self.lora_A[adapter].weight, self.lora_B[adapter].weight
        rows = x.reshape(-1, x.shape[-1])
        order = cheapest(len(rows), base.in_features, base.out_features, len(A))
        y = Ordered.apply(rows, base.weight, base.bias, A, B, self.scaling[adapter], order)
        return y.view(*x.shape[:-1], -1)

    def _is_plain(self, adapter: str | None, x: Tensor) -> bool:
        base, factors = self.base_layer, (self.lora_A, self.lora_B)
        if self.disable_adapters or self.merged or adapter not in self.lora_A:
            return False
        if type(base) is not nn.Linear or adapter in self.lora_variant or self.lora_bias[adapter]:
            return False
        dropout = self.lora_dropout[adapter]
        noisy = self.training and not isinstance(dropout, nn.Identity) and dropout.p > 0
        trained = any(p.requires_grad for p in base.parameters())
        types = {x.dtype, base.weight.dtype, *(f[adapter].weight.dtype for f in factors)}
        plain = not noisy and not trained and len(types) == 1
        return plain and not torch.is_autocast_enabled(x.device.type)


def use_runlora(model: nn.Module) -> nn.Module:
    """The same model, its LoRA layers in RunLoRA's orders; names, saving and optimizers stay.

    A layer falls back to PEFT's own call under autocast, with dropout, DoRA, a bias of its own,
    several adapters or mixed types. ValueError: no LoRA is on a Linear layer.
    """
    layers = [module for module in model.modules() if type(module) is lora.Linear]
    if not layers:
        raise ValueError("RunLoRA is for LoRA on Linear layers, of which there are none")
    for layer in layers:
        layer.__class__ = RunLoraLinear
    return model
