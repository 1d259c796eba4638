"""The LLaVA part of the report: rows without training, choice of rates, ranks and widths."""

import json

import pandas
import pytest
import yaml

from oplora.harness.runs import load_runs
from oplora.report.page import Writer
from oplora.report.tables import cited_table
from oplora.studies.llava_cars.report import EXPERIMENT


def store(folder, method, lr, seed, loss, accuracy=None, rank=16, width=768, fine_tune=True):
    """A run whose first images of ten are right."""
    path = folder / f"{method}-{lr}-{seed}-{rank}-{width}-{accuracy}-{fine_tune}"
    path.mkdir(parents=True)
    config = {
        "experiment": "llava_cars", "preset": "small", "method": {"name": method}, "lr": lr,
        "seed": seed, "rank": rank, "mlp_width": width, "fine_tune": fine_tune,
    }  # fmt: skip
    metrics = {"chance": 0.01, "majority": 0.02, "peak_memory_bytes": 2_000_000_000}
    if fine_tune:
        mlp = rank * width * method.startswith("op")
        metrics |= {
            "validation_loss": [[10, 3.0], [20, loss]], "train_seconds": 5.0 + width,
            "adapter_parameters": rank * (method != "full"), "mlp_parameters": mlp,
            "trained_parameters": mlp or rank,
        }  # fmt: skip
    if accuracy is not None:
        metrics |= {"accuracy": accuracy, "exact_accuracy": accuracy - 0.1, "test_nll": loss}
        rows = [
            {"id": f"i{n}", "label": "dog", "found": "dog" if n < 10 * accuracy else None,
             "prediction": "x", "nll": loss}
            for n in range(10)
        ]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / "predictions.jsonl").write_text(text)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    for lr, loss in ((1e-3, 1.0), (1e-2, 0.5), (1e-1, 2.0)):
        for method in ("lora", "oplora", "full"):
            store(folder, method, lr, 0, loss)
    for seed in range(3):
        for method, accuracy in (("lora", 0.5), ("oplora", 0.6), ("full", 0.8)):
            store(folder, method, 1e-2, seed, 0.5, accuracy)
    return folder


def tables(runs, out):
    records, _ = load_runs(runs)
    Writer(out).write("test", [EXPERIMENT.read(records).section()])
    return lambda name: pandas.read_csv(out / "tables" / f"{name}.csv")


def test_rows_without_training_stand_beside_the_methods(runs, tmp_path):
    store(runs, "oplora", 1e-3, 0, 4.0, 0.1, fine_tune=False)
    store(runs, "lora", 1e-1, 0, 2.0, 0.9)  # a rate that was not chosen
    table = tables(runs, tmp_path)("llava_cars_small").set_index("method")
    assert list(table.index) == [
        "chance", "always the most frequent class", "zero-shot (no fine-tuning)",
        "full fine-tuning", "LoRA", "OP-LoRA",
    ]  # fmt: skip
    assert table.loc["chance", "top-1"] == "1.0" and pandas.isna(table.loc["chance", "rate"])
    assert table.loc["zero-shot (no fine-tuning)", "top-1"] == "10.0 (1)"
    assert table.loc["LoRA", "top-1"] == "50.0 ± 0.0 (3)" and table.loc["LoRA", "rate"] == 0.01
    assert table.loc["LoRA", "top-1, exact"] == "40.0 ± 0.0 (3)"
    assert table.loc["OP-LoRA", "trained parameters"] == 16 * 768


def test_differences_are_paired_by_image(runs, tmp_path):
    paired = tables(runs, tmp_path)("llava_cars_small_paired").set_index("method")
    assert list(paired.index) == ["full fine-tuning", "OP-LoRA"]
    assert paired.loc["OP-LoRA", "images"] == 10 and paired.loc["OP-LoRA", "seeds"] == 3
    assert paired.loc["OP-LoRA", "top-1"].startswith("+10.0 [+0.0, ")
    assert paired.loc["full fine-tuning", "NLL"] == "+0.000 [+0.000, +0.000]"


def test_ranks_and_widths(runs, tmp_path):
    store(runs, "lora", 1e-2, 0, 0.4, 0.7, rank=64)
    store(runs, "lora", 1e-3, 0, 0.4, 0.9, rank=64)  # at another rate
    for width in (32, 128):
        store(runs, "oplora", 1e-2, 0, 0.4, 0.7, width=width)
    table = tables(runs, tmp_path)
    ranks = table("llava_cars_small_ranks").set_index(["method", "rank"])
    assert ranks.loc[("LoRA", 64), "top-1"] == "70.0 (1)"
    assert set(ranks.index) == {("LoRA", 16), ("LoRA", 64), ("OP-LoRA", 16)}
    widths = table("llava_cars_small_width")
    assert widths["width"].tolist() == [32, 128, 768]
    assert widths["train seconds"].tolist() == [37, 133, 773]


def test_cited_values_and_nothing_without_runs():
    rows = cited_table("paper", EXPERIMENT.paper).frame.set_index("method")
    assert rows.loc["lora"].tolist() == [82.8, 86.3] and rows.loc["oplora", "rank 64"] == 87.1
    assert EXPERIMENT.read([]).section() is None and EXPERIMENT.read([]).comparisons == []


def test_the_comparison_takes_the_papers_numbers_of_its_rank(runs):
    (comparison,) = EXPERIMENT.read(load_runs(runs)[0]).comparisons
    assert comparison.cited == {"lora": 82.8, "oplora": 83.6}
    assert comparison.chosen == {"full": 0.01, "lora": 0.01, "oplora": 0.01}
    assert comparison.advantage("oplora", "lora") == pytest.approx([10.0] * 3)
