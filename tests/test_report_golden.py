"""The whole report of a small set of runs, byte for byte, and what deleting one of them changes.

After a wanted change: OPLORA_WRITE_GOLDEN=1 pytest tests/test_report_golden.py, and read the diff.
"""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from stored_runs import store_commonsense, store_mf, store_sdxl, store_vl_bart

from oplora import report
from oplora.report.page import ReportFigure, Table

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """All experiments; one run each that is unfinished, diverged, dirty, foreign or a duplicate."""
    root = tmp_path_factory.mktemp("stored")
    store_mf(root / "mf", "mf", [0.3, 0.08, 0.08, 0.0601, None])
    store_mf(root / "mf", "opmf", [0.08, 0.0601, 0.0601, 0.07, None])
    store_mf(root / "mf", "mf_matched_mlp_start", [0.09, 0.0601, 0.065, 0.2, None])
    shutil.copytree(root / "mf" / "mf-sgd", root / "mf" / "mf-sgd-again")
    for lr, nll in ((1e-4, 3.5), (1e-3, 3.2), (1e-2, 3.4)):
        store_commonsense(root / "c", "lora", lr, 0, nll)
        store_commonsense(root / "c", "oplora", lr / 10, 0, nll - 0.1)
    for seed, shift in enumerate((0.0, 0.1, -0.1)):
        store_commonsense(root / "c", "lora", 1e-3, seed, 3.2, nll=3.0 + shift)
        store_commonsense(root / "c", "oplora", 1e-4, seed, 3.1, 2.9 + shift, dirty=seed == 1)
    (store_commonsense(root / "c", "dora", 1e-3, 0, 3.3) / "metrics.json").unlink()
    for method, base in (("lora", 1e-3), ("oplora", 1e-4)):
        for factor, loss in ((1, 0.5), (10, 0.2), (100, 0.4)):
            store_vl_bart(root / "v", method, base * factor, 0, loss)
        for seed in range(2):
            store_vl_bart(root / "v", method, base * 10, seed, 0.2, 0.6 + seed / 50)
    for width in (1, 4, 128):
        store_vl_bart(root / "v", "oplora", 1e-3, 0, 0.2, 0.5 + width / 1000, width)
    path = store_vl_bart(root / "v", "lora", 1.0, 0, 9.0)
    (path / "metrics.json").write_text(json.dumps({"diverged": "loss is nan", "steps": 3}))
    store_sdxl(root / "s", "base", 0.0, 0, None, value=0.8, fine_tune=False)
    for seed in range(2):
        store_sdxl(root / "s", "lora", 1e-3, seed, 0.2, value=0.4)
        store_sdxl(root / "s", "oplora", 1e-4, seed, 0.2, 0.3, versions={"torch": "2"})
        store_sdxl(root / "s", "oplora", 1e-4, seed, 0.2, value=0.35 + seed / 100, rank=2)
    return root


@pytest.fixture
def runs(stored, tmp_path):
    return Path(shutil.copytree(stored, tmp_path / "runs"))


@pytest.fixture(scope="module")
def before(stored):
    return tables(stored)


def tables(root):
    parts = report.build(root).parts
    return {part.name: part.frame for part in parts if isinstance(part, Table)}


def test_the_report_is_the_stored_one(runs, tmp_path):
    report.build(runs).write(tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    text = re.sub(r"## Where the paper contradicts.*?(?=## )", "", text, flags=re.DOTALL)
    if os.environ.get("OPLORA_WRITE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        (GOLDEN / "report.md").write_text(text, encoding="utf-8")
    assert text == (GOLDEN / "report.md").read_text(encoding="utf-8")


def test_runs_that_need_a_word_are_listed(before):
    listed = dict(before["noted_runs"].itertuples(index=False))
    assert listed["mf/mf-sgd-again"].startswith("the same config as mf/mf-sgd")
    assert listed["c/small-float32-dora-0.001-0-False"] == "not finished"
    assert listed["v/small-lora-1.0-0-32-False"] == "failed: loss is nan"
    assert "uncommitted" in listed["c/small-float32-oplora-0.0001-1-True"]
    assert "other library versions" in listed["s/fluent-oplora-4-0.0001-0-True-True"]
    assert len(listed) == 6


def others(rows, owner):
    return rows[~rows["method"].str.contains(owner)].reset_index(drop=True)


@pytest.mark.parametrize(
    ("path", "owner"),
    [
        ("c/small-float32-oplora-0.0001-2-True", "OP-LoRA"),
        ("v/small-oplora-0.001-1-32-True", "OP-LoRA"),
        ("v/small-oplora-0.001-0-4-True", "OP-LoRA"),
        ("s/fluent-oplora-2-0.0001-1-True-True", "OP-LoRA"),
        ("mf/mf_matched_mlp_start-sgd", "MF, both"),
    ],
)
def test_deleting_a_run_changes_its_cells_and_no_others(runs, before, path, owner):
    shutil.rmtree(runs / path)
    after = tables(runs)
    experiment = {"c": "commonsense", "v": "vl_bart", "s": "sdxl", "m": "mf"}[path[0]]
    changed = [name for name in before if not before[name].equals(after.get(name))]
    assert any(name.startswith(experiment) for name in changed)
    across = ("which", "matrix", "claims", "claims_open", "controls", "power", "sensitivity_all")
    for name in changed:
        assert name.startswith(experiment) or name in across, name
        if name == f"{experiment}_small" or name.startswith("commonsense_small_float32"):
            kept = [
                rows[~rows["method"].str.contains(owner)] for rows in (before[name], after[name])
            ]
            assert kept[0].reset_index(drop=True).equals(kept[1].reset_index(drop=True)), name


def test_a_claim_waits_when_its_runs_are_deleted(runs, before):
    claim = "OP-LoRA is better than LoRA"
    rows = before["claims"]
    judged = rows[(rows["claim"] == claim) & (rows["source"] == "5.2, Table 3")]
    assert len(judged) == 1
    shutil.rmtree(runs / "v" / "small-oplora-0.001-1-32-True")
    after = tables(runs)
    rows = after["claims_open"]
    waiting = rows[(rows["claim"] == claim) & rows["scope"].str.startswith("tiny BART")]
    assert waiting["to be run"].tolist() == [
        "scripts/sweep_seeds.sh vl_bart lora=0.01 oplora=0.001"
    ]
    assert waiting["evidence here"].tolist() == ["1 shared seeds"]


def test_the_readme_is_filled_and_its_figures_are_rendered(stored, tmp_path):
    spec = importlib.util.spec_from_file_location("render", ROOT / "scripts" / "report.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    paths = [Path(shutil.copy(text, tmp_path)) for text in texts]
    built = report.build(stored)
    script.fill_texts(built, paths)
    filled = [path.read_text(encoding="utf-8") for path in paths]
    text = "".join(filled)
    assert "(held-out nats per token) | 0.001 → 0.0001 | 0.1 | +0.100 ± 0.000 (3) |" in filled[0]
    for readme in (filled[0], texts[0].read_text(encoding="utf-8")):  # the published one, too
        assert len(readme.splitlines()) <= 250 and len(readme.split()) <= 1500
    assert "| OP-LoRA† | 0.0001 | 2.900 ± 0.248 (3) | 50.0 ± 0.0 (3) |\n" in text
    assert "Not run yet: `scripts/sweep_learning_rates.sh llava_cars`" in text
    assert "oplora/report/rules.py " in text and "scripts/multirun.sh " in text
    figures = {part.file for part in built.parts if isinstance(part, ReportFigure)}
    shown = re.findall(r"results/published/report/figures/([\w.]+)", text)
    assert len(shown) > 3 and set(shown) <= figures
    script.fill_texts(built, paths)
    assert [path.read_text(encoding="utf-8") for path in paths] == filled
    links = [(path, link) for path, source in zip(texts, filled)
             for link in re.findall(r"\]\((?!https?:)([^)#]+)", source)]  # fmt: skip
    made = ROOT / "results" / "published" / "report"  # rendered, so not everywhere
    for path, link in links:
        target = (path.parent / link).resolve()
        assert target.exists() or made in target.parents, (path.name, link)
