"""Grids of what methods draw: a column per method, a row per caption, real images first."""

import json
import runpy
from pathlib import Path
from unittest import mock

import yaml
from PIL import Image

SCRIPT = str(Path(__file__).resolve().parent.parent / "scripts/image_grids.py")
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def store(folder, method, distance, colour, fine_tune=True):
    """A run of three images of one colour; the real ones are blue."""
    folder.mkdir(parents=True)
    config = {
        "method": {"name": method}, "dataset": {"name": "naruto"}, "fine_tune": fine_tune,
        "distance": {"name": "cmmd"}, "run": folder.name,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = {"images": {"cmmd": distance}, "captions": ["a", "b", "c"]}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    for name, kind in (("samples", colour), ("reference", BLUE)):
        Image.new("RGB", (3 * 8, 8), kind).save(folder / f"{name}.png")


def test_the_best_run_of_every_method_beside_real_images(tmp_path, capsys):
    store(tmp_path / "runs/base", "oplora", 9.0, (9, 9, 9), fine_tune=False)
    store(tmp_path / "runs/worse", "lora", 5.0, RED)
    store(tmp_path / "runs/better", "lora", 4.0, GREEN)
    out = tmp_path / "grids"
    arguments = [SCRIPT, str(tmp_path / "runs"), "--out", str(out), "--rows", "2", "--size", "16"]
    with mock.patch("sys.argv", arguments):
        assert runpy.run_path(SCRIPT)["main"]() == 0
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "real, base model, LoRA"
    ] * 2
    first, second = (Image.open(out / f"naruto-0{n}.png") for n in (1, 2))
    assert first.size == (3 * 16, 14 + 2 * 16) and second.size == (3 * 16, 14 + 16)
    assert [first.getpixel((16 * n + 8, 14 + 24)) for n in range(3)] == [BLUE, (9, 9, 9), GREEN]


def test_no_images_is_one_line(tmp_path, capsys):
    with mock.patch("sys.argv", [SCRIPT, str(tmp_path), "--out", str(tmp_path / "grids")]):
        assert runpy.run_path(SCRIPT)["main"]() == 2
    assert capsys.readouterr().err.startswith("error: ")
