"""Rotated MNIST's tables and verdicts, from made-up batches."""

import pandas
import pytest
from stored_runs import store_mnist

from oplora import report
from oplora.report.page import ReportFigure
from oplora.report.rules import EQUAL_RATES, FAILS, HOLDS, NOT_RUN

LORA = [7.9, 7.9, 7.0, 1.0, 2.0, None]
OPLORA = [7.0, 4.0, 1.2, 0.8, 1.0, None]
INSIDE = {"H_W": [10.0] * 3, "H_A": [12.0] * 3, "H_B": [9.0] * 3, "A": [2.0] * 3, "B": [2.0] * 3}


def verdicts(runs):
    """Verdict and evidence by what the claim is about."""
    words = {
        "best training loss": "best", "across rates": "across", "stays low": "low",
        "less sensitive": "sensitive", "steepest": "steepest", "Eq. 3": "eq3",
    }  # fmt: skip
    claims = [c for c in report.build(runs).claims if c.text.startswith("Rotated MNIST")]
    return {name: c for c in claims for word, name in words.items() if word in c.text}


@pytest.fixture
def runs(tmp_path):
    store_mnist(tmp_path / "runs", "lora", LORA, 0.1, INSIDE)
    store_mnist(tmp_path / "runs", "oplora", OPLORA, 0.4, INSIDE)
    return tmp_path / "runs"


def test_claims_are_judged_from_the_members(runs):
    found = verdicts(runs)
    assert {name: claim.verdict for name, claim in found.items()} == {
        "best": HOLDS, "across": HOLDS, "low": EQUAL_RATES, "sensitive": HOLDS,
        "steepest": HOLDS, "eq3": HOLDS,
    }  # fmt: skip
    assert "+0.200 ± 0.000 nats (3 seeds)" in found["best"].evidence
    assert found["across"].evidence == "at 5 of the 5 rates at which neither diverges"
    # of 8 - 0.8 there remain 8 - 4 and 8 - 7; of LoRA's 8 - 1 the same 8 - 7.9
    assert "OP-LoRA 56% and 14%, LoRA 1% and 1%" in found["low"].evidence
    assert "OP-LoRA 0.40, LoRA 0.10" in found["steepest"].evidence
    assert "upper bound by 6 of 6" in found["eq3"].evidence
    assert {r.config["method"]["name"] for r in found["best"].runs} == {"lora", "oplora"}


@pytest.mark.parametrize(
    "losses, low, across",
    [
        ([4.0, 3.9, 1.2, 0.8, 1.0, None], HOLDS, HOLDS),  # more than half of the fall is left
        ([7.9, 7.8, 7.5, 0.8, 3.0, None], FAILS, FAILS),
        ([7.9, 7.6, 6.0, 1.5, 1.9, None], FAILS, EQUAL_RATES),
        ([1.5, 1.0, 2.0, 3.0, 4.0, None], NOT_RUN, EQUAL_RATES),  # 10^2 times lower is not there
    ],
)
def test_low_losses_and_lower_ones(tmp_path, losses, low, across):
    store_mnist(tmp_path, "lora", [7.8, 7.7, 7.0, 1.0, 2.0, None])
    store_mnist(tmp_path, "oplora", losses)
    found = verdicts(tmp_path)
    assert (found["low"].verdict, found["across"].verdict) == (low, across)


@pytest.mark.parametrize("projection, verdict", [(0.4, HOLDS), (0.0, FAILS), (0.05, FAILS)])
def test_the_steepest_direction(tmp_path, projection, verdict):
    store_mnist(tmp_path, "lora", LORA, 0.05)
    store_mnist(tmp_path, "oplora", OPLORA, projection)
    assert verdicts(tmp_path)["steepest"].verdict == verdict


@pytest.mark.parametrize("outside", [2.0, 41.0])  # 10 / 2² ≤ κ(H_A) ≤ 2² × 10
def test_one_condition_number_outside_is_enough(runs, outside, tmp_path):
    numbers = {**INSIDE, "H_A": [12.0, outside, 12.0]}
    store_mnist(runs, "oplora_linear", OPLORA, 0.4, numbers)
    claim = verdicts(runs)["eq3"]
    assert claim.verdict == FAILS and "5 of 9" not in claim.evidence
    kept = "lower bound kept by 8" if outside < 10 else "upper bound by 8"
    assert kept in claim.evidence


def test_tables_and_figures(runs, tmp_path):
    built = report.build(runs)
    built.write(tmp_path / "out")
    rows = pandas.read_csv(tmp_path / "out" / "tables" / "rotated_mnist_small.csv")
    assert rows["rate"].tolist() == [1.0, 1.0]
    assert rows["training loss"].tolist() == ["1.000 ± 0.248 (3)", "0.800 ± 0.248 (3)"]
    assert rows["diverged"].tolist() == ["3 of 18"] * 2 and rows["shipped parameters"][1] == 10
    behind = pandas.read_csv(tmp_path / "out" / "tables" / "rotated_mnist_small.runs.csv")
    assert behind["run"].tolist() == ["lora-mnist", "oplora-mnist"]
    names = {part.name for part in built.parts if isinstance(part, ReportFigure)}
    wanted = {f"rotated_mnist_small_{name}" for name in ("rates", "surface", "projection")}
    assert wanted <= names
    for name in ("claims", "sensitivity_all"):
        assert (
            not pandas.read_csv(tmp_path / "out" / "tables" / f"{name}.runs.csv").duplicated().any()
        )


def test_missing_batches_are_asked_for_whole(tmp_path):
    store_mnist(tmp_path, "lora", LORA)
    found = verdicts(tmp_path)
    wanted = "python experiments/rotated_mnist.py --multirun preset=small method=lora,oplora"
    for name in ("best", "across", "low", "steepest"):
        assert found[name].verdict == NOT_RUN and "method=" in found[name].command, name
    assert found["eq3"].command == wanted
    (paper,) = [c for c in report.build(tmp_path).claims if c.text.startswith("All claims on rot")]
    assert paper.command == "python experiments/rotated_mnist.py --multirun method=lora,oplora"


def test_generators_stand_beside_one_another(runs):
    store_mnist(runs, "oplora_linear", OPLORA)
    parts = [p for p in report.build(runs).parts if getattr(p, "name", "") == "ablation_small"]
    (row,) = parts[0].rows
    assert row.cells["OP-LoRA, no ReLU"] == row.cells["OP-LoRA"] == "0.800 ± 0.248 (3)"
    wanted = "python experiments/rotated_mnist.py --multirun preset=small method=oplora_scalar"
    assert row.cells["OP-LoRA, one number"].command == wanted
    assert row.cells["HyperLoader"] is None and row.cells["the MLP over one number"] is None
