"""Questions, statements and captions about pictures of one coloured shape.

`FAMILIES[task][family]` makes a text and its answer from a random generator and the pictures that
it is about. easy-vqa's own questions, the task "vqa", are sorted into families by `vqa_family`.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CORNERS = {"circle": "zero", "triangle": "three", "rectangle": "four"}
SHAPES = tuple(CORNERS)
COLORS = ("red", "green", "blue", "yellow", "black", "gray", "teal", "brown")
POLAR = {"yes": True, "true": True, "no": False, "false": False}


@dataclass(frozen=True)
class Picture:
    """An image and what it shows."""

    id: str  # "<split>/<number>", its name in the stored features
    shape: str
    color: str


Chance = random.Random
Made = tuple[str, str]  # text and answer


def draw(
    task: str, family: str, chance: Chance, pictures: Sequence[Picture]
) -> tuple[str, str, tuple[str, ...]]:
    """A text, its answer and the images that it is about; as often true (yes) as false (no)."""
    make = FAMILIES[task][family]
    wanted = chance.random() < 0.5
    while True:
        shown = chance.sample(pictures, 2 if task == "nlvr" else 1)
        text, answer = make(chance, *shown)
        if POLAR.get(answer, wanted) == wanted:
            return text, answer, tuple(picture.id for picture in shown)


def captions(picture: Picture) -> dict[str, str]:
    """Every way to say what a picture shows, by family.

    With all five as references their CIDEr is between 3.4 (plain) and 4.4 (there_is).
    """
    color, shape = picture.color, picture.shape
    return {
        "plain": f"a {color} {shape}.",
        "there_is": f"there is a {color} {shape} in the image.",
        "that_is": f"the image contains a {shape} that is {color}.",
        "and_it_is": f"one {shape} is present, and it is {color}.",
        "of_color": f"a {shape} of {color} color on a plain background.",
    }


def vqa_family(question: str) -> str:
    """shape, color, exists, or absent for negations such as "is no red shape present?"."""
    words = re.findall(r"\w+", question)
    if words[0] == "what":
        return "color" if "color" in words else "shape"
    return "absent" if {"no", "not"} & set(words) else "exists"


def facts(question: str, answer: str) -> set[str]:
    """The shapes and colours that the image has, as one of easy-vqa's questions tells them."""
    named = {answer, *re.findall(r"\w+", question)} & {*SHAPES, *COLORS}
    denied = POLAR.get(answer, True) == (vqa_family(question) == "absent")
    return set() if denied else named


def knowledge() -> list[str]:
    """What can be read about shapes without an image."""
    return [f"a {shape} has {count} corners." for shape, count in CORNERS.items()]


def _pair(chance: Chance, picture: Picture) -> tuple[str, str, bool, bool]:
    """A colour and a shape to ask about, each often the picture's own; whether they are."""
    color = chance.choice((picture.color, chance.choice(COLORS)))
    shape = chance.choice((picture.shape, chance.choice(SHAPES)))
    return color, shape, color == picture.color, shape == picture.shape


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _choose_color(chance: Chance, picture: Picture) -> Made:
    other = chance.choice([color for color in COLORS if color != picture.color])
    first, second = chance.sample([picture.color, other], 2)
    return f"is the shape {first} or {second}?", picture.color


def _choose_shape(chance: Chance, picture: Picture) -> Made:
    other = chance.choice([shape for shape in SHAPES if shape != picture.shape])
    first, second = chance.sample([picture.shape, other], 2)
    return f"is the shape a {first} or a {second}?", picture.shape


def _both(chance: Chance, picture: Picture) -> Made:
    color, shape, has_color, has_shape = _pair(chance, picture)
    return f"is the shape a {color} {shape}?", _yes(has_color and has_shape)


def _either(chance: Chance, picture: Picture) -> Made:
    color, shape, has_color, has_shape = _pair(chance, picture)
    return f"is the shape either {color} or a {shape}?", _yes(has_color or has_shape)


def _neither(chance: Chance, picture: Picture) -> Made:
    color, shape, has_color, has_shape = _pair(chance, picture)
    return f"is the shape neither {color} nor a {shape}?", _yes(not has_color and not has_shape)


def _corners(chance: Chance, picture: Picture) -> Made:
    return f"how many corners does the {picture.color} shape have?", CORNERS[picture.shape]


def _more_corners(chance: Chance, picture: Picture) -> Made:
    other = chance.choice([shape for shape in SHAPES if shape != picture.shape])
    more = SHAPES.index(picture.shape) > SHAPES.index(other)
    return f"does the shape have more corners than a {other}?", _yes(more)


def _thing(chance: Chance, picture: Picture) -> tuple[str, Callable[[Picture], bool]]:
    """What a statement is about, often in the picture: "circle" or "red shape"; and its test."""
    color, shape, *_ = _pair(chance, picture)
    if chance.random() < 0.5:
        return shape, lambda shown: shown.shape == shape
    return f"{color} shape", lambda shown: shown.color == color


def _true(value: bool) -> str:
    return "true" if value else "false"


def _side(chance: Chance, left: Picture, right: Picture) -> Made:
    thing, holds = _thing(chance, left)
    name, shown = chance.choice((("left", left), ("right", right)))
    return f"the {name} image contains a {thing}.", _true(holds(shown))


def _both_images(chance: Chance, left: Picture, right: Picture) -> Made:
    thing, holds = _thing(chance, left)
    return f"both images contain a {thing}.", _true(holds(left) and holds(right))


def _neither_image(chance: Chance, left: Picture, right: Picture) -> Made:
    thing, holds = _thing(chance, left)
    return f"neither image contains a {thing}.", _true(not holds(left) and not holds(right))


def _one_image(chance: Chance, left: Picture, right: Picture) -> Made:
    thing, holds = _thing(chance, left)
    return f"exactly one image contains a {thing}.", _true(holds(left) != holds(right))


def _same(chance: Chance, left: Picture, right: Picture) -> Made:
    kind = chance.choice(("color", "shape"))
    text = f"the left image has the same {kind} as the right image."
    return text, _true(getattr(left, kind) == getattr(right, kind))


FAMILIES: dict[str, dict[str, Callable[..., Made]]] = {
    "gqa": {
        "choose_color": _choose_color,
        "choose_shape": _choose_shape,
        "both": _both,
        "either": _either,
        "neither": _neither,
        "corners": _corners,
        "more_corners": _more_corners,
    },
    "nlvr": {
        "side": _side,
        "both_images": _both_images,
        "neither_image": _neither_image,
        "one_image": _one_image,
        "same": _same,
    },
}
