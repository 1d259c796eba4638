"""The two-layer network, and its forward pass and gradient with an adapter in every layer.

Adapted layers here are PEFT's LoRA and DoRA, written out so that many adapters of one frozen
network are one batch of tensors: theta (…, P) holds the adapter's tensors of a layer, flat.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from math import prod

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional

from oplora.harness.assets import build_once, cache_folder
from oplora.peft import adapter_blocks
from oplora.studies.rotated_mnist.digits import SIDE

LORA, DORA = ["lora_A", "lora_B"], ["lora_A", "lora_B", "lora_magnitude_vector"]


def network(hidden: int) -> nn.Sequential:
    """784 pixels → hidden → ten digits."""
    layers = {"hidden": nn.Linear(SIDE * SIDE, hidden), "relu": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers, output=nn.Linear(hidden, 10)))


def pretrained(
    images: Tensor, labels: Tensor, hidden: int, epochs: int, batch_size: int, lr: float, seed: int
) -> nn.Sequential:
    """The network trained with Adam on these digits; once, then it is kept in the cache."""
    facts = repr((hidden, epochs, batch_size, lr, seed)).encode()
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes() + facts)
    torch.manual_seed(seed)
    model = network(hidden)

    def build(folder):
        optimizer = torch.optim.Adam(model.parameters(), lr)
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(batch_size):
                optimizer.zero_grad()
                functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
        save_model(model, folder / "model.safetensors")

    folder = build_once(cache_folder() / f"mnist-network-{digest.hexdigest()[:16]}", build)
    load_model(model, folder / "model.safetensors")
    return model


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer with its adapter's form: LoRA's A and B, and DoRA's m."""

    W: Tensor  # (out, in)
    bias: Tensor  # (out,)
    shapes: list[torch.Size]  # of A, B and maybe m
    scaling: float

    def tensors(self, theta: Tensor) -> list[Tensor]:
        """A (…, r, in), B (…, out, r) and maybe m (…, out) as views of theta."""
        parts = theta.split([prod(shape) for shape in self.shapes], -1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def scale(self, A: Tensor, B: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """DoRA's m / ‖W + s B A‖ of every row, (…, out), and the norm, which has no gradient."""
        A, B = self.scaling * A.detach(), B.detach()
        cross = (B * (self.W @ A.mT)).sum(-1)
        norm = (self.W.square().sum(-1) + 2 * cross + ((B @ (A @ A.mT)) * B).sum(-1)).sqrt()
        return m / norm, norm

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        """x (…, n, in) → (…, n, out)."""
        A, B, *m = self.tensors(theta)
        y = x @ self.W.T + (self.scaling * x @ A.mT) @ B.mT
        if m:
            y = y * self.scale(A, B, *m)[0].unsqueeze(-2)
        return y + self.bias

    def weight(self, theta: Tensor) -> Tensor:
        """W with the adapter merged into it, (…, out, in)."""
        A, B, *m = self.tensors(theta)
        merged = self.W + self.scaling * B @ A
        return self.scale(A, B, *m)[0].unsqueeze(-1) * merged if m else merged


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of a PEFT model, first to last. ValueError for adapters of another form."""
    blocks, _ = adapter_blocks(model)
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    kinds = [block.kinds for block in blocks]
    if len(adapted) != 2 or any(found not in (LORA, DORA) for found in kinds):
        raise ValueError(
            f"the batch knows LoRA and DoRA in both layers, not {kinds or 'a model without them'}: "
            "choose another method"
        )
    return [
        Layer(
            layer.get_base_layer().weight.detach(),
            layer.get_base_layer().bias.detach(),
            [tensor.shape for tensor in block.tensors],
            layer.scaling[layer.active_adapters[0]],
        )
        for layer, block in zip(adapted, blocks, strict=True)
    ]


def logits(layers: list[Layer], thetas: list[Tensor], x: Tensor) -> Tensor:
    """x (…, n, 784) → (…, n, 10), with one adapter for every leading index of the thetas."""
    first, last = layers
    return last(thetas[1], functional.relu(first(thetas[0], x)))


def loss(layers: list[Layer], thetas: list[Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of one adapter."""
    return functional.cross_entropy(logits(layers, thetas, x), labels)


def gradients(
    layers: list[Layer], thetas: list[Tensor], into: list[Tensor], x: Tensor, labels: Tensor
) -> Tensor:
    """The losses (members,) of as many adapters on the same images; their gradients into `into`.

    By hand: autograd's order of the products with factors of rank r takes four times as long.
    """
    passed = []
    for layer, theta in zip(layers, thetas, strict=True):
        A, B, *m = layer.tensors(theta)
        low = layer.scaling * x @ A.mT
        y = torch.baddbmm((x @ layer.W.T).expand(len(A), -1, -1), low, B.mT)
        scale, norm = layer.scale(A, B, *m) if m else (None, None)
        passed.append((x, low, y, scale, norm))
        x = y * scale.unsqueeze(-2) if m else y  # not needed again where there is no m
        x = x.add_(layer.bias)
        if layer is layers[0]:
            x.relu_()
    losses = functional.cross_entropy(
        x.flatten(0, 1), labels.repeat(len(x)), reduction="none"
    ).view(x.shape[:2])
    dy = (x.softmax(-1) - functional.one_hot(labels, x.shape[-1])) / len(labels)
    for layer, theta, gradient in zip(layers[::-1], thetas[::-1], into[::-1], strict=True):
        A, B, *_ = layer.tensors(theta)
        dA, dB, *dm = layer.tensors(gradient)
        x, low, y, scale, norm = passed.pop()
        if dm:
            dm[0].copy_((dy * y).sum(-2) / norm)
            dy = dy * scale.unsqueeze(-2)
        dB.copy_((low.mT @ dy).mT)
        dlow = layer.scaling * (B.mT @ dy.mT)
        dA.copy_(dlow @ x)
        if passed:
            dy = (dy @ layer.W).baddbmm_(dlow.mT, A).mul_(x > 0)
    return losses.mean(-1)
