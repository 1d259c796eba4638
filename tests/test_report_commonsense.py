"""The commonsense part of the report: choice of rates, intervals, paired differences."""

import json

import pandas
import pytest
from stored_runs import store_commonsense as store

from oplora import report
from oplora.report.statistics import at_shared_steps, mean_interval, paired_bootstrap, shown
from oplora.report.tables import cited_scores, cited_table


@pytest.fixture
def stored(tmp_path):
    runs = tmp_path / "runs"
    for lr, value in ((1e-4, 3.5), (1e-3, 3.2), (1e-2, 3.4)):
        store(runs, "lora", lr, 0, value)
        store(runs, "oplora", lr / 10, 0, value - 0.1)
    for seed, shift in enumerate((0.0, 0.1, -0.1)):
        store(runs, "lora", 1e-3, seed, 3.2, nll=3.0 + shift)
        store(runs, "oplora", 1e-4, seed, 3.1, nll=2.9 + shift)
    return runs


def table(out, name):
    return pandas.read_csv(out / "tables" / f"{name}.csv")


def test_every_method_is_scored_at_its_own_best_rate(stored, tmp_path):
    store(stored, "lora", 1e-2, 0, 3.4, nll=1.0)  # a rate that was not chosen: not in the table
    report.build(stored).write(tmp_path)
    name = "commonsense_small_float32"
    rates = table(tmp_path, f"{name}_rates").set_index("method")
    assert rates.loc["LoRA", "0.001"] == "3.200*" and rates.loc["OP-LoRA", "0.0001"] == "3.100*"
    final = table(tmp_path, name).set_index("method")
    assert final.loc["LoRA", "held-out NLL"] == "3.000 ± 0.248 (3)"
    assert final.loc["OP-LoRA", "held-out NLL"] == "2.900 ± 0.248 (3)"
    assert final.loc["LoRA", "average"] == "50.0 ± 0.0 (3)"
    paired = table(tmp_path, f"{name}_paired").set_index("method")
    assert paired.loc["OP-LoRA", "items"] == 4
    assert paired.loc["OP-LoRA", "NLL"] == "-0.100 [-0.100, -0.100]"
    text = (tmp_path / "report.md").read_text()
    assert "controls is LoRA: OP-LoRA is better, -0.100 [-0.100, -0.100]" in text


def test_op_lora_is_judged_against_the_control_that_shares_step_sizes_and_start(stored, tmp_path):
    for seed, shift in enumerate((0.0, 0.1, -0.1)):
        store(stored, "lora_matched_mlp_start", 1e-4, seed, 3.1, nll=2.8 + shift)
    report.build(stored).write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "first A is LoRA, both: OP-LoRA is worse, +0.100 [+0.100, +0.100]" in text


def test_a_rate_is_judged_by_the_seeds_that_all_rates_have(stored, tmp_path):
    # a bad second seed at the chosen rate: the others have none, so it must not count
    store(stored, "dora", 1e-4, 0, 3.5)
    store(stored, "dora", 1e-3, 0, 3.2)
    store(stored, "dora", 1e-3, 1, 9.0, nll=3.0)
    store(stored, "dora", 1e-2, 0, 3.4)
    report.build(stored).write(tmp_path)
    rates = table(tmp_path, "commonsense_small_float32_rates").set_index("method")
    assert rates.loc["DoRA", "0.001"] == "3.200*"


def test_a_best_rate_at_the_edge_of_the_grid_is_marked(tmp_path):
    for lr, value in ((1e-4, 3.5), (1e-3, 3.2)):
        store(tmp_path / "runs", "lora", lr, 0, value)
    report.build(tmp_path / "runs").write(tmp_path)
    rates = table(tmp_path, "commonsense_small_float32_rates")
    assert rates.loc[0, "0.001"] == "3.200* (edge)"


def test_scales_and_weight_types_are_never_mixed(stored, tmp_path):
    store(stored, "lora", 1e-3, 0, 1.0, nll=0.5, preset="paper", dtype="bfloat16")
    store(stored, "lora", 1e-3, 0, 9.0, nll=8.0, dtype="bfloat16")
    report.build(stored).write(tmp_path)
    assert table(tmp_path, "commonsense_small_float32").loc[0, "held-out NLL"].startswith("3.000")
    assert table(tmp_path, "commonsense_small_bfloat16").loc[0, "held-out NLL"] == "8.000 (1)"
    assert table(tmp_path, "commonsense_paper_bfloat16").loc[0, "held-out NLL"] == "0.500 (1)"


def test_cited_values_are_the_papers():
    rows = cited_table("paper", "table2.yaml").frame.set_index("method")
    assert cited_scores("table2.yaml", "average")["dora"] == 73.7  # the mean of three seeds
    assert rows.loc["oplora", "average"] == 77.1 and rows.shape == (17, 9)
    later = cited_scores("table2.yaml", "average")  # the second text's, at equal ranks
    assert (later["op_scaled"], later["riemannian"], later["lora_large"]) == (77.7, 76.7, 61.6)
    off = rows.iloc[:, :8].mean(axis=1) - rows["average"]
    rounded_anew = {"LoRA, rank 16": 0.1, "opdora (mean of 3)": 0.0625}  # by the paper
    for name, bound in (dict.fromkeys(rows.index, 0.06) | rounded_anew).items():
        assert abs(off[name]) < bound + 1e-9, name


def test_curves_that_were_evaluated_at_other_steps_meet_where_they_can():
    steps, values = at_shared_steps([[[10, 3.0], [20, 2.0], [30, 1.0]], [[30, 5.0], [20, 4.0]]])
    assert steps == [20, 30] and values.tolist() == [[2.0, 1.0], [4.0, 5.0]]
    assert at_shared_steps([[[10, 1.0]], [[20, 1.0]]])[0] == at_shared_steps([])[0] == []


def test_statistics_by_hand():
    assert mean_interval([2.0]) == (2.0, None)
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5)
    assert shown([], 1) is None and shown([50.0], 1) == "50.0 (1)"
    mean, low, high = paired_bootstrap([1.0, 3.0], [3.0, 1.0])
    assert mean == 1.5 and low == 1.0 and high == 3.0
    mean, half = mean_interval(range(12))
    assert half == pytest.approx(2.201 * 13**0.5 / 12**0.5)  # eleven degrees of freedom
    with pytest.raises(ValueError):
        mean_interval([])


def test_generated_answers_have_no_likelihoods(tmp_path):
    """As the paper's preset scores: what is missing stays missing, and ends no report."""
    for method in ("lora", "oplora"):
        for seed in range(2):
            path = store(tmp_path / "runs", method, 1e-4, seed, 0.5, nll=0.7, preset="paper")
            metrics = json.loads((path / "metrics.json").read_text())
            del metrics["held_out_nll"]
            (path / "metrics.json").write_text(json.dumps(metrics))
            rows = map(json.loads, (path / "predictions.jsonl").read_text().splitlines())
            kept = [{k: r[k] for k in ("id", "task", "answer", "correct")} for r in rows]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            (path / "predictions.jsonl").write_text(text)
    built = report.build(tmp_path / "runs")
    built.write(tmp_path / "out")
    table = pandas.read_csv(tmp_path / "out" / "tables" / "commonsense_paper_float32.csv")
    assert table["average"].str.startswith("50.0").all() and table["held-out NLL"].isna().all()
