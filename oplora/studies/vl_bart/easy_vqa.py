"""The small preset's four tasks, from the images and questions of the package easy-vqa.

Every image shows one shape of one colour. The package's questions are the task VQA and say which
shape and colour it is; compositional questions (as GQA's), statements about two images (NLVR2's)
and captions follow from that. The base model (base_models/tiny_vl_bart/pretrain.py) has seen a part
of the families and colours, and has read sentences of all; adapters learn the rest.
"""

import functools
import hashlib
import json
import random
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from oplora.harness.assets import derived, fetch
from oplora.harness.efficientnet import efficientnet_lite0, normalized
from oplora.studies.vl_bart.batches import VLItem
from oplora.studies.vl_bart.grids import StoredGrids, cells_of, layer_output, pooled
from oplora.studies.vl_bart.shape_language import (
    COLORS,
    FAMILIES,
    SHAPES,
    Picture,
    captions,
    draw,
    facts,
    knowledge,
    vqa_family,
)

TASKS = ("vqa", "gqa", "nlvr", "caption")
# The package's training images by a hash in [0, 1): up to where. Its test images are for the test.
ENDS = {"pretraining": 0.5, "train": 0.85, "validation": 1.0}
# What the base model is trained on; the rest is left to the adapters.
SEEN_COLORS = COLORS[:5]
SEEN_FAMILIES = {
    "vqa": ("shape", "color", "exists"),
    "gqa": ("choose_color", "choose_shape", "both"),
    "nlvr": ("side",),
    "caption": ("plain", "there_is"),
}


def sides(
    items_per_task: dict[str, int], folder: Path | None = None
) -> dict[str, dict[str, list[VLItem]]]:
    """Items by side (train, validation, test) and task, the same for every seed.

    items_per_task: a number per side. folder: of the unpacked package (None: fetched). No image
    is on two sides, nor known to the base model.
    """
    folder = folder or fetch("easy-vqa")
    return {
        side: {task: task_items(folder, side, task, count) for task in TASKS}
        for side, count in items_per_task.items()
    }


def pretraining_items(items: dict[str, int], folder: Path | None = None) -> dict[str, list[VLItem]]:
    """What the base model learns: familiar families and colours, and masked text of everything.

    items: a number per task.
    """
    folder = folder or fetch("easy-vqa")
    side = "pretraining"
    seen = {
        task: task_items(folder, side, task, count, SEEN_FAMILIES[task], SEEN_COLORS)
        for task, count in items.items()
    }
    every = [task_items(folder, side, task, count) for task, count in items.items()]
    sentences = [item.text or item.answers[0][0] for each in every for item in each]
    sentences += knowledge() * (len(sentences) // 50)
    return {**seen, "text": [_masked(n, text) for n, text in enumerate(sentences)]}


def task_items(
    folder: Path,
    side: str,
    task: str,
    count: int,
    families: Collection[str] | None = None,
    colors: Collection[str] = COLORS,
) -> list[VLItem]:
    """`count` different items of one side; families (None: all) and colours may be restricted."""
    shown = [picture for picture in pictures(folder, side) if picture.color in colors]
    make = {"vqa": _vqa, "caption": _captions}.get(task, _drawn)
    unfamiliar = set(COLORS) - set(colors)
    found: dict[tuple, VLItem] = {}
    for item, family in make(folder, side, task, shown):
        known = families is None or family in families
        if known and not unfamiliar & set(re.findall(r"\w+", item.text)):
            found.setdefault((item.text, item.images, item.answers), item)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{count} items of {task} for {side}, but there are only {len(found)}")


@functools.cache
def pictures(folder: Path, side: str) -> list[Picture]:
    """The images of a side whose questions tell both shape and colour (nine in ten)."""
    split = "test" if side == "test" else "train"
    words: dict[int, set[str]] = {}
    for question, answer, image in _questions(folder, side):
        words.setdefault(image, set()).update(facts(question, answer))
    found = []
    for image, known in sorted(words.items()):
        shape, color = known & set(SHAPES), known & set(COLORS)
        if len(shape) > 1 or len(color) > 1:
            raise ValueError(f"easy-vqa {split} image {image}: its questions say {sorted(known)}")
        if shape and color:
            found.append(Picture(f"{split}/{image}", shape.pop(), color.pop()))
    return found


def grids(size: int = 128, cells: int = 9) -> StoredGrids:
    """Features of all images: EfficientNet-Lite0's last block at `size` pixels, max-pooled.

    Made once (minutes) and kept in the cache.
    """

    def build(package: Path, target: Path) -> None:
        network = efficientnet_lite0(fetch("efficientnet-lite0"), size)
        tensors = {}
        for split in ("train", "test"):
            folder = package / f"easy_vqa/data/{split}/images"
            count = len(list(folder.glob("*.png")))
            files = [folder / f"{number}.png" for number in range(count)]
            tensors[split] = torch.cat(list(_features(network, files, size, cells))).half()
        save_file(tensors, target / "grids.safetensors")

    return StoredGrids(derived("easy-vqa", f"grids-{size}-{cells}", build) / "grids.safetensors")


def _features(
    network: nn.Module, files: Sequence[Path], size: int, cells: int, batch_size: int = 32
) -> Iterator[Tensor]:
    """Grids (n, cells, 320) of the files: the last block's output, before the classifier's head."""
    layer = f"_blocks.{len(network._blocks) - 1}"
    for first in tqdm(range(0, len(files), batch_size), desc="Image features", unit="batch"):
        images = [
            np.array(Image.open(file).convert("RGB").resize((size, size), Image.BICUBIC))
            for file in files[first : first + batch_size]
        ]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        maps = layer_output(network, layer, normalized(pixels))
        yield torch.stack([pooled(each, cells) for each in cells_of(maps)])


Found = Iterator[tuple[VLItem, str]]  # items and their families


def _vqa(folder: Path, side: str, task: str, shown: Sequence[Picture]) -> Found:
    """The package's questions about the pictures."""
    known = {picture.id for picture in shown}
    split = "test" if side == "test" else "train"
    rows = list(enumerate(_questions(folder, side)))
    random.Random(f"{task} {side}").shuffle(rows)
    for number, (question, answer, image) in rows:
        if (name := f"{split}/{image}") in known:
            family = vqa_family(question)
            id = f"vqa/{side}/{family}/{number}"
            # As if ten people had answered alike.
            yield VLItem(id, "vqa", question, (name,), ((answer, 1.0),), (answer,) * 10), family


def _drawn(folder: Path, side: str, task: str, shown: Sequence[Picture]) -> Found:
    """Questions or statements of all families in turn."""
    chance = random.Random(f"{task} {side}")
    for number in range(200_000):
        families = list(FAMILIES[task])
        family = families[number % len(families)]
        text, answer, images = draw(task, family, chance, shown)
        id = f"{task}/{side}/{family}/{number}"
        yield VLItem(id, task, text, images, ((answer, 1.0),)), family


def _captions(folder: Path, side: str, task: str, shown: Sequence[Picture]) -> Found:
    """For training every caption of every picture, else one item a picture with all captions."""
    order = list(shown)
    random.Random(f"{task} {side}").shuffle(order)
    training = side in ("pretraining", "train")
    # One wording is more frequent, so that models settle on it: CIDEr differs between wordings.
    families = ["there_is", *captions(order[0])]
    for number in range(len(families) if training else 1):
        for position, picture in enumerate(order):
            family = families[(number + position) % len(families)]
            every = captions(picture)
            id = f"caption/{side}/{picture.id}/{family}"
            answers = ((every[family], 1.0),)
            references = () if training else tuple(every.values())
            yield VLItem(id, "caption", "", (picture.id,), answers, references), family


def _masked(number: int, text: str) -> VLItem:
    """BART's own task: a text with a third of its words masked, to be written out."""
    chance = random.Random(number)
    words = ["<mask>" if chance.random() < 1 / 3 else word for word in text.split()]
    return VLItem(f"text/pretraining/{number}", "text", " ".join(words), (), ((text, 1.0),))


@functools.cache
def _questions(folder: Path, side: str) -> list[tuple[str, str, int]]:
    """Question, answer and number of the image, for the images of a side."""
    split = "test" if side == "test" else "train"
    rows = json.loads((folder / f"easy_vqa/data/{split}/questions.json").read_text("utf-8"))
    return [(q, answer, image) for q, answer, image in rows if _side(split, image) == side]


def _side(split: str, image: int) -> str:
    """Side of an image, by a hash of its number."""
    if split == "test":
        return "test"
    digest = hashlib.sha256(str(image).encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return next(side for side, end in ENDS.items() if place < end)
