"""Stanford Cars (Table 4): 196 makes, models and years, from the hub or a local folder."""

import re
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset

SPLITS = ("train", "test")
YEAR_LAST = re.compile(r"(.+) (\d{4})")


def sides(
    source: str,
    revision: str | None = None,
    validation: float = 0.0,
    year_first: bool = True,
    split_seed: int = 0,
) -> dict[str, Dataset]:
    """train, validation and test: columns id, image (encoded) and label (a ClassLabel).

    source: a data set of the hub, or a folder that `datasets` can read, such as a copy of it or
        train/<class>/… and test/<class>/… with image files.
    validation: share of every class's training images that is held out; 0: there is no such side.
    year_first: "2012 Acura RL Sedan", as upstream, instead of the data set's "Acura RL Sedan 2012".
    ValueError names the test record whose label is not in the list of the training split's classes.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation={validation}: give a share, at least 0 and below 1")
    splits = _load(source, revision)
    names = _class_names(splits["train"], source)
    shown = [year_to_front(name) if year_first else name for name in names]
    rows = {split: _rows(splits[split], split, names, shown) for split in SPLITS}
    if validation:
        parts = rows["train"].train_test_split(
            validation, seed=split_seed, stratify_by_column="label"
        )
        rows = {"train": parts["train"], "validation": parts["test"], "test": rows["test"]}
    return rows


def year_to_front(name: str) -> str:
    """ "Acura RL Sedan 2012" to "2012 Acura RL Sedan"; a name without a year as it is."""
    found = YEAR_LAST.fullmatch(name)
    return f"{found[2]} {found[1]}" if found else name


def _load(source: str, revision: str | None) -> DatasetDict:
    local = source.startswith((".", "/", "~")) or Path(source).is_dir()
    if local and not Path(source).expanduser().is_dir():
        raise FileNotFoundError(f"there is no folder {source}: give Stanford Cars' folder")
    splits = load_dataset(str(Path(source).expanduser()) if local else source, revision=revision)
    for split in SPLITS:
        if split not in splits:
            raise ValueError(f"{source} has no split {split!r}, only {', '.join(splits)}")
        for column in ("image", "label"):
            if column not in splits[split].column_names:
                found = ", ".join(splits[split].column_names)
                raise ValueError(f"{source}: {split} has no column {column!r}, only {found}")
    return splits


def _class_names(train: Dataset, source: str) -> list[str]:
    """Of the label's ClassLabel, else all strings that the training split has."""
    label = train.features["label"]
    names = label.names if isinstance(label, ClassLabel) else sorted(set(train["label"]) - {None})
    lowered = [str(name).lower() for name in names]
    if twice := next((n for n in names if lowered.count(str(n).lower()) > 1), None):
        raise ValueError(f"{source}: the class {twice!r} is there twice, if case is ignored")
    return names


def _rows(rows: Dataset, split: str, names: list[str], shown: list[str]) -> Dataset:
    """The columns that are read, with `shown` as the names of the classes `names`."""
    label = rows.features["label"]
    own = label.names if isinstance(label, ClassLabel) else None
    position = {name: number for number, name in enumerate(names)}
    numbers = []
    for row, value in enumerate(rows["label"]):
        known = own is None or (value is not None and 0 <= value < len(own))
        name = (own[value] if own else value) if known else value
        if name not in position:
            raise ValueError(
                f"{split}/{row}: label {name!r} is not among the {len(names)} classes of the "
                "training split; correct it, or leave the record out"
            )
        numbers.append(position[name])
    features = Features(
        id=Value("string"), image=Image(decode=False), label=ClassLabel(names=shown)
    )
    images = rows.select_columns("image").cast_column("image", Image(decode=False))
    images = images.add_column("id", [f"{split}/{row}" for row in range(len(rows))])
    return images.add_column("label", numbers).select_columns(list(features)).cast(features)
