"""The report's frame: what comes from files alone, and how a number leads back to its runs."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import yaml
from stored_runs import store_commonsense, store_mf, store_sdxl, store_vl_bart, write

import oplora.studies
from oplora import report
from oplora.harness import entry
from oplora.harness.runs import Record
from oplora.report import titles
from oplora.report.comparison import rates_command
from oplora.report.figures import over_rates
from oplora.report.page import Table
from oplora.report.rules import HOLDS, NOT_RUN
from oplora.report.style import style

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "matrix_factorization", "rotated_mnist", "sdxl", "subjects", "vl_bart", "llava_cars",
    "commonsense", "glue",
}  # fmt: skip


@pytest.fixture
def stored(tmp_path):
    runs = tmp_path / "runs"
    for lr, loss in ((1e-3, 0.5), (1e-2, 0.2), (1e-1, 0.4)):
        store_vl_bart(runs, "lora", lr, 0, loss)
        store_vl_bart(runs, "oplora", lr / 10, 0, loss - 0.1)
    for seed in range(2):
        store_vl_bart(runs, "lora", 1e-2, seed, 0.2, accuracy=0.6 + seed / 10)
        store_vl_bart(runs, "oplora", 1e-3, seed, 0.1, accuracy=0.7 + seed / 10)
    return runs


@pytest.mark.parametrize("text", [None, "", "# @package _global_\ntitle:\nlr: 1\n"])
def test_a_preset_without_a_title_goes_by_its_name(stored, tmp_path, text):
    (tmp_path / "vl_bart").mkdir()
    if text is not None:
        (tmp_path / "vl_bart" / "mine.yaml").write_text(text)
    assert titles.presets("vl_bart", tmp_path) == {}
    store_vl_bart(stored, "lora", 1e-2, 0, 0.2, accuracy=0.9, preset="mine")
    store_commonsense(stored, "lora", 1e-2, 0, 0.2, nll=0.9, preset="mine")
    store_sdxl(stored, "lora", 1e-3, 0, 0.2, value=0.4, preset="mine")
    built = report.build(stored)
    built.write(tmp_path / "out")
    rows = pandas.read_csv(tmp_path / "out" / "tables" / "vl_bart_mine.csv")
    assert rows.loc[0, "vqa"] == "90.0 (1)"
    scopes = {str(claim.scope) for claim in built.claims}
    assert {"vl_bart mine", "commonsense mine", "sdxl mine, fluent"} <= scopes


def test_a_preset_file_may_be_empty(tmp_path, monkeypatch):
    (tmp_path / "preset").mkdir()
    (tmp_path / "preset" / "mine.yaml").write_text("")
    (tmp_path / "tiny.yaml").write_text(
        f"defaults: [{{preset: mine}}, _self_]\nhydra: {{run: {{dir: {tmp_path}/x}}}}\n"
    )
    monkeypatch.setattr(entry, "CONFIGS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tiny.py"])
    seen = []
    entry.experiment("tiny")(lambda cfg: seen.append(cfg.preset))()
    assert seen == ["mine"]


def test_another_optimizer_is_another_method():
    prodigy = {"optimizer": {"_target_": "prodigyopt.Prodigy"}, "method": {"name": "lora"}}
    adamw = {"optimizer": {"_target_": "torch.optim.AdamW"}, "method": {"name": "lora"}}
    names = [titles.method_of(Record(Path(), c, {}, {})) for c in (prodigy, adamw)]
    assert names == ["lora+Prodigy", "lora"]
    assert list(map(titles.title, names)) == ["LoRA, Prodigy", "LoRA"]
    assert rates_command("sdxl", "small", names[:1]) == (
        "python experiments/sdxl.py preset=small method=lora optimizer=prodigy"
    )


def test_a_methods_role_is_what_its_file_says_not_its_name(tmp_path):
    assert titles.method("lora_gaussian").role == "method"
    assert titles.method("lora_gaussian").title == "lora_gaussian"
    sweep = {"lora_gaussian": {1.0: [1.0], 2.0: [2.0]}, "lora_matched": {1.0: [1.0], 2.0: [2.0]}}
    (axis,) = over_rates("x", "", sweep, dict.fromkeys(sweep, 1.0), "loss").drawing.axes
    drawn = {line.get_label(): line.get_linestyle() for line in axis.lines}
    assert drawn["lora_gaussian"] == "-" and drawn["LoRA, OP's step sizes"] == ":"
    names = ["lora_mlp_start", "lora_gaussian", "oplora", "lora_rite", "full", "lora", "rslora"]
    assert titles.in_order(names) == [
        "full", "lora", "oplora", "lora_rite", "lora_gaussian", "rslora", "lora_mlp_start",
    ]  # fmt: skip


def test_a_figure_of_many_methods_has_panels():
    kin = ["full", "lora", "oplora", "dora", "scale"]
    others = ["cola", "relora", "xgblora", "rosa", "loft", "cora", "altlora"]
    for names, panels in ((kin + others[:6], 1), (kin + others, 3)):
        sweep = {name: {1e-3: [0.5, 0.6], 1e-2: [0.4, 0.5]} for name in names}
        figure = over_rates("x", "", sweep, dict.fromkeys(names, 1e-2), "loss")
        axes = figure.drawing.axes
        drawn = [
            [line.get_label() for line in axis.lines if not line.get_label().startswith("_")]
            for axis in axes
        ]
        assert len(axes) == panels and figure.data.count(b">learning rate<") == panels
        assert sorted({name for panel in drawn for name in panel}) == sorted(
            titles.title(name) for name in names
        )
    assert [titles.title("lora") in panel for panel in drawn] == [True] * 3
    assert list(map(len, drawn)) == [5, 7, 2]


@pytest.mark.parametrize(
    ("line", "told"),
    [("role: contrl", "contrl.*choose one of full, method, control"),
     ("family: lor", "lor.*choose one of lora, dora, full")],
)  # fmt: skip
def test_a_wrong_role_or_family_is_named_with_its_remedy(tmp_path, line, told):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(f"title: Mine\n{line}\n")
    with pytest.raises(ValueError, match=told):
        titles.methods(tmp_path)


def test_every_method_has_one_look_that_its_file_decides():
    looks = {name: style(name) for name in titles.methods()}
    assert looks["lora"].color == looks["oplora"].color == looks["lora_matched"].color
    assert [looks[m].kind for m in ("lora", "oplora", "lora_matched")] == ["plain", "OP", "control"]
    colors = {titles.method(name).family: look.color for name, look in looks.items()}
    assert len(set(colors.values())) == len(colors) >= 5
    shown = ("lora", "oplora", "oplora_text", "oplora_lite", "dora", "opdora", "full", "pissa")
    assert len({looks[name] for name in shown}) == len(shown)
    assert style("lora_gaussian").color == style("rslora").color  # of no family


@pytest.mark.parametrize("path", sorted((ROOT / "configs/method").glob("*.yaml")), ids=str)
def test_every_methods_file_says_all_of_itself(path):
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    grids = yaml.safe_load((ROOT / "configs/grids.yaml").read_text(encoding="utf-8"))
    assert {"title", "role", "mlp", "grid"} <= given.keys() and given["name"] == path.stem
    assert given["role"] in titles.ROLES and given["mlp"] in ("full", "lite", "none", "other")
    everywhere = given["grid"] in ("plain", "text", "full")
    assert (all if everywhere else any)(given["grid"] in by_grid for by_grid in grids.values())


NEW_ROOM = """
from oplora.report.claims import better
from oplora.report.comparison import final_loss
from oplora.report.experiment import Experiment
from oplora.report.metrics import Column, Score

EXPERIMENT = Experiment(
    name="tiny", order=9, title="A tiny experiment", paper="table4.yaml", loss=final_loss,
    scores=(Score("points", "accuracy"),), columns=lambda final: [Column("top-1", "accuracy")],
    theses=(better("OP-LoRA is better than LoRA", "9", "oplora", "lora"),),
)
"""


def test_a_new_experiment_is_one_folder(tmp_path, monkeypatch):
    (tmp_path / "rooms" / "tiny").mkdir(parents=True)
    (tmp_path / "rooms" / "tiny" / "report.py").write_text(NEW_ROOM)
    folders = [*oplora.studies.__path__, str(tmp_path / "rooms")]
    monkeypatch.setattr(oplora.studies, "__path__", folders)
    for method, accuracy in (("lora", 0.5), ("oplora", 0.6)):
        for seed in range(2):
            path = tmp_path / "runs" / f"{method}{seed}"
            path.mkdir(parents=True)
            config = {"experiment": "tiny", "preset": "small", "method": {"name": method}}
            config |= {"lr": 1e-3, "seed": seed, "rank": 8, "mlp_width": 32}
            costs = ("adapter_parameters", "mlp_parameters", "trained_parameters", "train_seconds")
            metrics = dict.fromkeys((*costs, "peak_memory_bytes"), 1) | {"accuracy": accuracy}
            write(path, config, metrics | {"validation_loss": [[1, 1.0]]}, {})
    built = report.build(tmp_path / "runs")
    built.write(tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "## A tiny experiment" in text and "| OP-LoRA | 0.001 | 60.0 ± 0.0 (2) |" in text
    (claim,) = [claim for claim in built.claims if claim.section == "9"]
    assert claim.verdict == HOLDS and str(claim.scope) == "tiny small (points)"
    sys.modules.pop("oplora.studies.tiny.report")


def test_claims_carry_their_fields(stored):
    store_mf(stored, "mf", [0.3, 0.08, 0.08, 0.0601, None])
    store_mf(stored, "opmf", [0.08, 0.0601, 0.0601, 0.07, None])
    found = report.build(stored).claims
    tables = {part.name: part for part in report.build(stored).parts if isinstance(part, Table)}
    judged = [claim for claim in found if claim.verdict != NOT_RUN]
    assert [claim.text for claim in judged] == tables["claims"].frame["claim"].tolist()
    assert len(found) == len(judged) + len(tables["claims_open"].rows)
    (gain,) = [c for c in judged if c.section == "5.2, Table 3"]
    assert (
        gain.figure == "vl_bart_small_rates"
        and gain.scope.short == "tiny BART (points of accuracy)"
    )
    assert {r.config["method"]["name"] for r in gain.runs} == {"lora", "oplora"}
    (spike,) = [c for c in judged if "spikes" in c.text]
    assert (spike.section, spike.figure, spike.where) == ("4.1", "figure3", None)
    assert all(claim.runs for claim in judged)


def test_a_number_leads_to_its_runs(stored, tmp_path):
    built = report.build(stored)
    built.write(tmp_path)
    runs = pandas.read_csv(tmp_path / "tables" / "runs.csv", index_col="run")
    assert len(runs) == len(built.records)
    for record in built.records:
        row = runs.loc[record.path.relative_to(stored).as_posix()]
        assert row["experiment"] == "vl_bart" and row["method"] == record.config["method"]["name"]
        assert (row["rate"], row["seed"]) == (record.config["lr"], record.config["seed"])
        assert row["train_seconds"] == record.metrics["train_seconds"]
        scored = record.metrics.get("vqa_accuracy")
        assert pandas.isna(row["vqa_accuracy"]) if scored is None else row["vqa_accuracy"] == scored
    table = pandas.read_csv(tmp_path / "tables" / "vl_bart_small.csv")
    behind = pandas.read_csv(tmp_path / "tables" / "vl_bart_small.runs.csv")
    for number, row in table.iterrows():
        own = runs.loc[behind.loc[behind["row"] == number, "run"]]
        assert len(own) == 2 and set(own["rate"]) == {row["rate"]}
        assert f"{100 * own['vqa_accuracy'].mean():.1f}" == row["vqa"].split(" ")[0]


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_the_frame_names_no_experiment_and_rooms_know_only_themselves():
    for path in (ROOT / "oplora/report").glob("*.py"):
        words = {
            n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)
        }
        assert not words & ROOMS, path
    for path in (ROOT / "oplora/studies").glob("*/report*"):
        for file in [path] if path.suffix else path.glob("*.py"):
            own = f"oplora.studies.{path.parent.name}.report"
            for used in imports(file):
                allowed = ("oplora.report", "oplora.harness.runs", own)
                assert not used.startswith("oplora") or used.startswith(allowed), file
    code = "import sys; from oplora import report; report.experiments(); "
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit('torch' in sys.modules)"], cwd=ROOT
    )
    assert done.returncode == 0
    assert {experiment.name for experiment in report.experiments()} == ROOMS
    assert importlib.util.find_spec("oplora.studies.sdxl.report")


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_no_two_experiments_share_a_column(preset):
    found = [titles.presets(room).get(preset) for room in ROOMS]
    columns = [scope.column for scope in found if scope]
    assert len(columns) >= 7 and len(columns) == len(set(columns))
