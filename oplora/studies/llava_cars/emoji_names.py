"""Naming emoji across vendors, for the small preset of Table 4: real images, one name each.

The projector learns names from two vendors' drawings and is tested on a third vendor's, which
nothing was trained on. The learning rate is chosen on Google's drawings of 2017, another style
that nothing was trained on. The base model has read the names of all other emoji, and of these
only their kind ("animal mammal"), as LLaVA knows a car but not its make and year.
"""

import hashlib
import random
from collections.abc import Iterator

from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Images
from PIL import ImageEnhance, ImageFilter, ImageOps

from oplora.harness.emoji import PICTURES, emoji

NAMED = ("Animals & Nature", "Food & Drink")  # the categories that classes are taken from
TRAINED = ("google", "twemoji")
VALIDATION, TEST = "google2017", "fluent"
BASE_STYLES = ("google", "google2020", "twemoji")  # what the base model has seen
WORDS = 3  # at most, in the name of a class


def sides(classes: int, copies: int, seed: int) -> dict[str, Dataset]:
    """train, validation and test: columns id, image (encoded) and label (a ClassLabel).

    copies: of each training drawing, the first as it is and the others augmented.
    """
    names = class_names(classes)
    drawings: dict[str, list] = {"train": [], "validation": [], "test": []}
    for style in TRAINED:
        for id, image in drawings_of(style, names):
            chance = random.Random(f"{seed} {style} {id}")
            for copy in range(copies):
                shown = augmented(image, chance) if copy else image
                drawings["train"].append((f"{style}/{id}/{copy}", shown, names[id]))
    for side, style in (("validation", VALIDATION), ("test", TEST)):
        for id, image in drawings_of(style, names):
            drawings[side].append((f"{style}/{id}", image, names[id]))
    return {side: _dataset(rows, sorted(names.values())) for side, rows in drawings.items()}


def class_names(count: int) -> dict[str, str]:
    """Names of `count` emoji by id: those of `NAMED` that every style has, in a fixed order."""
    known = set(emoji(VALIDATION, None, NAMED)["id"])
    rows = emoji(TEST, None, NAMED)
    found = {
        id: name
        for id, text in zip(rows["id"], rows["text"], strict=True)
        if id in known and len((name := text.partition(", ")[0]).split()) <= WORDS
    }
    if not 2 <= count <= len(found):
        raise ValueError(f"classes={count}: choose from 2 to {len(found)}, as many as there are")
    chosen = sorted(found, key=lambda id: hashlib.sha256(id.encode()).digest())[:count]
    return {id: found[id] for id in chosen}


def base_captions(classes: int) -> Iterator[tuple[str, str, Images.Image, str]]:
    """Style, id, drawing and caption of all emoji that the base model learns from.

    The caption is the name, but the kind for the classes.
    """
    names = class_names(classes)
    for style in BASE_STYLES:
        for row in emoji(style, None, PICTURES):
            name, _, kind = row["text"].partition(", ")
            yield style, row["id"], row["image"], kind if row["id"] in names else name


def augmented(image: Images.Image, chance: random.Random) -> Images.Image:
    """The drawing turned, scaled and shifted a little, in other shades, softer or mirrored."""
    zoom = chance.uniform(0.8, 1.1)
    shift = tuple(chance.uniform(-0.06, 0.06) * side for side in image.size)
    image = ImageOps.mirror(image) if chance.random() < 0.5 else image
    image = image.rotate(
        chance.uniform(-15, 15), Images.Resampling.BICUBIC, translate=shift, fillcolor="white"
    )
    middle = [side / 2 for side in image.size]
    image = image.transform(
        image.size,
        Images.Transform.AFFINE,
        (1 / zoom, 0, middle[0] * (1 - 1 / zoom), 0, 1 / zoom, middle[1] * (1 - 1 / zoom)),
        Images.Resampling.BICUBIC,
        fillcolor="white",
    )
    turn = chance.randrange(-10, 11)  # of 256, around the circle of hues
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(n + turn) % 256 for n in range(256)])
    image = Images.merge("HSV", (hue, saturation, value)).convert("RGB")
    image = ImageEnhance.Color(image).enhance(chance.uniform(0.6, 1.4))
    gamma = chance.uniform(0.6, 1.6)  # which leaves the ground white
    image = image.point([round(255 * (n / 255) ** gamma) for n in range(256)] * 3)
    return image.filter(ImageFilter.GaussianBlur(chance.uniform(0, 1)))


def drawings_of(style: str, names: dict[str, str]) -> Iterator[tuple[str, Images.Image]]:
    """Ids and drawings in a style of the emoji in `names`, but those that it lacks."""
    rows = emoji(style, None, NAMED)
    for position, id in enumerate(rows["id"]):
        if id in names:
            yield id, rows[position]["image"]


def _dataset(rows: list[tuple], labels: list[str]) -> Dataset:
    features = Features(id=Value("string"), image=Image(), label=ClassLabel(names=labels))
    ids, images, names = (list(column) for column in zip(*rows, strict=True))
    encoded = Dataset.from_dict({"id": ids, "image": images, "label": names}, features=features)
    return encoded.cast_column("image", Image(decode=False))
