"""OP-LoRA in a diffusers training script: only the line that builds the optimizer changes.

python examples/diffusers_loop.py OUT
"""

import sys

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from peft import LoraConfig, get_peft_model_state_dict

from oplora import create_oplora_optimizer


def base_model():
    """In place of `UNet2DConditionModel.from_pretrained(…, subfolder="unet")`."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def main(out: str):
    torch.manual_seed(0)
    unet = base_model().requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    # the one line that matters; torch.optim.AdamW(the trained parameters, …) otherwise
    optimizer = create_oplora_optimizer(unet, lr=1e-3)
    ema = EMAModel([p for p in unet.parameters() if p.requires_grad], decay=0.9)
    schedule = DDPMScheduler()
    latents, text = torch.randn(4, 4, 8, 8), torch.randn(4, 3, 16)
    noise, times = torch.randn_like(latents), torch.tensor([10, 200, 500, 900])
    losses = []
    for _ in range(20):
        predicted = unet(schedule.add_noise(latents, noise, times), times, text).sample
        loss = (predicted - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step([p for p in unet.parameters() if p.requires_grad])
        losses.append(loss.item())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=layers)  # a plain LoRA
    print(f"{len(layers)} tensors saved")


if __name__ == "__main__":
    main(*sys.argv[1:])
