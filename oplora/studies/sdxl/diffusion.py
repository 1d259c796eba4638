"""Fine-tuning SDXL: cached inputs, the denoising loss as a module, export."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy
import torch
from datasets import Array2D, Array3D, Dataset, Features, Value
from datasets import Sequence as Values
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from filelock import FileLock
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from oplora.baselines.products import Factors, plain_lora


def encode(
    images: Dataset,
    pipeline: StableDiffusionXLPipeline,
    folder: Path,
    resolution: int,
    crop_seed: int | None = None,
    batch_size: int = 8,
) -> Dataset:
    """Latents, text embeddings and micro-conditioning of every image, computed once.

    images: columns `image` (PIL) and `text`. Crops are central, or with `crop_seed` drawn once
        for every image (upstream draws anew each epoch, which cached latents cannot).
    folder: keeps the result, under a hash of the images' and the encoders' content.
    Returns the columns latent_mean and latent_std (c, h, w), scaled as the U-Net expects them,
    prompt_embeds (tokens, d), pooled_prompt_embeds (d) and time_ids (6), all float32.
    """

    @torch.no_grad()
    def rows(batch: dict, indices: list[int]) -> dict[str, numpy.ndarray]:
        crops = [
            crop(image, resolution, None if crop_seed is None else (crop_seed, index))
            for image, index in zip(batch["image"], indices, strict=True)
        ]
        pixels = pipeline.image_processor.preprocess([image for image, _ in crops])
        vae = pipeline.vae
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        prompt, _, pooled, _ = pipeline.encode_prompt(
            batch["text"], device=vae.device, do_classifier_free_guidance=False
        )
        columns = {
            "latent_mean": latents.mean * vae.config.scaling_factor,
            "latent_std": latents.std * vae.config.scaling_factor,
            "prompt_embeds": prompt,
            "pooled_prompt_embeds": pooled,
            "time_ids": torch.tensor([time_ids for _, time_ids in crops]),
        }
        return {name: column.float().cpu().numpy() for name, column in columns.items()}

    folder.mkdir(parents=True, exist_ok=True)
    key = _content_hash(images, pipeline, (resolution, crop_seed))
    with FileLock(folder / f".{key}.lock"):  # other runs and processes wait for the one file
        encoded = images.map(
            rows,
            batched=True,
            batch_size=batch_size,
            with_indices=True,
            remove_columns=images.column_names,
            features=Features({k: _feature(v[0]) for k, v in rows(images[:1], [0]).items()}),
            cache_file_name=str(folder / f"{key}.arrow"),
            new_fingerprint=key,
            desc="Latents and text embeddings",
        )
    return encoded.with_format("torch")


@torch.no_grad()
def encode_prompts(prompts: list[str], pipeline: StableDiffusionXLPipeline) -> Dataset:
    """The columns of `encode` that drawing needs: prompt_embeds and pooled_prompt_embeds."""
    prompt, _, pooled, _ = pipeline.encode_prompt(
        prompts, device=pipeline.vae.device, do_classifier_free_guidance=False
    )
    columns = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
    columns = {name: column.float().cpu().numpy() for name, column in columns.items()}
    features = Features({name: _feature(rows[0]) for name, rows in columns.items()})
    return Dataset.from_dict(columns, features=features).with_format("torch")


def crop(
    image: Image.Image, resolution: int, seed: tuple[int, int] | None = None
) -> tuple[Image.Image, list[int]]:
    """A square of side `resolution`, and SDXL's micro-conditioning of it.

    The short side is scaled to `resolution`; the crop is central without a seed. The six numbers
    are the original size, the crop's top left corner and the target size, each (height, width).
    """
    image = image.convert("RGB")
    width, height = image.size
    scale = resolution / min(width, height)
    size = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    free = numpy.array(size) - resolution
    if seed is None:
        left, top = free // 2
    else:
        left, top = numpy.random.default_rng(seed).integers(free + 1)
    square = image.crop((left, top, left + resolution, top + resolution))
    return square, [height, width, int(top), int(left), resolution, resolution]


class DenoisingLoss(nn.Module):
    """SDXL's training loss as a module that HF Trainer can train.

    E ‖target − U-Net(noisy latent, t, caption)‖², where the target is the noise or the velocity,
    whichever the scheduler's prediction type names. Its state dict holds what is trained only, so
    that checkpoints are small.
    """

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDPMScheduler):
        super().__init__()
        self.unet, self.scheduler = unet, scheduler
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"no loss for prediction type {scheduler.config.prediction_type!r}")

    def forward(
        self,
        latent_mean: Tensor,
        latent_std: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        time_ids: Tensor,
        noise_seed: Tensor | None = None,
        return_loss: bool = True,  # the name by which Trainer knows that evaluation gives a loss
    ) -> dict[str, Tensor]:
        """Columns of `encode`, batched. noise_seed (batch): fixes the noise of held-out rows."""
        posterior, noise, steps = self._draw(latent_mean, noise_seed)
        dtype = self.unet.dtype
        latents = (latent_mean + latent_std * posterior).to(dtype)
        noise = noise.to(dtype)
        predicted = self.unet(
            self.scheduler.add_noise(latents, noise, steps),
            steps,
            prompt_embeds.to(dtype),
            added_cond_kwargs={"text_embeds": pooled_prompt_embeds.to(dtype), "time_ids": time_ids},
        ).sample
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, steps)
        else:
            target = noise
        return {"loss": F.mse_loss(predicted.float(), target.float())}

    def _draw(self, like: Tensor, seeds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        count = self.scheduler.config.num_train_timesteps
        if seeds is None:
            steps = torch.randint(count, like.shape[:1], device=like.device)
            return torch.randn_like(like), torch.randn_like(like), steps
        rows = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        draws = [torch.randn((2, *like.shape[1:]), generator=row) for row in rows]
        steps = [torch.randint(count, (), generator=row) for row in rows]
        posterior, noise = torch.stack(draws, 1).to(like.device)
        return posterior, noise, torch.stack(steps).to(like.device)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        whole = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in whole.items() if name in trained}

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        missing = self.state_dict().keys() - state_dict.keys()
        if strict and missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors, as {min(missing)}")
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        result.missing_keys[:] = sorted(missing)
        return result

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None):
        self.unet.enable_gradient_checkpointing()


def example_loss(unet: UNet2DConditionModel, rows: int, resolution: int) -> Tensor:
    """A loss of inputs of the real shapes, for the dry run (`oplora.harness.cost`)."""
    config, side = unet.config, resolution // 8
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    extra = {"text_embeds": torch.zeros(rows, pooled), "time_ids": torch.zeros(rows, 6)}
    noisy = torch.zeros(rows, config.in_channels, side, side)
    text = torch.zeros(rows, 77, config.cross_attention_dim)
    steps = torch.zeros(rows, dtype=torch.long)
    return unet(noisy, steps, text, added_cond_kwargs=extra).sample.float().square().mean()


def held_out(encoded: Dataset, draws: int) -> Dataset:
    """Every row `draws` times, each with noise and a time step of its own that never change."""
    rows = encoded.select(list(range(len(encoded))) * draws)
    return (
        rows.with_format(None).add_column("noise_seed", list(range(len(rows)))).with_format("torch")
    )


class Snapshots(TrainerCallback):
    """Calls `measure(step)` at the given steps of the training, on the model as it is then."""

    def __init__(self, steps: Iterable[int], measure: Callable[[int], None]):
        self.steps, self.measure = set(steps), measure

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step in self.steps and state.is_world_process_zero:
            for each in (model, optimizer):  # schedule-free optimizers have modes, too
                each.eval()
            self.measure(state.global_step)
            for each in (model, optimizer):
                each.train()


def export(
    unet: UNet2DConditionModel,
    folder: Path,
    initial: dict[str, Tensor],
    factors: Factors | None = None,
) -> None:
    """Save what was trained: LoRA and DoRA as stock diffusers loads them, others as tensors.

    initial: `adapter_state(unet)` before training. Where a start took A and B out of the base
    weights (PiSSA, OLoRA) the exported difference is B·A − B0·A0, an adapter of twice the rank.
    factors: what is saved in place of the present adapter.
    """
    state, config = adapter_state(unet), getattr(unet, "peft_config", {}).get("default")
    if not isinstance(config, LoraConfig):
        state = state or {n: p.detach() for n, p in unet.named_parameters() if p.requires_grad}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "trained.safetensors")
        return
    if factors is not None:
        state, config = plain_lora(config, factors)
        initial = {}
    metadata = config.to_dict()
    if isinstance(config.target_modules, set):  # sorted, the same run writes the same bytes
        metadata["target_modules"] = sorted(config.target_modules)
    if any(tensor.any() for name, tensor in initial.items() if "lora_B" in name):
        if config.use_dora:
            raise ValueError("DoRA with a start that changes the base weights cannot be exported")
        for name, first in initial.items():
            parts = [state[name], -first if "lora_B" in name else first]
            state[name] = torch.cat(parts, dim=1 if "lora_B" in name else 0)
        scale = 2**0.5 if config.use_rslora else 2  # alpha over the rank, or over its root
        metadata |= dict(
            r=2 * config.r, lora_alpha=scale * config.lora_alpha, init_lora_weights=True
        )
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=state, unet_lora_adapter_metadata=metadata
    )


def adapter_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """A copy of the adapter's tensors under PEFT's names; empty without an adapter."""
    if not getattr(unet, "peft_config", None):
        return {}
    return {name: t.detach().clone() for name, t in get_peft_model_state_dict(unet).items()}


def _feature(row: numpy.ndarray):
    kinds = {1: lambda shape: Values(Value("float32"), length=shape[0])}
    kinds |= {
        2: lambda shape: Array2D(shape, "float32"),
        3: lambda shape: Array3D(shape, "float32"),
    }
    return kinds[row.ndim](row.shape)


def _content_hash(images: Dataset, pipeline: StableDiffusionXLPipeline, options: tuple) -> str:
    digest = hashlib.sha256(repr(options).encode())
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        for name, tensor in part.state_dict().items():
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(name.encode() + raw.numpy().tobytes())
    for row in images:
        digest.update(f"{row['text']}{row['image'].mode}{row['image'].size}".encode())
        digest.update(row["image"].tobytes())
    return digest.hexdigest()[:16]
