"""Chains of LoRA: train, fold into the base, start afresh (COLA, ReLoRA, XGBLoRA)."""

import os
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from oplora.arguments import check_choice
from oplora.baselines.products import Factors, factors_of, lora_layers
from oplora.generators import GeneratorOptimizer
from oplora.optimizer import OPOptimizer

PRUNED = 0.99  # of the moments that ReLoRA prunes, those of least magnitude


class MergeAndRestart(TrainerCallback):
    """HF Trainer callback: `links` LoRAs one after another, of equally many steps each.

    moments, layers, seed: `merge_and_restart`. warmup_steps: over which the rate grows again after
    every restart. Saved by the Trainer at any step is the last link; the links before it are files
    in `chain` beside its checkpoints, from which a resumed training folds them again, and in
    `self.links`, which with the last one `joined` are one LoRA on the first base.
    """

    def __init__(
        self,
        links: int,
        *,
        moments: str = "reset",
        warmup_steps: int = 0,
        layers: float = 1.0,
        seed: int = 0,
    ):
        check_choice("moments", moments, ("keep", "prune", "reset"))
        if not (isinstance(links, int) and links > 0 and 0 < layers <= 1):
            raise ValueError(f"links={links} must be from 1, layers={layers} above 0 and up to 1")
        self.count, self.warmup_steps, self.links = links, warmup_steps, []
        self.options = dict(moments=moments, layers=layers, seed=seed)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if args.load_best_model_at_end:
            raise ValueError(
                "the best checkpoint's link belongs to another base than the last one: set "
                "training.load_best_model_at_end=false for a chain of adapters"
            )
        check_optimizer_restarts(_inside(optimizer))
        self.every, self.links = -(-state.max_steps // self.count), []
        self.folder = Path(args.output_dir, "chain")
        for step in range(self.every, state.global_step + 1, self.every):
            link = load_file(self._path(step))
            names = {key.rpartition(".")[0] for key in link}
            factors = {name: (link[f"{name}.A"], link[f"{name}.B"]) for name in sorted(names)}
            self.links.append(fold(model, factors))
        if self.links:
            choose_layers(model, len(self.links), self.options["layers"], self.options["seed"])

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates = [group["lr"] for group in optimizer.param_groups]
        if self.links and self.warmup_steps:
            share = min(1.0, (state.global_step % self.every + 1) / self.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] *= share

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step % self.every or state.global_step >= state.max_steps:
            return
        number = len(self.links) + 1
        self.links.append(merge_and_restart(model, _inside(optimizer), number, **self.options))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(state.global_step)
        link = self.links[-1].items()
        pairs = {f"{name}.{key}": pair[i] for name, pair in link for i, key in enumerate("AB")}
        save_file({name: t.contiguous() for name, t in pairs.items()}, f"{path}.part")
        os.replace(f"{path}.part", path)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.safetensors"


@torch.no_grad()
def merge_and_restart(
    model: nn.Module,
    optimizer: Optimizer,
    number: int,
    *,
    moments: str = "reset",
    layers: float = 1.0,
    seed: int = 0,
) -> Factors:
    """Fold the adapter into the base and start afresh; returns what was folded.

    number: of the restart, from 1: with the seed it fixes the new A. moments: of A and B, "keep",
    "prune" (as ReLoRA, all but the largest hundredth become zero) or "reset"; OP's MLPs are drawn
    anew. layers: the share of layers, drawn for every link, that the next link trains.
    """
    link = fold(model, factors_of(model))
    found, adapter = lora_layers(model)
    with torch.random.fork_rng():
        torch.manual_seed(1_000_003 * seed + number)
        for layer in found.values():
            layer.reset_lora_parameters(adapter, True)
    choose_layers(model, number, layers, seed)
    if isinstance(optimizer, OPOptimizer):
        optimizer.restart(number)
    else:
        _treat_moments(optimizer, found, adapter, moments)
    return link


def fold(model: nn.Module, link: Factors) -> Factors:
    """Add the products to the base's weights, in these weights' precision; returns the link."""
    found, _ = lora_layers(model)
    with torch.no_grad():
        for name, (A, B) in link.items():
            weight = found[name].get_base_layer().weight
            if not weight.is_floating_point():
                raise ValueError(f"{name} is quantised ({weight.dtype}): nothing folds into it")
            weight += (B @ A).to(weight.device, weight.dtype)
    return link


def choose_layers(model: nn.Module, number: int, share: float, seed: int) -> None:
    """Let this share of the adapted layers, at least one, be trained in link `number`."""
    if share == 1:
        return
    found, adapter = lora_layers(model)
    stream = torch.Generator().manual_seed(1_000_003 * seed + number)
    order = torch.randperm(len(found), generator=stream).tolist()
    chosen = set(order[: max(1, round(share * len(found)))])
    for i, layer in enumerate(found.values()):
        for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
            factor.requires_grad_(i in chosen)


def check_optimizer_restarts(optimizer: Optimizer) -> None:
    if isinstance(optimizer, GeneratorOptimizer):
        raise ValueError("a chain restarts LoRA or OP-LoRA, no other generator of adapters")


def _treat_moments(optimizer: Optimizer, found: dict[str, LoraLayer], adapter: str, how: str):
    for layer in found.values():
        for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
            state = optimizer.state.get(factor.weight, {})
            if how == "reset":
                state.clear()
            elif how == "prune":
                for value in state.values():
                    if torch.is_tensor(value) and value.shape == factor.weight.shape:
                        _prune(value)


def _prune(values: Tensor) -> None:
    kept = max(1, round((1 - PRUNED) * values.numel()))
    values[values.abs() < values.abs().flatten().topk(kept).values[-1]] = 0


def _inside(optimizer) -> Optimizer:
    """The optimizer without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
