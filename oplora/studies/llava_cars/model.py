"""LLaVA whose projector alone is trained (section 5.3), on image features computed once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

LANGUAGE_MODEL = ("model.language_model.", "lm_head.")


class Llava(LlavaForConditionalGeneration):
    """The stock model: tower and language model stay as they are, in any dtype.

    The projector is kept in float32, as small updates would vanish in a bfloat16 weight. The
    language model is not part of what `save_pretrained` writes: it never changes.
    """

    _keep_in_fp32_modules_strict = frozenset({"multi_modal_projector"})

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        frozen = {name for name in self.state_dict() if name.startswith(LANGUAGE_MODEL)}
        self._keys_to_ignore_on_save = frozen
        self.model.multi_modal_projector.register_forward_pre_hook(_in_its_dtype)

    @classmethod
    def from_config(cls, config: LlavaConfig) -> "Llava":
        """Random weights, as transformers' auto classes."""
        return cls(config).requires_grad_(True)

    def requires_grad_(self, requires_grad: bool = True) -> "Llava":
        """Of the projector: "everything" that full fine-tuning trains is this module."""
        super().requires_grad_(False)
        self.model.multi_modal_projector.requires_grad_(requires_grad)
        return self

    def save_pretrained(self, *args, **options) -> None:
        """With the names of `state_dict`, which Trainer looks for when it resumes."""
        super().save_pretrained(*args, **{"save_original_format": False, **options})

    @torch.no_grad()
    def image_features(self, pixel_values: Tensor) -> Tensor:
        """What the projector reads, (images, tokens, size), of pixels (images, 3, side, side)."""
        seen = []
        hook = self.model.multi_modal_projector.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0])
        )
        try:
            self.get_image_features(pixel_values.to(self.device, self.dtype))
        finally:
            hook.remove()
        return seen[0]

    def cache_features(
        self, sides: dict[str, Sequence[Any]], limit_bytes: float, batch_size: int
    ) -> dict[str, Sequence[Any]]:
        """The pictures of all sides with features in place of pixels, if they fit into memory.

        sides: sequences of named tuples with `pixel_values`. Then the tower is dropped; above the
        limit nothing changes, and the tower runs in every step.
        """
        first = next(picture for pictures in sides.values() for picture in pictures)
        features = self.image_features(first.pixel_values[None])
        images = sum(len(pictures) for pictures in sides.values())
        if images * features.nbytes > limit_bytes:
            return sides
        cached: dict[str, Sequence[Any]] = {}
        with tqdm(total=images, desc="Image features", unit="image", leave=False) as bar:
            for side, pictures in sides.items():
                cached[side] = []
                for start in range(0, len(pictures), batch_size):
                    stop = min(start + batch_size, len(pictures))
                    batch = [pictures[n] for n in range(start, stop)]
                    rows = self.image_features(torch.stack([p.pixel_values for p in batch])).cpu()
                    cached[side] += [
                        # a copy: a view would keep the whole batch with every row that is pickled
                        picture._replace(pixel_values=row.clone())
                        for picture, row in zip(batch, rows, strict=True)
                    ]
                    bar.update(len(batch))
        self.model.vision_tower = Precomputed()
        self.config.vision_feature_layer = 0  # its only one, without a class token
        self.config.vision_feature_select_strategy = "full"
        return cached


# Else a subclass is not taken for a LLaVA, and its head's weights on the hub are not found.
register_checkpoint_conversion_mapping("Llava", get_checkpoint_conversion_mapping("llava"))


def example_loss(model: Llava, rows: int, text_tokens: int) -> Tensor:
    """The loss of cached image features and text of these shapes, for the dry run."""
    vision, text = model.config.vision_config, model.config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    images = model.model.multi_modal_projector(torch.zeros(rows, patches, vision.hidden_size))
    words = torch.zeros(rows, text_tokens, text.hidden_size, dtype=model.dtype)
    states = torch.cat([images.to(model.dtype), words], 1)
    labels = torch.zeros(rows, text_tokens, dtype=torch.long)
    kept = torch.arange(states.shape[1] - text_tokens, states.shape[1])
    return model(inputs_embeds=states, labels=labels, logits_to_keep=kept).loss


class Precomputed(nn.Module):
    """In place of a tower: what comes in is what the projector reads."""

    def forward(self, features: Tensor, **_) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(hidden_states=(features,))


def load(folder: str, language_model: str, dtype: torch.dtype) -> Llava:
    """The model that pretraining wrote into `folder`, with the language model of another folder.

    dtype: of the language model. FileNotFoundError says how to make the folder.
    """
    weights = Path(base_folder(folder), "model.safetensors")
    language = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype)
    model = with_language(Llava(LlavaConfig.from_pretrained(folder)), language)
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    wrong = [name for name in missing if not name.startswith(LANGUAGE_MODEL)] + unexpected
    if wrong:
        raise ValueError(f"{weights} does not fit its config.json: {wrong[0]} and {len(wrong) - 1}"
                         " more weights are missing or unknown; make it again")  # fmt: skip
    return model.requires_grad_(True)


def base_folder(folder: str) -> str:
    """The folder of the small preset's base model; FileNotFoundError says how to make it."""
    if not Path(folder, "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model: run `python base_models/tiny_llava/pretrain.py`"
        )
    return folder


def with_language(model: Llava, language: nn.Module) -> Llava:
    """The model with this language model in place of its own."""
    model.model.language_model, model.lm_head = language.model, language.lm_head
    model.generation_config = language.generation_config
    return model


def _in_its_dtype(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].to(module.linear_1.weight.dtype),)
