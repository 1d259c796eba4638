"""Captioned emoji in several styles, for the small preset of Table 1.

The same ids and captions in every style, none of which names the style: what "grinning face"
looks like in Microsoft's 3D style must be learned from the images.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value, load_from_disk
from PIL import Image as Images

from oplora.harness.assets import cache_folder, derived, fetch

SIZE = 64
PICTURES = (  # left out: flags, symbols and people (skin tones, families)
    "Smileys & Emotion",
    "Animals & Nature",
    "Food & Drink",
    "Activities",
    "Travel & Places",
    "Objects",
)
CATEGORIES = PICTURES[:3]  # the most alike
SPLITS = ("train", "validation")
ALIGNED = ("google", "twemoji", "fluent")  # styles that have every id
_FEATURES = Features(
    {"id": Value("string"), "category": Value("string"), "text": Value("string"), "image": Image()}
)


@dataclass(frozen=True)
class Style:
    """Where a style's images are: a package of `assets.ASSETS` and a path in it."""

    asset: str
    path: str  # with the fields of an emoji.json record, and `id`


STYLES = {
    "google": Style("emoji-google", "img/google/64/{image}"),
    "google2020": Style("emoji-google-2020", "img/google/64/{image}"),
    "google2017": Style("emoji-google-2017", "img/google/64/{image}"),
    "twemoji": Style("emoji-twemoji", "img/twitter/64/{image}"),
    "fluent": Style("emoji-fluent", "assets/{id}.webp"),
}


def emoji(
    style: str,
    split: str | None = None,
    categories: Sequence[str] = CATEGORIES,
    also_in: str | None = None,
) -> Dataset:
    """Emoji of one style: columns id (code points), category, text and image (RGB 64×64 on white).

    style: "google", "twemoji" and "fluent" have the same rows in the same order; "google2020" and
        "google2017" (Google's style in those years) lack those that were not drawn yet.
    split: "train", "validation" (a tenth, by a hash of the id) or None for both.
    categories: of `PICTURES`.
    also_in: a style; only emoji that it has, too, so that both have the same rows.
    """
    for name, known, kind in [
        (style, STYLES, "style"),
        (also_in, (*STYLES, None), "style"),
        (split, (*SPLITS, None), "split"),
        *((category, PICTURES, "category") for category in categories),
    ]:
        if name not in known:
            choices = ", ".join(repr(choice) for choice in known)
            raise ValueError(f"no {kind} is called {name!r}: choose from {choices}")
    if not categories:
        raise ValueError("no categories: name at least one of oplora.harness.emoji.PICTURES")
    rows = _load(style)
    shared = set((rows if also_in is None else _load(also_in))["id"])
    chosen = [
        index
        for index, (id, category) in enumerate(zip(rows["id"], rows["category"], strict=True))
        if category in categories and split in (None, split_of(id)) and id in shared
    ]
    return rows.select(chosen)


def _load(style: str) -> Dataset:
    folder = derived(STYLES[style].asset, "64px", lambda package, target: _write(style, target))
    return load_from_disk(str(folder))


def split_of(id: str) -> str:
    """The split of an emoji, the same in every style: a tenth is for validation."""
    digest = hashlib.sha256(id.encode()).digest()
    return "validation" if digest[0] < 26 else "train"


def caption(record: dict) -> str:
    """What an emoji.json record shows, without its style: "grinning face, face smiling"."""
    words = f"{record['name']}, {record['subcategory']}".lower().replace("’", "'")
    return " ".join(words.replace("-", " ").replace(" & ", " ").split())


def drawn(path: Path) -> Images.Image:
    """An image file on white, scaled to 64×64; ValueError names a damaged file."""
    try:
        image = Images.open(path).convert("RGBA")
    except OSError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete its package's folder in {cache_folder()}"
        ) from error
    if image.size != (SIZE, SIZE):
        # premultiplied alpha: transparent pixels have colours, which must not bleed into edges
        image = image.convert("RGBa").resize((SIZE, SIZE), Images.Resampling.LANCZOS)
        image = image.convert("RGBA")
    return Images.alpha_composite(Images.new("RGBA", image.size, "white"), image).convert("RGB")


def distinct(rows: Sequence[Sequence[Images.Image]], least: float = 12.0) -> list[int]:
    """Positions of the rows (an emoji in several styles) that are near no earlier one kept.

    Near means an RMS below `least` of 255 in any style. Near-duplicates (two cats are one image
    in Fluent) would stand on both sides of the split.
    """
    alike = np.zeros((len(rows), len(rows)), bool)
    for column in zip(*rows, strict=True):
        pixels = np.stack([np.asarray(image, np.float32).ravel() for image in column])
        length = (pixels**2).sum(1)
        squared = length[:, None] + length - 2 * pixels @ pixels.T
        alike |= squared < least**2 * pixels.shape[1]
    kept: list[int] = []
    for index in range(len(rows)):
        if not alike[index, kept].any():
            kept.append(index)
    return kept


def _choose(package: Path, target: Path) -> None:
    """Write the records of emoji.json that are in all styles, in the standard's order."""
    table = json.loads((package / "package/emoji.json").read_text("utf-8"))
    records = [r | {"id": r["unified"].lower()} for r in table if r["category"] in PICTURES]
    records.sort(key=lambda record: record["sort_order"])
    records = [r for r in records if all(_file(style, r).exists() for style in ALIGNED)]
    kept = distinct([[drawn(_file(style, record)) for style in ALIGNED] for record in records])
    (target / "records.json").write_text(json.dumps([records[i] for i in kept]), "utf-8")


def _file(style: str, record: dict) -> Path:
    return fetch(STYLES[style].asset) / "package" / STYLES[style].path.format(**record)


def _write(style: str, target: Path) -> None:
    """Write a style's images as one dataset: reading a thousand files takes seconds each time."""
    chosen = derived("emoji-google", "records", _choose) / "records.json"
    records = json.loads(chosen.read_text("utf-8"))
    records = [record for record in records if _file(style, record).exists()]
    columns = {
        "id": [record["id"] for record in records],
        "category": [record["category"] for record in records],
        "text": [caption(record) for record in records],
        "image": [drawn(_file(style, record)) for record in records],
    }
    Dataset.from_dict(columns, features=_FEATURES).save_to_disk(str(target))
