"""Training steps of every method side by side: seconds, and peak memory in a process of its own.

Used by scripts/benchmark.py; `python scripts/benchmark_training.py MODEL RANK METHOD` prints the
bytes that two steps of one method take at most.
"""

import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from full_size_step import ATTENTION, pooled_size, random_unet, sdxl_unet
from omegaconf import OmegaConf
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM, LlamaConfig

import oplora
from oplora.baselines import create_lora_pro_optimizer, create_lora_rite_optimizer
from oplora.baselines.scaled import create_op_scaled_optimizer
from oplora.harness.methods import add_adapter
from oplora.harness.runs import peak_memory_bytes
from oplora.mlp import AdapterMLP
from oplora.peft import adapter_blocks, create_oplora_lite_optimizer, create_plain_optimizer
from oplora.studies.sdxl.diffusion import DenoisingLoss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
TINY_SDXL = ROOT / "results/base_models/tiny_sdxl"


class Workload(NamedTuple):
    """A model, the layers that get adapters, and what one training step reads."""

    model: nn.Module
    targets: list[str]
    loss: Callable[[nn.Module], Tensor]


class InGraph(nn.Module):
    """OP-LoRA as the paper writes it: an MLP per layer, through autograd at every step."""

    def __init__(self, model: nn.Module):
        super().__init__()
        blocks, _ = adapter_blocks(model)
        self.model = [model.requires_grad_(False)]  # not a part of what is trained
        self.names = [name for block in blocks for name in block.names]
        self.mlps = nn.ModuleList(AdapterMLP(block.tensors).to(DEVICE) for block in blocks)

    def forward(self, **inputs):
        values = [value for mlp in self.mlps for value in mlp()]
        return functional_call(
            self.model[0], dict(zip(self.names, values, strict=True)), kwargs=inputs
        )


PLAIN = partial(create_plain_optimizer, optimizer_cls=AdamW, lr=1e-4, weight_decay=0.0, fused=True)
OP = partial(oplora.create_oplora_optimizer, lr=1e-4, weight_decay=0.0)
# For every method how PEFT's LoRA is changed (None: no adapter) and model → optimizer.
METHODS: dict[str, tuple[dict | None, Callable[[nn.Module], Optimizer]]] = {
    "lora": ({}, PLAIN),
    "oplora": ({}, OP),
    "oplora_lite": ({}, partial(create_oplora_lite_optimizer, lr=1e-4, weight_decay=0.0)),
    "oplora_in_graph_fused": ({}, PLAIN),
    "oplora_in_graph_foreach": ({}, partial(PLAIN, fused=None, foreach=True)),
    "dora": ({"use_dora": True}, PLAIN),
    "opdora": ({"use_dora": True}, OP),
    "lora_pro": ({}, partial(create_lora_pro_optimizer, lr=1e-4)),
    "lora_rite": ({}, partial(create_lora_rite_optimizer, lr=1e-4)),
    "loraplus": (
        {},
        partial(
            create_loraplus_optimizer,
            optimizer_cls=AdamW,
            lr=1e-4,
            loraplus_lr_ratio=16,
            fused=True,
        ),
    ),
    "riemannian": (
        {},
        partial(create_riemannian_optimizer, optimizer_cls=AdamW, lr=1e-4, reg=0.01),
    ),
    "op_scaled": ({}, partial(create_op_scaled_optimizer, lr=1e-4, weight_decay=0.0, reg=0.01)),
    "scale": ({}, partial(oplora.create_scale_optimizer, lr=1e-4, weight_decay=0.0)),
    "full": (None, PLAIN),
}


def smollm2() -> Workload:
    """SmolLM2-135M's sizes with random weights, which cost the same; 8 × 64 tokens, fp32."""
    sizes = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, vocab_size=49152)
    config = LlamaConfig(
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, **sizes
    )
    return _language(AutoModelForCausalLM.from_config(config).to(DEVICE), (8, 64))


def llama_7b() -> Workload:
    """LLaMA-7B's sizes with random weights in bfloat16, 4 × 256 tokens, autocast."""
    config = LlamaConfig(**OmegaConf.load(CONFIGS / "commonsense/paper.yaml").architecture)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return _autocast(_language(model, (4, 256)))


def _language(model: nn.Module, shape: tuple[int, int]) -> Workload:
    tokens = torch.randint(model.config.vocab_size, shape, device=DEVICE)
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    return Workload(model, targets, lambda model: model(input_ids=tokens, labels=tokens).loss)


def _autocast(workload: Workload) -> Workload:
    def loss(model: nn.Module) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return workload.loss(model)

    return workload._replace(loss=loss)


def tiny_sdxl() -> Workload:
    """The tiny SDXL's U-Net, 16 images of 64 × 64, fp32."""
    unet = UNet2DConditionModel.from_pretrained(TINY_SDXL, subfolder="unet")
    return _denoising(unet.to(DEVICE), images=16, side=64, tokens=20)


def sdxl() -> Workload:
    """SDXL's U-Net with random weights in bfloat16, 1 image of 1024 × 1024, autocast."""
    return _autocast(_denoising(random_unet(sdxl_unet(), DEVICE), images=1, side=1024, tokens=77))


def _denoising(unet: UNet2DConditionModel, images: int, side: int, tokens: int) -> Workload:
    config = unet.config
    latents = (images, config.in_channels, side // 8, side // 8)
    inputs = dict(
        latent_mean=torch.randn(latents, device=DEVICE),
        latent_std=torch.ones(latents, device=DEVICE),
        prompt_embeds=torch.randn(images, tokens, config.cross_attention_dim, device=DEVICE),
        pooled_prompt_embeds=torch.randn(images, pooled_size(unet), device=DEVICE),
        time_ids=torch.tensor([[side, side, 0, 0, side, side]] * images, device=DEVICE),
    )
    module = DenoisingLoss(unet, DDPMScheduler())
    return Workload(module, ATTENTION, lambda model: model(**inputs)["loss"])


WORKLOADS = {f.__name__: f for f in (smollm2, tiny_sdxl, llama_7b, sdxl)}


def prepare(workload: Workload, rank: int, method: str) -> tuple[Callable[[], Tensor], Optimizer]:
    """Loss and optimizer of a method; frozen weights are shared with the workload's model."""
    changes, create_optimizer = METHODS[method]
    shared = {} if changes is None else {id(p): p for p in workload.model.parameters()}
    model = copy.deepcopy(workload.model, shared).train()
    model.requires_grad_(changes is None)
    if changes is not None:
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=workload.targets, **changes)
        if isinstance(model, DenoisingLoss):
            add_adapter(model.unet, lora)
        else:
            model = add_adapter(model, lora)
    if "in_graph" in method:
        model = InGraph(model)
    return partial(workload.loss, model), create_optimizer(model)


def spread(values) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def seconds(function: Callable) -> float:
    """Of one call; on a GPU the time of its kernels."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def timed_step(loss: Callable[[], Tensor], optimizer: Optimizer) -> tuple[float, float]:
    """Seconds of forward and backward together, and of the optimizer."""
    optimizer.zero_grad()
    return seconds(lambda: loss().backward()), seconds(optimizer.step)


def peak_memory(model: str, rank: int, method: str) -> int:
    """Bytes at most during two steps of one method, in a process of its own."""
    command = [sys.executable, __file__, model, str(rank), method]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    name, rank, method = sys.argv[1:]
    torch.set_num_threads(1)
    step = prepare(WORKLOADS[name](), int(rank), method)
    # Only in the second step do activations and the optimizer's moments meet.
    for _ in range(2):
        timed_step(*step)
    print(peak_memory_bytes())
