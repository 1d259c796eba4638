"""VQAv2, GQA, NLVR2 and COCO captions in the files that VL-Adapter trains on (Table 3).

vqa/karpathy_{train,val,test}.json, vqa/v2_mscoco_val2014_annotations.json
GQA/{train,valid,testdev}.json    nlvr/{train,valid,test}.json    COCO/dataset_coco.json
{COCO,VG,GQA,nlvr}/<features>/<img_id>.h5
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from oplora.studies.vl_bart.batches import VLItem

FEATURES = "clip_features/data_clip_RN101_att"


def upstream_sides(
    folder: str,
    *,
    features: str = FEATURES,
    gqa_validation: float = 0.005,
    items_per_task: dict[str, int | None] | None = None,
) -> dict[str, dict[str, list[VLItem]]]:
    """Items by side (train, validation, test) and task, from VL-Adapter's `datasets` folder.

    VQA and captions: Karpathy's splits (restval is trained); NLVR: train, valid, test-P; GQA:
    train and valid, testdev. Upstream validates GQA on testdev, which is its test set too; here
    the questions about a `gqa_validation` share of the training images are held out instead; at 0
    nothing is, and GQA is not validated.
    items_per_task: the most items of every task on a side.
    """
    root = Path(folder)
    gqa = gqa_items(root, ["train", "valid"], f"VG/{features}")
    held = [item for item in gqa if _place(item.images[0]) < gqa_validation]
    kept = [item for item in gqa if _place(item.images[0]) >= gqa_validation]
    coco = f"COCO/{features}"
    sides = {
        "train": {
            "vqa": vqa_items(root, "karpathy_train", coco),
            "gqa": kept,
            "nlvr": nlvr_items(root, "train", f"nlvr/{features}"),
            "caption": caption_items(root, ("train", "restval"), coco),
        },
        "validation": {
            "vqa": vqa_items(root, "karpathy_val", coco, human=True),
            "gqa": held,
            "nlvr": nlvr_items(root, "valid", f"nlvr/{features}"),
            "caption": caption_items(root, ("val",), coco, human=True),
        },
        "test": {
            "vqa": vqa_items(root, "karpathy_test", coco, human=True),
            "gqa": gqa_items(root, ["testdev"], f"GQA/{features}"),
            "nlvr": nlvr_items(root, "test", f"nlvr/{features}"),
            "caption": caption_items(root, ("test",), coco, human=True),
        },
    }
    if not gqa_validation:
        del sides["validation"]["gqa"]
    counts = items_per_task or {}
    return {
        side: {task: items[: counts.get(side)] for task, items in tasks.items()}
        for side, tasks in sides.items()
    }


def vqa_items(root: Path, split: str, images: str, human: bool = False) -> list[VLItem]:
    """Questions of VQAv2 with soft labels; human: with the ten answers that score predictions.

    A label may be empty (no frequent answer): upstream trains such items with weight 0.
    """
    path = root / f"vqa/{split}.json"
    answers = _human_answers(root) if human else {}
    items = []
    for row, record in enumerate(_records(path)):
        where = f"{path}, record {row}"
        key = _field(record, "question_id", where)
        if human and not answers.get(key):
            raise ValueError(f"{where}: question {key} has no human answers to be scored with")
        items.append(
            VLItem(
                f"vqa/{split}/{key}",
                "vqa",
                record["sent"] if "sent" in record else _field(record, "question", where),
                (f"{images}/{_field(record, 'img_id', where)}",),
                tuple(_field(record, "label", where).items()),
                tuple(answers.get(key, ())),
            )
        )
    return items


def gqa_items(root: Path, splits: Sequence[str], images: str) -> list[VLItem]:
    """Questions of GQA, whose label has the one right answer."""
    items = []
    for split in splits:
        path = root / f"GQA/{split}.json"
        for row, record in enumerate(_records(path)):
            where = f"{path}, record {row}"
            answers = tuple(_field(record, "label", where).items())
            if not answers:
                raise ValueError(f"{where}: the list of answers is empty")
            key, image = (_field(record, name, where) for name in ("question_id", "img_id"))
            text = _field(record, "sent", where)
            items.append(VLItem(f"gqa/{split}/{key}", "gqa", text, (f"{images}/{image}",), answers))
    return items


def nlvr_items(root: Path, split: str, images: str) -> list[VLItem]:
    """Statements of NLVR2 about two images, answered with "true" or "false"."""
    path = root / f"nlvr/{split}.json"
    items = []
    for row, record in enumerate(_records(path)):
        where = f"{path}, record {row}"
        label = _field(record, "label", where)
        if label not in (0, 1):
            raise ValueError(f"{where}: label {label!r} is neither 0 nor 1")
        pair = tuple(f"{images}/{_field(record, name, where)}" for name in ("img0", "img1"))
        text, key = (_field(record, name, where) for name in ("sent", "uid"))
        answers = ((("false", "true")[label], 1.0),)
        items.append(VLItem(f"nlvr/{split}/{key}", "nlvr", text, pair, answers))
    return items


def caption_items(
    root: Path, splits: Iterable[str], images: str, human: bool = False
) -> list[VLItem]:
    """COCO captions in Karpathy's file: an item per caption, or (human) per image with all."""
    path = root / "COCO/dataset_coco.json"
    items = []
    for row, record in enumerate(_field(_read(path), "images", str(path))):
        where = f"{path}, image {row}"
        split = _field(record, "split", where)
        if split not in splits:
            continue
        name = _field(record, "filename", where).split(".")[0]
        captions = [_field(s, "raw", where).strip() for s in _field(record, "sentences", where)]
        if not captions:
            raise ValueError(f"{where} ({name}): the list of captions is empty")
        for number, caption in enumerate(captions[:1] if human else captions):
            items.append(
                VLItem(
                    f"caption/{split}/{name}/{number}",
                    "caption",
                    "",
                    (f"{images}/{name}",),
                    ((caption, 1.0),),
                    tuple(captions) if human else (),
                )
            )
    return items


def _human_answers(root: Path) -> dict[Any, list[str]]:
    """Ten answers by question; Karpathy's validation and test images are all from val2014."""
    path = root / "vqa/v2_mscoco_val2014_annotations.json"
    return {
        _field(record, "question_id", str(path)): [
            _field(answer, "answer", str(path)) for answer in _field(record, "answers", str(path))
        ]
        for record in _field(_read(path), "annotations", str(path))
    }


def _place(image: str) -> float:
    """A number in [0, 1) that depends on the image's name alone."""
    return int.from_bytes(hashlib.sha256(image.encode()).digest()[:8], "big") / 2**64


def _records(path: Path) -> list[dict[str, Any]]:
    records = _read(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} holds no list of records")
    return records


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy VL-Adapter's `datasets` folder")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error


def _field(record: dict[str, Any], name: str, where: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"{where} has no {name!r}")
    return record[name]
