"""Packages of a few drawn emoji in the cache, in place of the real ones."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from oplora.harness.assets import ASSETS
from oplora.harness.emoji import PICTURES, STYLES


def emoji_packages(cache: Path, per_category: int = 12) -> list[dict]:
    """Write all packages that `emoji` reads; returns the records of their emoji.json."""
    records = [
        {
            "name": f"THING NUMBER {number}", "unified": f"1F{number:03X}-FE0F",
            "image": f"1f{number:03x}-fe0f.png", "category": category,
            "subcategory": "things & others", "sort_order": 1000 - number,
        }
        for number, category in enumerate([*PICTURES, "Flags"] * per_category)
    ]  # fmt: skip
    for position, style in enumerate(STYLES.values()):
        package = cache / f"{style.asset}-{ASSETS[style.asset].version}" / "package"
        side = 256 if style.path.endswith("webp") else 64
        for number, record in enumerate(records):
            path = package / style.path.format(**record, id=record["unified"].lower())
            path.parent.mkdir(parents=True, exist_ok=True)
            drawing(number, position, side).save(path, lossless=True)
        (package / "emoji.json").write_text(json.dumps(records), encoding="utf-8")
    return records


def drawing(number: int, style: int, side: int) -> Image.Image:
    """A rectangle on a transparent ground; its place is the emoji's, its colour the style's too."""
    rng = np.random.default_rng(number)
    pixels = np.zeros((side, side, 4), np.uint8)
    top, left, height, width = rng.integers(side // 8, side // 2, 4)
    colour = (rng.integers(0, 200, 3) + 11 * style, [255])
    pixels[top : top + height, left : left + width] = np.concatenate(colour)
    return Image.fromarray(pixels)
