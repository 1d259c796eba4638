"""Google's emoji in many guises, for training a base model that tells style from content.

A caption without a style word means Google's present style. The same emoji also come as Google
drew them in earlier years and restyled by simple filters, which a word in the caption names; at
other scales and positions, which SDXL's micro-conditioning names; and mirrored, slightly recoloured
or with a vague caption, which nothing names. A model that sees one image per caption learns it by
heart, ignores the noisy image that it is to clean, and no adapter can move it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from oplora.harness.emoji import CATEGORIES, PICTURES, SIZE, emoji

Filter = Callable[[Image.Image], Image.Image]


class Variant(NamedTuple):
    """A training example: RGB 64×64, its caption and SDXL's six numbers."""

    image: Image.Image
    text: str
    time_ids: list[int]  # (height, width) before the crop, the crop's (top, left), and after it


def tinted(colour: str) -> Filter:
    """Shades of one colour, half mixed with the original; white stays white."""

    def tint(image: Image.Image) -> Image.Image:
        shades = ImageOps.colorize(ImageOps.grayscale(image), colour, "white")
        return Image.blend(image, shades, 0.5)

    return tint


def darkened(image: Image.Image) -> Image.Image:
    """All but white darker (a gamma of 2)."""
    return image.point([round(255 * (value / 255) ** 2) for value in range(256)] * 3)


def shaded(image: Image.Image) -> Image.Image:
    """Darker and darker from the top to the bottom."""
    gradient = Image.linear_gradient("L").resize(image.size)
    return Image.composite(darkened(image), image, gradient)


def sketched(image: Image.Image) -> Image.Image:
    """Contours on white."""
    edges = ImageOps.grayscale(image).filter(ImageFilter.CONTOUR)
    return ImageOps.autocontrast(edges).convert("RGB")


FILTERS: dict[str, Filter] = {
    "grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "pale": lambda image: Image.blend(image, Image.new("RGB", image.size, "white"), 0.5),
    "soft": lambda image: image.filter(ImageFilter.GaussianBlur(1.5)),
    "posterised": lambda image: image.quantize(5).convert("RGB"),
    "sketched": sketched,
    "dark": darkened,
    "shaded": shaded,
    "red": tinted("red"),
    "green": tinted("green"),
    "blue": tinted("blue"),
    "violet": tinted("purple"),
}
FORMER_STYLES = {"google2020": "flat", "google2017": "blob"}
KINDS = ("google", *FORMER_STYLES, "filtered", "others")


def variants(
    count: int,
    shares: Mapping[str, float],
    *,
    coloured: float,
    mirrored: float,
    scaled: float,
    vague: float,
    split: str = "train",
    categories: Sequence[str] = CATEGORIES,
    seed: int = 0,
) -> Iterator[Variant]:
    """`count` random variants; the n-th depends on the arguments and n only.

    shares: how often each of `KINDS` is drawn, of a sum of 1: Google's style, its style of
        earlier years, filtered, and Google's emoji of all other categories.
    coloured, mirrored, scaled: shares of images with other colours (`recoloured`), mirrored and
        at other scales (`framed`), which no caption tells.
    vague: the share of captions without the emoji's name ("face smiling").
    """
    if unknown := shares.keys() - set(KINDS):
        raise ValueError(f"no kind of variant is called {min(unknown)!r}: choose from {KINDS}")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"the shares of the variants sum to {sum(shares.values())}, not to 1")
    others = [category for category in PICTURES if category not in categories]
    pools = {}
    for kind in shares:
        style = kind if kind.startswith("google") else "google"
        rows = emoji(style, split, others if kind == "others" else categories)
        pools[kind] = list(zip(rows[:]["image"], rows[:]["text"], strict=True))
    for index in range(count):
        draw = np.random.default_rng((seed, index))
        kind = draw.choice(list(shares), p=list(shares.values()))
        image, text = pools[kind][draw.integers(len(pools[kind]))]
        if draw.random() < vague:
            text = text.partition(", ")[2]
        if kind == "filtered":
            name = draw.choice(list(FILTERS))
            image, text = FILTERS[name](image), f"{name}: {text}"
        elif kind in FORMER_STYLES:
            text = f"{FORMER_STYLES[kind]}: {text}"
        if draw.random() < coloured:
            image = recoloured(image, draw)
        if draw.random() < mirrored:
            image = ImageOps.mirror(image)
        side = SIZE + (int(draw.integers(-12, 17)) if draw.random() < scaled else 0)
        top, left = draw.integers(0, max(side - SIZE, 0) + 1, 2).tolist()
        yield Variant(framed(image, side, top, left), text, [side, side, top, left, SIZE, SIZE])


def recoloured(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Hues turned by up to 10 degrees, saturation scaled by 0.75 to 1.25; greys stay."""
    turn, factor = int(draw.integers(-7, 8)), draw.uniform(0.75, 1.25)
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + turn) % 256 for level in range(256)])
    saturation = saturation.point([min(255, round(factor * level)) for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def framed(image: Image.Image, side: int, top: int = 0, left: int = 0) -> Image.Image:
    """64×64 pixels of the image at side × side: a crop, or a smaller image centred on white."""
    if side != SIZE:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    if side < SIZE:
        top = left = -((SIZE - side) // 2)
    frame = Image.new("RGB", (SIZE, SIZE), "white")
    frame.paste(image, (-left, -top))
    return frame
