"""Subjects that a generator of images is to learn from a few pictures: DreamBench's, and emoji."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, Image, Value
from huggingface_hub import snapshot_download

from oplora.harness.emoji import CATEGORIES, emoji

ANIMALS = ("cat", "dog")  # DreamBench's classes that have the prompts for live subjects
_FEATURES = Features({"text": Value("string"), "image": Image()})


@dataclass(frozen=True)
class Subject:
    """What one adapter learns, and what is drawn with it.

    images, held_out: columns text (with the token) and image; prompts: with the token, as they are
    drawn; descriptions: the same ones without it, which a drawing is compared with.
    """

    name: str
    images: Dataset
    prompts: list[str]
    descriptions: list[str]
    held_out: Dataset | None = None


def dreambench(
    source: str, revision: str | None = None, token: str = "sks", only: Sequence[str] | None = None
) -> list[Subject]:
    """The 30 subjects of DreamBench (arXiv 2208.12242), 25 prompts each.

    source: the data set on the hub, or a folder that holds its `dataset/`: a folder of images per
    subject, and prompts_and_classes.txt. only: names of some of them; ValueError names those that
    there are.
    """
    if Path(source).is_dir():
        folder = Path(source) / "dataset"
    else:
        wanted = ["dataset/*"]
        options = dict(repo_type="dataset", revision=revision, allow_patterns=wanted)
        folder = Path(snapshot_download(source, **options)) / "dataset"
    classes, prompts = read_prompts((folder / "prompts_and_classes.txt").read_text("utf-8"))
    if unknown := set(only or ()) - set(classes):
        known = ", ".join(classes)
        raise ValueError(f"no subject is called {', '.join(sorted(unknown))}: there are {known}")
    return [
        Subject(
            name,
            _pictures(sorted((folder / name).iterdir()), f"a photo of {token} {kind}"),
            [p.format(token, kind) for p in prompts[kind in ANIMALS]],
            [p.format("", kind).replace("  ", " ") for p in prompts[kind in ANIMALS]],
        )
        for name, kind in classes.items()
        if only is None or name in only
    ]


def read_prompts(text: str) -> tuple[dict[str, str], tuple[list[str], list[str]]]:
    """From DreamBench's prompts_and_classes.txt: class by subject; prompts of things, of animals.

    A prompt has two fields, {0} for the token and {1} for the class. ValueError: it holds none.
    """
    classes = dict(re.findall(r"^(\w+),([\w ]+)$", text, re.MULTILINE))
    classes.pop("subject_name", None)  # the header
    *_, things, animals = ["", "", *re.split("(?:Object|Live Subject) Prompts", text)]
    found = tuple(re.findall(r"'([^'\n]*\{0\} \{1\}[^'\n]*)'", part) for part in (things, animals))
    if not classes or not all(found):
        raise ValueError("prompts_and_classes.txt holds no classes or no prompts: is it complete?")
    return classes, found


def emoji_subjects(
    count: int,
    train: Sequence[str],
    held_out: str,
    token: str = "sks",
    categories: Sequence[str] = CATEGORIES,
) -> list[Subject]:
    """Characters in several styles' drawings, of those that no base model was trained on.

    count: so many, evenly spread over the emoji of the split `validation` that all styles have;
    train: the styles that are learned from; held_out: the style of the validation picture. The
    only prompt is the token with the character's group ("sks, face smiling").
    """
    styles = {s: emoji(s, "validation", categories) for s in dict.fromkeys((*train, held_out))}
    rows = {s: {row["id"]: row for row in table} for s, table in styles.items()}
    shared = [i for i in rows[held_out] if all(i in each for each in rows.values())]
    if not 1 <= count <= len(shared):
        raise ValueError(f"{count} subjects wanted: there are 1 to {len(shared)} in these styles")
    return [_character(i, rows, train, held_out, token) for i in _spread(shared, count)]


def _character(id: str, rows: dict, train: Sequence[str], held_out: str, token: str) -> Subject:
    name, group = rows[held_out][id]["text"].replace("/", " ").split(", ", 1)
    prompt = f"{token}, {group}"

    def drawings(styles: Sequence[str]) -> Dataset:
        return _pictures([rows[style][id]["image"] for style in styles], prompt)

    return Subject(name, drawings(train), [prompt], [group], drawings([held_out]))


def _pictures(images: Sequence, text: str) -> Dataset:
    images = [str(image) if isinstance(image, Path) else image for image in images]
    return Dataset.from_dict({"text": [text] * len(images), "image": images}, features=_FEATURES)


def _spread(items: Sequence[str], count: int) -> Iterator[str]:
    return (items[n * len(items) // count] for n in range(count))
