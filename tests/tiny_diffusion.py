"""A random SDXL pipeline and a random CLIP, of the real classes, and folders of images."""

import json
import string
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)


def tiny_pipeline(prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    characters = list(string.ascii_lowercase + string.digits)
    pieces = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({piece: i for i, piece in enumerate(pieces)}, [], model_max_length=16)
    text = CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=16,
        bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=prediction_type,
    )  # fmt: skip
    encoders = CLIPTextModel(text), CLIPTextModelWithProjection(text)
    return StableDiffusionXLPipeline(
        vae, *encoders, tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    )


def tiny_clip() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            image_size=16, patch_size=8, projection_dim=8,
        )
    )  # fmt: skip


def pictures(count: int) -> list[Image.Image]:
    """Noise of several sizes, the short side 20 pixels."""
    rng = np.random.default_rng(0)
    sizes = [(20, 20 + n % 3) for n in range(count)]
    return [Image.fromarray(rng.integers(0, 255, (*s, 3), dtype=np.uint8)) for s in sizes]


def naruto_folder(folder: Path, count: int = 6) -> Path:
    """The columns image and text, as an image folder."""
    folder.mkdir(parents=True)
    rows = []
    for number, picture in enumerate(pictures(count)):
        picture.save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"a ninja number {number}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def wikiart_folder(folder: Path, count: int = 12) -> Path:
    """The columns image, artist and genre, half of it by Monet, as a parquet file."""
    features = Features(
        image=ImageFeature(),
        artist=ClassLabel(names=["claude-monet", "paul-cezanne"]),
        genre=ClassLabel(names=["cityscape", "Unknown Genre", "genre_painting"]),
    )
    rows = [
        {"image": picture, "artist": n % 2, "genre": n // 2 % 3}
        for n, picture in enumerate(pictures(count))
    ]
    (folder / "data").mkdir(parents=True)
    Dataset.from_list(rows, features=features).to_parquet(folder / "data" / "train.parquet")
    return folder
