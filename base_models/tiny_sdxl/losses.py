"""Losses that train a tiny SDXL from scratch, as modules for HF Trainer."""

from collections.abc import Sequence

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionXLPipeline,
    Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class AutoencoderLoss(nn.Module):
    """Mean absolute error of pixels and of their differences to neighbours, and a KL term.

    The differences keep edges sharp. In training every image gives one random square of `crop`
    pixels: detail is learned as well from a quarter of an image, at a quarter of the time.
    """

    def __init__(self, vae: AutoencoderKL, crop: int, edge_weight: float, kl_weight: float):
        super().__init__()
        self.vae, self.crop = vae, crop
        self.edge_weight, self.kl_weight = edge_weight, kl_weight

    def forward(self, pixels: Tensor, return_loss: bool = True) -> dict[str, Tensor]:
        """pixels: uint8 (batch, 3, height, width)."""
        if self.training:
            pixels = random_squares(pixels, self.crop)
        real = as_floats(pixels)
        posterior = self.vae.encode(real).latent_dist
        latents = posterior.sample() if self.training else posterior.mode()
        error = self.vae.decode(latents).sample.float() - real
        edges = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3))
        information = posterior.kl().float().mean() / latents[0].numel()  # nats per latent number
        loss = error.abs().mean() + self.edge_weight * edges + self.kl_weight * information
        return {"loss": loss}


def as_floats(pixels: Tensor) -> Tensor:
    """Bytes to the range [-1, 1]."""
    return pixels.float() / 127.5 - 1


def random_squares(pixels: Tensor, side: int) -> Tensor:
    """One random square of each image (batch, channels, side, side), half of them mirrored."""
    free = [size - side + 1 for size in pixels.shape[2:]]
    corners = torch.stack([torch.randint(size, pixels.shape[:1]) for size in free], 1).tolist()
    squares = [
        image[:, top : top + side, left : left + side]
        for image, (top, left) in zip(pixels, corners, strict=True)
    ]
    mirrored = torch.rand(len(squares)) < 0.5
    return torch.stack(
        [
            square.flip(-1) if flip else square
            for square, flip in zip(squares, mirrored.tolist(), strict=True)
        ]
    )


@torch.no_grad()
def round_trip_psnr(vae: AutoencoderKL, pixels: Tensor, batch_size: int = 64) -> float:
    """Peak signal-to-noise ratio (dB) of all decoded images (uint8) against the originals."""
    errors = [
        (vae.decode(vae.encode(as_floats(batch)).latent_dist.mode()).sample - as_floats(batch))
        .clamp(-2, 2)
        .square()
        .mean((1, 2, 3))
        for batch in pixels.split(batch_size)
    ]
    return (10 * torch.log10(4 / torch.cat(errors).mean())).item()  # values span 2


@torch.no_grad()
def standardise(vae: AutoencoderKL, pixels: Tensor, batch_size: int = 64) -> None:
    """Give the latents of these images mean 0 in every channel and overall variance 1.

    The mean goes into the 1×1 convolutions around the latents, since SDXL's pipeline knows a
    scaling factor only.
    """
    latents = torch.cat(
        [vae.encode(as_floats(batch)).latent_dist.mode() for batch in pixels.split(batch_size)]
    )
    mean = latents.mean((0, 2, 3))
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    scale = (latents - mean[:, None, None]).std().item()
    vae.register_to_config(scaling_factor=1 / scale)


class PretrainingLoss(nn.Module):
    """Denoising loss of a pipeline's U-Net and both text encoders, trained together.

    The velocity's mean squared error, weighted by min(1, γ / (SNR + 1)): steps with little noise,
    which are many, count less. A share of the captions is dropped (zeros, as the pipeline has
    for an empty prompt). In evaluation mode the moving average of the weights is measured.
    """

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        caption_dropout: float,
        snr_gamma: float,
        average_decay: float,
    ):
        super().__init__()
        parts = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
        start_at_zero(pipeline.unet)
        nn.init.zeros_(pipeline.unet.conv_out.weight)
        # The backward pass of fused attention in bf16 is several times slower on a CPU.
        pipeline.unet.set_attn_processor(AttnProcessor())
        for encoder in parts[1:]:
            encoder.set_attn_implementation("eager")
        self.parts = nn.ModuleList(parts)
        self.average = AveragedModel(
            self.parts, multi_avg_fn=get_ema_multi_avg_fn(average_decay)
        ).requires_grad_(False)
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.caption_dropout, self.snr_gamma = caption_dropout, snr_gamma

    def forward(
        self,
        latents: Tensor,
        input_ids: Tensor,
        time_ids: Tensor,
        noise_seed: Tensor | None = None,
        return_loss: bool = True,  # the name by which Trainer knows that evaluation gives a loss
    ) -> dict[str, Tensor]:
        """latents (batch, c, h, w), input_ids (batch, tokens), time_ids (batch, 6).

        noise_seed (batch): fixes noise and time step of held-out rows.
        """
        unet, *encoders = self.parts if self.training else self.average.module
        prompt, pooled = encode_text(encoders, input_ids.long())
        if self.training:
            kept = (torch.rand(len(latents)) >= self.caption_dropout).to(prompt)
            prompt, pooled = prompt * kept[:, None, None], pooled * kept[:, None]
        latents = latents.float()
        noise, steps = self._draw(latents, noise_seed)
        noisy = self.scheduler.add_noise(latents, noise, steps)
        condition = {"text_embeds": pooled, "time_ids": time_ids.float()}
        predicted = unet(noisy, steps, prompt, added_cond_kwargs=condition).sample.float()
        error = (predicted - self.scheduler.get_velocity(latents, noise, steps)).square()
        weight = (self.snr_gamma / (compute_snr(self.scheduler, steps) + 1)).clamp(max=1)
        return {"loss": (weight * error.mean((1, 2, 3))).mean()}

    def _draw(self, latents: Tensor, seeds: Tensor | None) -> tuple[Tensor, Tensor]:
        count = self.scheduler.config.num_train_timesteps
        if seeds is None:
            return torch.randn_like(latents), torch.randint(count, latents.shape[:1])
        rows = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=row) for row in rows])
        return noise, torch.stack([torch.randint(count, (), generator=row) for row in rows])

    def averaged(self) -> Sequence[nn.Module]:
        """U-Net and text encoders with the moving average of their weights."""
        return list(self.average.module)


@torch.no_grad()
def start_at_zero(model: AutoencoderKL | UNet2DConditionModel) -> None:
    """Zero the last layer of every residual branch: a model learns faster from an identity."""
    for module in model.modules():
        if isinstance(module, ResnetBlock2D | Transformer2DModel):
            end = module.conv2 if isinstance(module, ResnetBlock2D) else module.proj_out
            nn.init.zeros_(end.weight)
            nn.init.zeros_(end.bias)


def encode_text(encoders: Sequence[nn.Module], input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning (both encoders' penultimate states, the second one's projection)."""
    outputs = [encoder(input_ids, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return states, outputs[1].text_embeds
