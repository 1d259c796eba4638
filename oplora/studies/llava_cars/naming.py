"""Pictures with labels as a vision-language model's inputs: prompt, then the label."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from PIL import Image as Images
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from oplora.harness.completion import IGNORED, encode_completion


class Picture(NamedTuple):
    """One image as the model takes it: pixels (3, side, side), or features (tokens, size)."""

    id: str
    label: str
    pixel_values: Tensor


class Pictures(TorchDataset):
    """Pictures of a data set with the columns id, image (encoded) and label (a ClassLabel).

    ValueError names the record whose image cannot be decoded or whose label is not in the list.
    """

    def __init__(self, rows: Dataset, image_processor: BaseImageProcessor):
        self.rows, self.image_processor = rows, image_processor
        self.classes: list[str] = rows.features["label"].names
        self.labels = [
            _label(id, number, self.classes)
            for id, number in zip(rows["id"], rows["label"], strict=True)
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Picture:
        if index >= len(self):
            raise IndexError(index)  # what ends a for loop
        row = self.rows[index]
        image = opened(row["id"], row["image"])
        pixels = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return Picture(row["id"], self.labels[index], pixels)


def opened(id: str, image: dict[str, Any]) -> Images.Image:
    """An encoded image of `datasets` in RGB, what is transparent on white.

    ValueError names the record if the image is damaged or missing.
    """
    try:
        decoded = Images.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])
        decoded.load()
    except (OSError, SyntaxError, ValueError, TypeError, Images.DecompressionBombError) as error:
        raise ValueError(
            f"{id}: the image is damaged or missing ({error}); replace it, or leave the record out"
        ) from error
    if decoded.has_transparency_data:
        decoded = decoded.convert("RGBA")
        white = Images.new("RGBA", decoded.size, "white")
        decoded = Images.alpha_composite(white, decoded)
    return decoded.convert("RGB")


class NamingCollator:
    """Tensors of pictures, padded on the left, so that all labels end at the last position.

    prompt: with {image} where the model's image tokens stand. image_token: its text. The target
    is a space and the label, then the end-of-sequence token; nothing else has loss.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        image_token: str,
        image_tokens: int,
        cutoff: int,
    ):
        if prompt.count("{image}") != 1:
            raise ValueError(f"prompt={prompt!r} must contain {{image}} exactly once")
        self.prompt = prompt.replace("{image}", image_token * image_tokens)
        self.tokenizer, self.cutoff = tokenizer, cutoff
        own = tokenizer.pad_token_id
        self.padding = tokenizer.eos_token_id if own is None else own

    def __call__(self, pictures: Sequence[Picture]) -> dict[str, Tensor | int]:
        """What the model's forward takes, with labels (batch, kept) and `logits_to_keep`.

        Logits are computed where labels are, and one position before, which predicts the first.
        """
        encoded = [
            encode_completion(self.tokenizer, self.prompt, f" {p.label}", cutoff=self.cutoff)
            for p in pictures
        ]
        kept = 1 + max(sum(x != IGNORED for x in each["labels"]) for each in encoded)
        batch = self._padded([each["input_ids"] for each in encoded])
        labels = [torch.tensor([IGNORED] * kept + each["labels"])[-kept:] for each in encoded]
        return {
            **batch,
            "pixel_values": torch.stack([p.pixel_values for p in pictures]),
            "labels": torch.stack(labels),
            # Positions, not their number: the slice of a number is not contiguous, and torch
            # would copy the head's weights once for every picture.
            "logits_to_keep": torch.arange(-kept, 0) + batch["input_ids"].shape[1],
        }

    def prompts(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """What `generate` takes."""
        ids = self.tokenizer(self.prompt)["input_ids"]
        pixels = torch.stack([p.pixel_values for p in pictures])
        return {**self._padded([ids] * len(pictures)), "pixel_values": pixels}

    def _padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        length = max(map(len, rows))
        ids = [[self.padding] * (length - len(row)) + row for row in rows]
        mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _label(id: str, number: int | None, classes: list[str]) -> str:
    if number is None or not 0 <= number < len(classes):
        raise ValueError(
            f"{id}: label {number} is not in the list of {len(classes)} classes; correct it, or "
            "leave the record out"
        )
    return classes[number]
