"""OP-LoRA training steps of SDXL's U-Net at its real size, with random weights: does it fit?

python scripts/full_size_step.py [--resolution 256] [--gradient-checkpointing]
Writes results/benchmarks/full_size_step.json. Downloads nothing; takes a GPU where there is one.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

import oplora
from oplora.harness.methods import add_adapter
from oplora.harness.runs import environment, peak_memory_bytes, reset_peak_memory, write_atomically

PAPER = Path(__file__).resolve().parent.parent / "configs" / "sdxl" / "paper.yaml"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TIME_IDS = 6  # original size, crop corner, target size
PHASES = ("forward", "backward", "optimizer_step")


def sdxl_unet() -> dict:
    """Config of SDXL 1.0's U-Net."""
    return yaml.safe_load(PAPER.read_text(encoding="utf-8"))["architecture"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resolution", type=int, default=256, help="of the image; default: 256")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    # Only from the second step on do activations and the optimizer's moments meet in memory.
    parser.add_argument("--steps", type=int, default=2, help="default: 2")
    parser.add_argument("--mlp-width", type=int, default=32, help="default: 32")
    parser.add_argument("--unet", type=Path, help="another U-Net's config.json; default: SDXL's")
    out = Path("results/benchmarks/full_size_step.json")
    parser.add_argument("--out", type=Path, default=out, help=f"default: {out}")
    options = parser.parse_args(argv)
    if options.resolution % 32 or options.resolution < 32 or options.steps < 1:
        parser.error("--resolution must be a multiple of 32, --steps at least 1")
    config = json.loads(options.unet.read_text()) if options.unet else sdxl_unet()
    result = measure(config, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=1))
    return 0


def measure(config: dict, options: argparse.Namespace) -> dict:
    """Sizes, peak memory and the seconds of every phase, one entry per step."""
    torch.manual_seed(0)
    reset_peak_memory()
    unet = random_unet(config, "cuda" if torch.cuda.is_available() else "cpu")
    unet_parameters = unet.num_parameters()
    unet.requires_grad_(False)
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION, init_lora_weights="gaussian")
    add_adapter(unet, lora)
    cast_training_params(unet)  # adapters in float32, as in diffusers' training script
    unet.train()
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = oplora.create_oplora_optimizer(unet, lr=1e-4, mlp_width=options.mlp_width)
    report = oplora.parameter_report(unet, options.mlp_width)
    losses, seconds = train(unet, optimizer, random_batch(unet, options.resolution), options.steps)
    return {
        "unet_parameters": unet_parameters,
        "adapter_parameters": optimizer.adapter_parameters,
        "mlp_parameters": optimizer.mlp_parameters,
        "mlp_output_parameters": report["mlp_output_parameters"],
        "unet_bytes": 2 * unet_parameters,
        "optimizer_state_bytes": optimizer.state_bytes(),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_memory_gib": round(peak_memory_bytes() / 2**30, 2),
        **{f"{phase}_seconds": seconds[phase] for phase in PHASES},
        "losses": losses,
        "resolution": options.resolution,
        "gradient_checkpointing": options.gradient_checkpointing,
        "mlp_width": options.mlp_width,
        "device": str(unet.device),
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }


@torch.no_grad()
def random_unet(config: dict, device: str) -> UNet2DConditionModel:
    """A U-Net whose weights are made in bfloat16: never held in another precision, nor twice."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).bfloat16()
    unet.to_empty(device=device)
    for name, weight in unet.named_parameters():
        if weight.ndim > 1:
            bound = math.sqrt(3 / weight[0].numel())  # variance 1 / fan-in
            weight.uniform_(-bound, bound)
        else:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)  # norms; biases
    return unet


def pooled_size(unet: UNet2DConditionModel) -> int:
    """Values in the pooled embedding of a caption."""
    config = unet.config
    return config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim


def random_batch(unet: UNet2DConditionModel, resolution: int) -> dict[str, Tensor]:
    """Noisy latents, conditions and the noise to predict of one image."""
    config, side = unet.config, resolution // 8  # the VAE's factor
    shapes = {
        "sample": (1, config.in_channels, side, side),
        "encoder_hidden_states": (1, 77, config.cross_attention_dim),
        "text_embeds": (1, pooled_size(unet)),
        "noise": (1, config.out_channels, side, side),
    }
    batch = {
        name: torch.randn(shape, device=unet.device, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }
    sizes = [resolution, resolution, 0, 0, resolution, resolution]
    return batch | {"time_ids": torch.tensor([sizes], device=unet.device)}


def train(
    unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer, batch: dict, steps: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Losses of the steps, and by phase the seconds of each."""
    batch = dict(batch)
    noise = batch.pop("noise")
    added = {name: batch.pop(name) for name in ("text_embeds", "time_ids")}

    def forward() -> Tensor:
        found = unet(**batch, timestep=500, added_cond_kwargs=added).sample
        return F.mse_loss(found.float(), noise.float())

    losses, seconds = [], {phase: [] for phase in PHASES}
    for step in range(steps):
        print(f"step {step + 1} of {steps}", file=sys.stderr)
        loss = timed(forward, seconds["forward"])
        timed(loss.backward, seconds["backward"])
        timed(optimizer.step, seconds["optimizer_step"])
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, seconds


def timed(function: Callable, seconds: list[float]):
    """What the function returns; the seconds that it took are appended."""
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds.append(round(time.perf_counter() - start, 3))
    return result


if __name__ == "__main__":
    sys.exit(main())
