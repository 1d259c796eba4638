"""A tiny random LLaVA of the very classes, its folder, and a folder of photos of cars."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_language_model import tiny_llama, tiny_tokenizer, with_llamas_tokens
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    PreTrainedTokenizerFast,
)

from oplora.studies.llava_cars.model import Llava

SIDE, PATCH, WIDTH = 16, 8, 24
TOKENS = (SIDE // PATCH) ** 2
CLASSES = ["Acura RL Sedan 2012", "Audi S4 Sedan 2007", "Audi S4 Sedan 2012", "smart fortwo"]
PROMPT = "{image} What is it?"


def tokenizer_with_image() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def tiny_config(tokenizer: PreTrainedTokenizerFast | None = None, **options) -> LlavaConfig:
    tokenizer = tokenizer or tokenizer_with_image()
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=tiny_llama(len(tokenizer)).config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS,
        **options,
    )


def tiny_llava(**options) -> Llava:
    torch.manual_seed(0)
    return Llava(tiny_config(**options)).eval()


def save_llava(folder: Path) -> None:
    """A whole model of transformers' own class with its tokenizer and image processor."""
    torch.manual_seed(0)
    tokenizer = with_llamas_tokens(tokenizer_with_image())
    LlavaForConditionalGeneration(tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side).save_pretrained(folder)


def photo(number: int, mode: str = "RGB") -> Image.Image:
    """A block of a colour and place of its own, wider than high."""
    rng = np.random.default_rng(number)
    pixels = np.full((20, 30, 4), 255, np.uint8)
    pixels[4 + number % 8 :, number % 20 :, :3] = rng.integers(0, 200, 3)
    return Image.fromarray(pixels).convert(mode)


def write_cars(folder: Path, train: int = 5, test: int = 2) -> Path:
    """train/<class>/<number>.png and test/…; one photo is grey, one is transparent in parts."""
    for split, count in (("train", train), ("test", test)):
        for position, name in enumerate(CLASSES):
            for number in range(count):
                mode = {(0, 0): "L", (1, 0): "RGBA"}.get((position, number), "RGB")
                path = folder / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                photo(10 * position + number, mode).save(path)
    return folder
