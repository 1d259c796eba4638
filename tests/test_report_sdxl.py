"""The text-to-image part of the report: chosen rates, the gate, the control, half the rank."""

import json

import pandas
import pytest
from stored_runs import distance
from stored_runs import store_sdxl as store

from oplora import report


@pytest.fixture
def stored(tmp_path):
    runs = tmp_path / "runs"
    for lr, loss in ((1e-4, 0.5), (1e-3, 0.2), (1e-2, 0.4)):
        store(runs, "lora", lr, 0, loss)
        store(runs, "oplora", lr / 10, 0, loss)
    for seed, shift in enumerate((0.0, 0.1, -0.1)):
        store(runs, "lora", 1e-3, seed, 0.2, value=0.4 + shift)
        store(runs, "oplora", 1e-4, seed, 0.2, value=0.3 + shift)
        store(runs, "oplora", 1e-4, seed, 0.25, value=0.35 + shift, rank=2)
    store(runs, "lora", 1e-3, 0, 0.1, value=0.9, dataset="fluent_control")
    store(runs, "full", 1e-3, 0, 0.2, value=0.2)
    store(runs, "lora", 1e-2, 0, 0.2, value=0.05)  # not at the chosen rate: in no table
    store(runs, "base", 0.0, 0, None, value=0.8, fine_tune=False)
    return runs


def table(out, name):
    return pandas.read_csv(out / "tables" / f"{name}.csv")


def test_results_stand_between_their_yardsticks_and_the_control(stored, tmp_path):
    report.build(stored).write(tmp_path)
    rows = table(tmp_path, "sdxl_small_fluent").set_index("method")["mmd"]
    assert rows.to_dict() == {
        "real images of the style, half to half": "0.02",
        "real images of the base's style": "0.50 [0.40, 0.60]",
        "base model": "0.80 [0.70, 0.90]",
        "full fine-tuning": "0.20 (1)",
        "LoRA": "0.40 ± 0.25 (3)",
        "OP-LoRA": "0.30 ± 0.25 (3)",
        "LoRA, trained on the base's style": "0.90 (1)",
    }
    page = (tmp_path / "report.md").read_text()
    for figure in ("grid.webp", "steps.svg", "curves.svg"):
        assert f"figures/sdxl_small_fluent_{figure}" in page
    rates = table(tmp_path, "sdxl_small_rates").set_index("method")
    assert rates.loc["OP-LoRA", "0.0001"] == "0.200*"


def test_the_gate_is_judged_by_intervals(stored, tmp_path):
    report.build(stored).write(tmp_path / "a")
    assert table(tmp_path / "a", "sdxl_small_fluent_gate")["holds"].tolist() == ["yes"] * 3
    (path,) = stored.glob("fluent-full-*")
    metrics = json.loads((path / "metrics.json").read_text())
    metrics["images"] = distance(0.65)  # its interval ends at 0.75, the base's begins at 0.7
    (path / "metrics.json").write_text(json.dumps(metrics))
    report.build(stored).write(tmp_path / "b")
    assert table(tmp_path / "b", "sdxl_small_fluent_gate")["holds"].tolist() == ["yes", "no", "yes"]
    for folder, gated in (("a", False), ("b", True)):
        rows = table(tmp_path / folder, "claims").set_index("claim")
        for claim in ("OP-LoRA is better than LoRA", "OP-LoRA at half of LoRA's rank is as good"):
            assert ("the gate does not hold" in rows.loc[claim, "evidence here"]) is gated
            assert not gated or rows.loc[claim, "verdict"] == "not testable at this scale"


def test_missing_seeds_are_run_on_their_own_style(stored, tmp_path):
    store(stored, "lora", 1e-3, 0, 0.3, value=0.4, dataset="blobs")
    report.build(stored).write(tmp_path)
    rows = table(tmp_path, "claims_open").set_index(["claim", "scope"])["to be run"]
    found = rows["OP-LoRA is better than LoRA"]
    (command,) = [value for scope, value in found.items() if "blobs" in scope]
    assert command == "scripts/sweep_seeds.sh sdxl lora=0.001 oplora=0.0001 dataset=blobs"


def test_half_the_rank(stored, tmp_path):
    report.build(stored).write(tmp_path)
    rows = table(tmp_path, "sdxl_small_fluent_ranks")
    assert rows[["method", "rank", "mmd"]].to_numpy().tolist() == [
        ["LoRA", 4, "0.40 ± 0.25 (3)"],
        ["OP-LoRA", 2, "0.35 ± 0.25 (3)"],
        ["OP-LoRA", 4, "0.30 ± 0.25 (3)"],
    ]


def test_only_a_base_model_run(tmp_path):
    store(tmp_path / "runs", "base", 0.0, 0, None, value=0.8, fine_tune=False)
    report.build(tmp_path / "runs").write(tmp_path)
    assert len(table(tmp_path, "sdxl_small_fluent")) == 3
