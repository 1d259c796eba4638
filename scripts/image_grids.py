"""Figures 5 and 7-18: what every method draws for the same captions and noise, from finished runs.

python scripts/image_grids.py results/runs/sdxl/paper --out grids
The captions are those that the runs show: start them with images.shown=48 for as many.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from oplora.harness.runs import Record, load_runs
from oplora.report.titles import methods, title

MARGIN = 14  # pixels for the columns' titles


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="a folder of finished SDXL runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for DATASET-PAGE.png")
    parser.add_argument("--rows", type=int, default=12, help="captions on a page")
    parser.add_argument("--size", type=int, default=192, help="pixels of an image")
    arguments = parser.parse_args()
    by_dataset: dict[str, list[Record]] = {}
    for record in load_runs(arguments.runs)[0]:
        if (record.path / "samples.png").is_file():
            by_dataset.setdefault(record.config["dataset"]["name"], []).append(record)
    if not by_dataset:
        print(f"error: {arguments.runs} has no finished runs that show images", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    for dataset, records in by_dataset.items():
        chosen = columns(records)
        shown = {name: cut(record.path / "samples.png") for name, record in chosen.items()}
        shown = {"real": cut(records[0].path / "reference.png"), **shown}
        count = min(map(len, shown.values()))
        for page, first in enumerate(range(0, count, arguments.rows), 1):
            rows = {n: each[first : first + arguments.rows] for n, each in shown.items()}
            path = arguments.out / f"{dataset}-{page:02d}.png"
            grid(rows, arguments.size).save(path)
            print(f"{path}: {', '.join(rows)}")
    return 0


def columns(records: list[Record]) -> dict[str, Record]:
    """By title the model as it is, then of every method the run nearest to its data."""
    found = {}
    for base in (r for r in records if not r.config["fine_tune"]):
        found["base model"] = base
    tuned = [r for r in records if r.config["fine_tune"]]
    tuned.sort(key=lambda r: r.metrics["images"][r.config["distance"]["name"]], reverse=True)
    best = {r.config["method"]["name"]: r for r in tuned}
    return found | {title(name): best[name] for name in methods() if name in best}


def cut(path: Path) -> list[Image.Image]:
    """The square images of a strip (`oplora.studies.sdxl.generation.strip`)."""
    with Image.open(path) as image:
        side = image.height
        return [image.crop((left, 0, left + side, side)) for left in range(0, image.width, side)]


def grid(shown: dict[str, list[Image.Image]], size: int) -> Image.Image:
    """A row per caption, a column per name."""
    rows = max(map(len, shown.values()))
    page = Image.new("RGB", (size * len(shown), MARGIN + size * rows), "white")
    draw = ImageDraw.Draw(page)
    for column, (name, images) in enumerate(shown.items()):
        draw.text((column * size + 2, 1), name, fill="black")
        for row, image in enumerate(images):
            page.paste(image.resize((size, size)), (column * size, MARGIN + row * size))
    return page


if __name__ == "__main__":
    sys.exit(main())
