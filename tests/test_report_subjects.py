"""The part of the report on subjects: scores beside yardsticks, and what every method drew."""

import pandas
import pytest
from PIL import Image
from stored_runs import write

from oplora import report
from oplora.harness.runs import load_runs
from oplora.report.page import ReportFigure, Writer
from oplora.studies.subjects.report import EXPERIMENT

COSTS = ("adapter_parameters", "mlp_parameters", "trained_parameters", "train_seconds",
         "peak_memory_bytes", "steps")  # fmt: skip


def store(folder, method, lr, seed, loss, score=None, **config):
    path = folder / f"{method}-{lr}-{seed}-{score}"
    path.mkdir(parents=True)
    tuned = config.get("fine_tune", True)
    whole = {"experiment": "subjects", "preset": "small", "method": {"name": method}, "lr": lr}
    whole |= {"seed": seed, "rank": 4, "mlp_width": 32, "measure": score is not None}
    metrics = {"validation_loss": [[10 if tuned else 0, loss]]}
    metrics |= dict.fromkeys(COSTS, 1) if tuned else {}
    if score is not None:
        metrics |= {"efficientnet": score, "subjects": {"cat": {}, "dog": {}}}
        for name in ("samples", "reference"):
            Image.new("RGB", (16, 8), "red").save(path / f"{name}.png")
    if not tuned:
        metrics["yardsticks"] = {"same": {"efficientnet": 0.9}, "others": {"efficientnet": 0.3}}
    return write(path, whole | config, metrics, {})


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    for method, score in (("lora", 0.6), ("oplora", 0.7)):
        for lr, loss in ((1e-4, 0.8), (1e-3, 0.7), (1e-2, 0.9)):
            store(folder, method, lr, 0, loss)
        for seed in range(3):
            store(folder, method, 1e-3, seed, 0.7, score + seed / 100)
    store(folder, "lora", 1e-3, 0, 0.95, 0.4, fine_tune=False)
    return folder


def test_scores_stand_beside_what_they_are_to_be_read_against(runs, tmp_path):
    section = EXPERIMENT.read(load_runs(runs)[0]).section()
    Writer(tmp_path / "out").write("test", [section])
    read = lambda name: pandas.read_csv(tmp_path / "out" / "tables" / f"{name}.csv")  # noqa: E731
    scores = read("subjects_small").set_index("method")["EfficientNet"]
    assert scores["LoRA"].startswith("0.610 ±") and scores["OP-LoRA"].startswith("0.710 ±")
    assert scores["zero-shot (no fine-tuning)"] == "0.400 (1)"
    sticks = read("subjects_small_yardsticks").set_index("pictures")["EfficientNet"]
    assert list(sticks.round(3)) == [0.9, 0.3]
    (grid,) = [p for p in section.parts if isinstance(p, ReportFigure) and p.photo]
    assert "cat, dog" in grid.caption and len(grid.drawing.axes) == 4


def test_the_claim_is_judged_by_subject_fidelity(runs):
    claims = EXPERIMENT.read(load_runs(runs)[0]).claims()
    (small,) = [c for c in claims if "small" in str(c) or "characters" in str(c.scope)]
    assert small.verdict == "holds" and "+0.100 ± 0.000" in small.evidence
    assert "subjects" in {experiment.name for experiment in report.experiments()}
