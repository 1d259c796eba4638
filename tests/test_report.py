"""The report: rules of the verdicts, tables and pages, from stored runs alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pandas
import pytest
import yaml

from oplora import report
from oplora.report.mf import study
from oplora.report.mf.claims import claims
from oplora.report.page import Section, Table, markdown_table, write_report

ROOT = Path(__file__).resolve().parent.parent
RATES = [0.01, 0.1, 1.0, 10.0, 100.0]
SVD = 0.06


def store(folder, method, finals, optimizer="sgd", **environment):
    """A run with one final error per rate (None: diverged) at three seeds, and plain curves."""
    path = folder / f"{method}-{optimizer}"
    path.mkdir(parents=True)
    problem = dict(rows=100, columns=100, rank=8, condition_number=None, loss="mse", steps=1000)
    config = {
        "experiment": "matrix_factorization",
        "preset": "paper",
        "method": {"name": method},
        "optimizer": {"name": optimizer},
        "problem": {**problem, "log_every": 10},
        "rates": RATES,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "environment.json").write_text(json.dumps({"cpu": "test", **environment}))
    metrics = {
        "final_mse": [[f, f, f] for f in finals],
        "diverged": [[f is None] * 3 for f in finals],
        "svd_mse": [SVD] * 3,
        "svd_effective_rank": [4.5] * 3,
        "trained_parameters": 1600,
    }
    time = numpy.linspace(0, 1, 101)
    mse = numpy.array(
        [[(f or numpy.nan) + 0.3 * (1 - time) ** 9 for _ in range(3)] for f in finals]
    )
    curves = {name: mse for name in ("mse", "gradient_norm", "gradient_cosine", "effective_rank")}
    numpy.savez(path / "curves.npz", **curves, step_multiplier=mse + 1, hidden_l1=mse)
    (path / "metrics.json").write_text(json.dumps(metrics))
    return path


@pytest.fixture
def stored(tmp_path):
    store(tmp_path, "mf", [0.3, 0.08, 0.08, 0.0601, None])
    store(tmp_path, "opmf", [0.08, 0.0601, 0.0601, 0.07, None])
    return tmp_path


def read(folder):
    records, _ = report.load_runs(folder)
    return study.studies(records)["sgd"]


def test_reaching_and_diverging_are_per_rate_majorities(stored):
    methods = read(stored)
    assert methods["mf"].reaches.tolist() == [False, False, False, True, False]
    assert methods["opmf"].reaches.tolist() == [False, True, True, False, False]
    assert methods["mf"].diverges.tolist() == [False] * 4 + [True]
    assert methods["mf"].best == 3 and methods["opmf"].best == 1


def test_a_claim_holds_on_the_grid_in_a_window_or_not(tmp_path):
    cases = {
        "holds": ([0.3, 0.3, 0.3, 0.3, None], [0.06, 0.06, 0.06, 0.06, None]),
        "holds in a range": ([0.3, 0.3, 0.3, 0.3, 0.06], [0.06, 0.06, 0.3, 0.06, None]),
        "does not hold": ([0.3, 0.3, 0.06, 0.06, 0.06], [0.3, 0.3, 0.06, 0.3, None]),
    }
    for number, (verdict, (mf, op)) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        store(folder, "mf", mf)
        store(folder, "opmf", op)
        rows = claims({"sgd": read(folder)})
        row = rows[rows["claim"].str.startswith("Four rates")].iloc[0]
        assert row["verdict"] == verdict
        if verdict == "holds in a range":
            assert row["range"] == "rates 0.01 to 10 (4 of 5)"


def test_deleting_a_run_changes_exactly_its_cells(stored, tmp_path):
    path = store(stored, "mf_matched", [0.2] * 5)
    report.render(stored, tmp_path / "before")
    table = "tables/mf_final_sgd.csv"
    before = pandas.read_csv(tmp_path / "before" / table)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    report.render(stored, tmp_path / "after")
    after = pandas.read_csv(tmp_path / "after" / table)
    pandas.testing.assert_frame_equal(before.drop(columns=["MF, OP's step sizes"]), after)


def test_rendering_twice_gives_the_same_bytes(stored, tmp_path):
    for name in ("a", "b"):
        report.render(stored, tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 8
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_unfinished_dirty_and_duplicate_runs_are_named(stored, tmp_path):
    store(stored / "again", "mf", [0.3, 0.08, 0.08, 0.0601, None])
    dirty = store(stored, "mf_matched", [0.2] * 5, dirty=True)
    (store(stored, "mf_mlp_start", [0.2] * 5) / "metrics.json").unlink()
    report.render(stored, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "mf_mlp_start-sgd: not finished" in text
    assert f"{dirty.name}: run from code with uncommitted changes" in text
    assert "again/mf-sgd: the same config as mf-sgd" in text or "mf-sgd: the same config" in text


def test_pages_escape_and_show_missing_values_as_dashes(tmp_path):
    rows = pandas.DataFrame({"method": ["a|<b>", "c"], "mse": [0.5, None]})
    out = write_report("T & T", [Section("S", ["text <i>", Table("t", "cap", rows)])], tmp_path)
    page = out.read_text()
    assert "T &amp; T" in page and "text &lt;i&gt;" in page and "<td>—</td>" in page
    assert markdown_table(rows).splitlines()[2:] == ["| a\\|<b> | 0.5 |", "| c | — |"]
    assert "http" not in page, "the page must be self-contained"


def test_the_script_ends_with_a_clear_error(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "report.py")]
    for folder in (tmp_path, tmp_path / "nowhere"):
        done = subprocess.run([*script, str(folder)], capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
