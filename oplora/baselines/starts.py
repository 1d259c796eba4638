"""Starts of plain LoRA that no library has: LoRA-One and CoRA."""

import torch
from torch import nn

from oplora.baselines.products import lora_layers


@torch.no_grad()
def lora_one(model: nn.Module, gamma: float = 128.0) -> None:
    """LoRA-One (arXiv 2502.01235): one step down the best rank-r part of the full gradient.

    With -dL/dW = U S V^T, B = U sqrt(S / (gamma S_1)) and A = sqrt(S / (gamma S_1)) V^T, r of each:
    the released code's start "stable", without its preconditioner. The base stays as it is, so the
    model begins a step away from it. The layers hold the gradient as PEFT's `preprocess_loraga`
    leaves it, and lose it here.
    """
    layers, adapter = lora_layers(model)
    for layer in layers.values():
        base, r = layer.get_base_layer(), layer.r[adapter]
        U, S, Vh = torch.linalg.svd(-base._peft_loraga_grad.float(), full_matrices=False)
        root = (S[:r] / (gamma * S[0])).sqrt()
        layer.lora_B[adapter].weight.copy_(U[:, :r] * root)
        layer.lora_A[adapter].weight.copy_(root[:, None] * Vh[:r])
        del base._peft_loraga_grad


@torch.no_grad()
def common_basis(model: nn.Module) -> None:
    """CoRA (arXiv 2409.02119): B is a basis common to all layers of one output size, and frozen.

    The basis is the first r left singular vectors of these layers' weights side by side, and A is
    zero: the paper takes its basis from other models, a recipe that is not public. Its other form,
    the basis as a start alone, needs lora_B's requires_grad set again.
    """
    layers, adapter = lora_layers(model)
    grams: dict[tuple, torch.Tensor] = {}
    for layer in layers.values():
        W = layer.get_base_layer().weight.double()
        key = (len(W), layer.r[adapter])
        grams[key] = grams.get(key, 0) + W @ W.T
    bases = {
        key: torch.linalg.eigh(G).eigenvectors.flip(1)[:, : key[1]] for key, G in grams.items()
    }
    for layer in layers.values():
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        B.copy_(bases[len(B), layer.r[adapter]])
        B.requires_grad_(False)
        A.zero_()
