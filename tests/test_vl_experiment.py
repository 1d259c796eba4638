"""The VL-BART experiment end to end: the paper's path with a tiny BART and upstream's files."""

import sys
from functools import partial
from pathlib import Path

import pytest
from processes import CHECKPOINT, base_and_still, kill_once, only_run, run_here
from tiny_vl import CELLS, SIZE, tiny_bart, tiny_tokenizer, write_records

ROOT = Path(__file__).resolve().parent.parent
KEEP = ("epochs", "validation_loss", "train_loss", "steps", "average", "cider")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A model folder and VL-Adapter's `datasets` folder."""
    folder = tmp_path_factory.mktemp("vl_bart")
    tiny_bart().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_records(folder / "records")
    return folder


def command(setting, runs, *overrides):
    model = setting / "model"
    return [
        sys.executable, "experiments/vl_bart.py", f"runtime.runs_dir={runs}", "seed=3",
        f"model.pretrained_model_name_or_path={model}", "~model.revision", "~tokenizer.revision",
        f"tokenizer.pretrained_model_name_or_path={model}", f"records={setting / 'records'}",
        f"model.feature_size={SIZE}", f"grids.feature_size={SIZE}", f"model.cells={CELLS}",
        f"grids.cells={CELLS}", "data.gqa_validation=0.3", "rank=2", "alpha=2",
        "batch_sizes={vqa: 2, gqa: 3, nlvr: 2, caption: 4}", "training.num_train_epochs=2",
        "training.dataloader_num_workers=0", "+training.use_cpu=true", "training.save_steps=2",
        "training.logging_steps=1", "evaluate.batch_size=2", "evaluate.caption_tokenizer=simple",
        "evaluate.caption_beams=2", "evaluate.answer_tokens=5", "evaluate.caption_tokens=8",
        *overrides,
    ]  # fmt: skip


def run(setting, runs, *overrides):
    return run_here(command(setting, runs, *overrides))


def result(path, metrics):
    weights = [p.read_bytes() for p in sorted(path.glob("adapter/*.safetensors"))]
    rows = (path / "predictions.jsonl").read_text()
    return {key: metrics[key] for key in KEEP}, weights, rows


@pytest.fixture(scope="module")
def calm(setting, tmp_path_factory):
    """An undisturbed run of OP-DoRA."""
    runs = tmp_path_factory.mktemp("calm")
    done = run(setting, runs, "method=opdora")
    assert done.returncode == 0, done.stderr[-3000:]
    return runs


def test_paper_path_trains_scores_and_is_skipped_when_finished(setting, calm):
    path, metrics = only_run(calm)
    assert metrics["steps"] == 2 * (3 + 2 + 3 + 3)  # batches of 5, about 7, 5 and 10 items
    assert [epoch for epoch, _ in metrics["epochs"]] == [0, 1, 2]
    assert len(metrics["validation_loss"]) == 2
    for name in ("vqa_accuracy", "gqa_accuracy", "nlvr_accuracy", "average"):
        assert 0 <= metrics[name] <= 1 and name in metrics["epochs"][0][1]
    assert metrics["cider"] >= 0 and metrics["caption_tokenizer"] == "simple"
    assert metrics["mlp_parameters"] > 0 and path.name.startswith("opdora-adamw-lr0.001-width4-")
    predictions = (path / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 4 * 5
    assert (path / "adapter/adapter_model.safetensors").exists()
    assert not (path / "checkpoints").exists() and not (path / "validation.jsonl").exists()
    assert "finished already" in run(setting, calm, "method=opdora").stdout


def test_full_fine_tuning(setting, tmp_path):
    done = run(setting, tmp_path, "method=full", "training.num_train_epochs=1")
    assert done.returncode == 0, done.stderr[-3000:]
    path, metrics = only_run(tmp_path)
    assert metrics["adapter_parameters"] == metrics["mlp_parameters"] == 0
    assert metrics["trained_parameters"] > 7000 and not (path / "adapter").exists()


@pytest.mark.parametrize("when", ["training", "scoring"])
def test_killed_and_resumed_equals_undisturbed(setting, calm, tmp_path, when):
    trace = CHECKPOINT if when == "training" else "predictions.jsonl"
    kill_once(command(setting, tmp_path, "method=opdora"), tmp_path, trace)
    assert not list(tmp_path.rglob("metrics.json"))
    done = run(setting, tmp_path, "method=opdora")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed" in only_run(tmp_path)[1]
    assert result(*only_run(tmp_path)) == result(*only_run(calm))


def test_missing_feature_is_one_line_before_training(setting, tmp_path):
    lost = setting / "records/nlvr/clip_features/data_clip_RN101_att/valid2-img1.h5"
    lost.rename(lost.with_suffix(".gone"))
    done = run(setting, tmp_path / "runs")
    lost.with_suffix(".gone").rename(lost)
    errors = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "nlvr/valid/nlvr2_valid_2" in errors[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("preset", "method", "line"),
    [
        ("paper", "oplora", "adapter parameters: 7,077,888"),  # the paper's 7.08M
        ("small", "full", "MLP parameters: 0"),
    ],
)
def test_dry_run_loads_nothing(tmp_path, preset, method, line):
    command = [sys.executable, "experiments/vl_bart.py", "dry_run=true", f"preset={preset}"]
    command += [f"method={method}", f"runtime.runs_dir={tmp_path / 'runs'}"]
    command += ["~estimate"] * (preset == "paper")  # tested in test_cost.py
    done = run_here(command, {"OPLORA_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    for words in ("model:", "data:", "optimizer steps:", "one task per batch", line):
        assert words in done.stdout
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_biases_says_so_and_trains_without(setting, tmp_path):
    short = ["method=ia3", "training.num_train_epochs=1", "score_test=false"]
    done = run(setting, tmp_path / "with", *short)
    assert done.returncode == 2 and "add trained_besides.bias=null" in done.stderr
    done = run(setting, tmp_path / "without", *short, "trained_besides.bias=null")
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_base_model_has_the_loss_of_a_training_that_moves_nothing(setting, tmp_path):
    base, still = base_and_still(partial(run, setting), tmp_path)
    assert base["validation_loss"] == [[0, pytest.approx(still["validation_loss"][-1][1])]]
    assert base["average"] == pytest.approx(still["average"])
