"""The VL-BART part of the report: choice of rates, usual widths, the width sweep."""

import pandas
import pytest
import yaml
from stored_runs import store_vl_bart as store

from oplora.harness.runs import load_runs
from oplora.report.page import Writer
from oplora.report.tables import cited_table
from oplora.studies.vl_bart.report import EXPERIMENT


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    for lr, loss in ((1e-3, 0.5), (1e-2, 0.2), (1e-1, 0.4)):
        store(folder, "lora", lr, 0, loss)
        store(folder, "opdora", lr / 10, 0, loss - 0.1)
    for seed in range(3):
        store(folder, "lora", 1e-2, seed, 0.2, accuracy=0.6 + seed / 10)
        for width in (1, 2, 4):
            shift = (width - 1) / 100
            store(folder, "opdora", 1e-3, seed, 0.1, 0.65 + shift + seed / 10, width)
    return folder


def tables(runs, out):
    records, _ = load_runs(runs)
    Writer(out).write("test", [EXPERIMENT.read(records).section()])
    return lambda name: pandas.read_csv(out / "tables" / f"{name}.csv")


def test_every_method_is_scored_at_its_own_best_rate_and_usual_width(runs, tmp_path):
    store(runs, "lora", 1e-1, 0, 0.4, accuracy=0.99)  # a rate that was not chosen
    store(runs, "opdora", 1e-4, 0, 0.0, accuracy=0.99, width=2)  # a width's loss chooses no rate
    table = tables(runs, tmp_path)
    rates = table("vl_bart_small_rates").set_index("method")
    assert rates.loc["LoRA", "0.01"] == "0.200*" and rates.loc["OP-DoRA", "0.001"] == "0.100*"
    final = table("vl_bart_small").set_index("method")
    assert final.loc["LoRA", "vqa"] == "70.0 ± 24.8 (3)" == final.loc["LoRA", "nlvr"]
    assert final.loc["OP-DoRA", "average without captions"] == "78.0 ± 24.8 (3)"
    assert final.loc["LoRA", "cider"] == "120.0 ± 0.0 (3)"
    paired = table("vl_bart_small_paired").set_index("method")
    assert list(paired.index) == ["OP-DoRA"] and paired.loc["OP-DoRA", "items"] == 6
    assert paired.loc["OP-DoRA", "all three"] == "+8.0 [+8.0, +8.0]" == paired.loc["OP-DoRA", "gqa"]
    assert (tmp_path / "figures/vl_bart_small_curves.svg").exists()


def test_a_diverged_run_is_in_the_sweep_and_nowhere_else(runs, tmp_path):
    store(runs, "lora", 1.0, 0, 0.0)
    (path,) = runs.glob("*-lora-1.0-*")
    (path / "metrics.json").write_text('{"diverged": "NaN in the gradient", "steps": 3}')
    table = tables(runs, tmp_path)
    rates = table("vl_bart_small_rates").set_index("method")
    assert rates.loc["LoRA", "1"] == "diverged" and rates.loc["LoRA", "0.01"] == "0.200*"
    assert len(table("vl_bart_small")) == 2


def test_width_sweep(runs, tmp_path):
    store(runs, "opdora", 1e-4, 0, 0.9, accuracy=0.1, width=1)  # at another rate: not in the sweep
    widths = tables(runs, tmp_path)("vl_bart_small_width")
    assert widths["width"].tolist() == [1, 2, 4]
    assert widths["gqa"].tolist() == [f"{75 + w - 1}.0 ± 24.8 (3)" for w in (1, 2, 4)]
    assert (tmp_path / "figures/vl_bart_small_width.svg").exists()


def test_presets_are_never_mixed_and_nothing_is_no_section(runs, tmp_path):
    store(runs, "lora", 1e-2, 0, 0.1, accuracy=0.9, preset="paper")
    table = tables(runs, tmp_path)
    assert table("vl_bart_paper").loc[0, "vqa"] == "90.0 (1)"
    assert table("vl_bart_small").loc[0, "vqa"].startswith("70.0")
    assert EXPERIMENT.read([]).section() is None


def test_cited_values_are_the_papers():
    rows = cited_table("paper", EXPERIMENT.paper).frame.set_index("method")
    assert rows.shape == (5, 6) and rows.loc["opdora", "average"] == 77.6
    for name in rows.index:  # the paper's averages are those of its own columns, but for rounding
        tasks = rows.loc[name, ["vqa", "gqa", "nlvr", "cider"]]
        assert abs(tasks.mean() - rows.loc[name, "average"]) < 0.11, name
        average = rows.loc[name, "average without captions"]
        assert abs(tasks[:3].mean() - average) < 0.11, name


def test_the_rate_besides_the_adapters_was_chosen_once_for_all(runs, tmp_path):
    def at(path, rate):
        config = yaml.safe_load((path / "config.yaml").read_text()) | {"direct_lr": rate}
        (path / "config.yaml").write_text(yaml.safe_dump(config))

    for path in [p.parent for p in runs.rglob("config.yaml")]:
        at(path, 1e-2)
    for lr, loss in ((1e-2, 0.3), (1e-3, 0.1)):  # a lower loss, at another rate besides
        at(store(runs / "other", "lora", lr, 0, loss), 1e-3)
    table = tables(runs, tmp_path)
    rates = table("vl_bart_small_rates").set_index("method")
    assert rates.loc["LoRA", "0.01"] == "0.200*" and rates.loc["LoRA", "0.001"] == "0.500"
    direct = table("vl_bart_small_direct_rates")
    shown = [(row["rate"], row["0.001"], row["0.01"]) for _, row in direct.iterrows()]
    assert [(rate, at[:5]) for rate, at, _ in shown] == [(0.001, "0.100"), (0.01, "0.300")]
    assert shown[0][2] == "0.500 (1)" and shown[1][2].startswith("0.200")
