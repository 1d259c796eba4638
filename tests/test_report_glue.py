"""The GLUE part of the report: every task by itself, with rates of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from omegaconf import OmegaConf
from stored_runs import store_glue

from oplora import report
from oplora.harness import entry
from oplora.harness.runs import load_runs
from oplora.report.page import Writer
from oplora.report.tables import cited_table
from oplora.studies.glue.report import EXPERIMENT

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def runs(tmp_path):
    """On SST-2 the middle rate is the best one, on MRPC and STS-B the lowest."""
    folder = tmp_path / "runs"
    for task, losses in (("sst2", (0.5, 0.3, 0.6)), ("mrpc", (0.4, 0.5, 0.6)), ("stsb", (1, 2, 3))):
        best = losses.index(min(losses))
        for method, factor, score in (("lora", 1, 0.6), ("oplora", 0.1, 0.7), ("vera", 10, 0.5),
                                      ("opvera", 1, 0.8)):  # fmt: skip
            for n, loss in enumerate(losses):
                store_glue(folder, task, method, factor * 10 ** (n - 3), 0, loss)
            for seed in range(3):
                rate = factor * 10 ** (best - 3)
                store_glue(folder, task, method, rate, seed, losses[best], score)
        base = 4.0 if task == "stsb" else 0.69
        store_glue(folder, task, "lora", 1e-3, 0, base, 0.4, fine_tune=False)
    return folder


def tables(runs, out):
    Writer(out).write("test", [EXPERIMENT.read(load_runs(runs)[0]).section()])
    return lambda name: pandas.read_csv(out / "tables" / f"{name}.csv").set_index("method")


def test_a_table_per_task_with_its_own_metrics(runs, tmp_path):
    table = tables(runs, tmp_path)
    sst2, mrpc, stsb = (table(f"glue_small_{task}") for task in ("sst2", "mrpc", "stsb"))
    assert list(sst2.index) == [
        "always the most frequent class", "zero-shot (no fine-tuning)", "LoRA", "OP-LoRA",
        "OP-VeRA", "VeRA",
    ]  # fmt: skip
    assert sst2.loc["OP-VeRA", "score"] == "80.0 ± 0.0 (3)" and sst2.loc["OP-VeRA", "rate"] == 0.01
    assert sst2.loc["always the most frequent class", "score"] == "60.0"
    assert mrpc.loc["LoRA", "f1"] == "60.0 ± 0.0 (3)" and mrpc.loc["LoRA", "rate"] == 0.001
    assert "spearman" in stsb and "always the most frequent class" not in stsb.index


def test_a_task_on_which_nothing_was_learned_is_not_scored(runs):
    for method in ("lora", "oplora"):
        for rate, loss in ((1e-3, 0.692), (1e-2, 0.9)):
            store_glue(runs, "rte", method, rate, 0, loss)
    store_glue(runs, "rte", "lora", 1e-3, 0, 0.691, 0.5, fine_tune=False)
    parts = EXPERIMENT.read(load_runs(runs)[0]).section().parts
    (statement,) = [part for part in parts if getattr(part, "name", "") == "glue_small_rte"]
    assert statement.text.endswith(
        "below the base model's (that is 0.691, the best adapter's 0.692)."
    )


def test_differences_are_paired_by_row(runs, tmp_path):
    table = tables(runs, tmp_path)
    sst2 = table("glue_small_sst2_paired")
    assert sst2.loc["OP-LoRA", "rows"] == 10
    assert sst2.loc["OP-LoRA", "accuracy"].startswith("+10.0 [")
    stsb = table("glue_small_stsb_paired")
    assert "accuracy" not in stsb or stsb["accuracy"].isna().all()
    assert stsb.loc["OP-LoRA", "loss"] == "+0.000 [+0.000, +0.000]"


def test_comparisons_by_task_take_the_papers_number_of_the_task(runs):
    first = {c.variant: c for c in EXPERIMENT.read(load_runs(runs)[0]).comparisons[::2]}
    assert first["sst2"].cited == {"vera": 94.0, "opvera": 94.3} and first["mrpc"].cited == {}
    assert first["sst2"].advantage("opvera", "vera") == pytest.approx([30.0] * 3)
    assert first["sst2"].command("vera", "opvera") == (
        "scripts/sweep_seeds.sh glue vera=0.1 opvera=0.01 task=sst2"
    )
    assert "task=mrpc" in first["mrpc"].base_command
    rows = cited_table("paper", EXPERIMENT.paper).frame.set_index("method")
    assert rows.loc["opvera", "cola"] == 62.1


def test_rates_are_told_task_by_task(runs, tmp_path, capsys):
    rates = report.build(runs).rates["glue"]
    assert rates["small task=sst2"]["lora"] == 0.01 and rates["small task=mrpc"]["lora"] == 0.001
    told = tmp_path / "summary.json"
    told.write_text(json.dumps({"rates": {"glue": rates}}))
    cfg = {"preset": "small", "method": {"name": "lora"}, "lr": 1e-4, "task": {"name": "mrpc"}}
    entry.tell_rate(OmegaConf.create(cfg), "glue", told)
    assert capsys.readouterr().out.endswith("best for lora is lr=0.001\n")
    (tmp_path / "all" / "glue").mkdir(parents=True)
    runs.rename(tmp_path / "all" / "glue" / "small")
    script = [sys.executable, str(ROOT / "scripts/rates.py"), "glue"]
    script += ["--runs", str(tmp_path / "all")]
    done = subprocess.run([*script, "task=sst2", "lora", "vera"], capture_output=True, text=True)
    assert done.stdout == "lora=0.01 vera=0.1\n"
    done = subprocess.run([*script, "lora"], capture_output=True, text=True)
    assert done.returncode == 2 and "with one of task=mrpc, task=sst2, task=stsb" in done.stderr


def test_what_the_experiment_claims(runs):
    claims = [c for c in EXPERIMENT.read(load_runs(runs)[0]).claims() if "sst2" in str(c.scope)]
    judged = {(c.text, c.scope.unit): c.verdict for c in claims}
    assert judged["OP-VeRA is better than VeRA", "points"] == "holds"
    assert judged["OP-LoRA is better than LoRA", "points"] == "holds"
