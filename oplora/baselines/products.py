"""Sums of products B A as one plain LoRA: what starts and chains of LoRA are saved as."""

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Factors = dict[str, tuple[Tensor, Tensor]]  # by layer A (r, d_in) and s B (d_out, r)


def lora_layers(model: nn.Module) -> tuple[dict[str, LoraLayer], str]:
    """Layers with a LoRA, by their names in the adapted model, and the adapter's name.

    The adapted model may be a part of `model`, as a loss around it. ValueError: there is none,
    several adapters are active, or one is on a layer that is not Linear.
    """
    roots = (m for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict))
    root = next(roots, nn.Module())
    layers = {name: m for name, m in root.named_modules() if isinstance(m, LoraLayer)}
    adapters = {adapter for layer in layers.values() for adapter in layer.active_adapters}
    if len(adapters) != 1:
        raise ValueError(f"one LoRA must be active, found {sorted(adapters) or 'none'}")
    (adapter,) = adapters
    for name, layer in layers.items():
        if not isinstance(layer.get_base_layer(), nn.Linear) or layer.use_dora.get(adapter):
            raise ValueError(f"{name}: only plain LoRA on Linear layers is a product B A")
    return layers, adapter


def factors_of(model: nn.Module) -> Factors:
    """A copy of the present adapter."""
    layers, adapter = lora_layers(model)
    return {
        name: (
            layer.lora_A[adapter].weight.detach().clone(),
            layer.lora_B[adapter].weight.detach() * layer.scaling[adapter],
        )
        for name, layer in layers.items()
    }


def negative(factors: Factors) -> Factors:
    return {name: (A, -B) for name, (A, B) in factors.items()}


def joined(*parts: Factors) -> Factors:
    """The sum of the parts' products as one product of their ranks' sum, layer by layer."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for part in parts:
        for name, pair in part.items():
            found.setdefault(name, []).append(pair)
    return {
        name: (torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], 1))
        for name, pairs in found.items()
    }


def plain_lora(config: LoraConfig, factors: Factors) -> tuple[dict[str, Tensor], LoraConfig]:
    """State dict, under PEFT's names, and config of a LoRA that adds these products."""
    ranks = {name.removeprefix("base_model.model."): len(A) for name, (A, _) in factors.items()}
    config = copy.copy(config)
    config.r = config.lora_alpha = max(ranks.values())
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.init_lora_weights, config.use_rslora, config.lora_ga_config = True, False, None
    state = {f"{name}.lora_A.weight": A.contiguous() for name, (A, _) in factors.items()}
    state |= {f"{name}.lora_B.weight": B.contiguous() for name, (_, B) in factors.items()}
    return state, config


def save_plain_lora(model: PeftModel, folder: Path, factors: Factors) -> None:
    """As `model.save_pretrained(folder)`, with these products in place of the present adapter."""
    model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    (config,) = model.peft_config.values()
    state, config = plain_lora(config, factors)
    save_file({**load_file(path), **state}, path, metadata={"format": "pt"})
    config = copy.copy(config)
    config.inference_mode = True
    config.save_pretrained(folder)
