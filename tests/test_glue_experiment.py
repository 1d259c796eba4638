"""The GLUE experiment end to end: the paper's path with a tiny RoBERTa and tiny files."""

import sys
from functools import partial

import pytest
import yaml
from processes import CHECKPOINT, base_and_still, kill_once, only_run, run_here
from safetensors.torch import load_file
from tiny_roberta import save_encoder, save_glue


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Folders of a model and of the data."""
    folder = tmp_path_factory.mktemp("glue")
    save_encoder(folder / "model")
    save_glue(folder / "glue")
    return folder


def command(setting, runs, *overrides):
    model = setting / "model"
    return [
        sys.executable, "experiments/glue.py", f"runtime.runs_dir={runs}",
        f"model.pretrained_model_name_or_path={model}",
        f"tokenizer.pretrained_model_name_or_path={model}", "~model.revision",
        "~tokenizer.revision", f"data.source={setting / 'glue'}", "data.validation=0.25",
        "cutoff=32", "rank=2", "alpha=2", "vera_rank=8", "mlp_width=4", "task.vera.epochs=4",
        "training.bf16=false", "+training.use_cpu=true", "training.per_device_train_batch_size=6",
        "training.eval_strategy=epoch", *overrides,
    ]  # fmt: skip


def run(setting, runs, *overrides):
    return run_here(command(setting, runs, *overrides))


@pytest.mark.parametrize(
    ("task", "method", "first", "metrics"),
    [
        ("sst2", "opvera", "accuracy", {"accuracy"}),
        ("cola", "vera", "matthews", {"matthews", "accuracy"}),
        ("qnli", "oplora", "accuracy", {"accuracy"}),
        ("mrpc", "lora", "accuracy", {"accuracy", "f1"}),
        ("rte", "full", "accuracy", {"accuracy"}),
        ("stsb", "oplora", "pearson", {"pearson", "spearman"}),
    ],
)
def test_paper_path_trains_scores_and_is_skipped_when_finished(
    setting, tmp_path, task, method, first, metrics
):
    arguments = (f"task={task}", f"method={method}")
    done = run(setting, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    path, found = only_run(tmp_path)
    assert found["steps"] == 3 * 4 and len(found["validation_loss"]) == 4
    assert metrics <= found.keys() and found["score"] == found[first]
    assert len((path / "predictions.jsonl").read_text().splitlines()) == 8
    assert (found["mlp_parameters"] > 0) == method.startswith("op")
    assert ("majority" in found) == (task != "stsb")
    if method != "full":  # the head is shipped beside the adapter
        saved = load_file(path / "adapter" / "adapter_model.safetensors")
        assert any("classifier" in name for name in saved)
        config = yaml.safe_load((path / "config.yaml").read_text())
        assert config["direct_lr"] == config["task"]["vera"]["head_lr"]
    assert not (path / "checkpoints").exists()
    assert "finished already" in run(setting, tmp_path, *arguments).stdout


def test_killed_and_resumed_equals_undisturbed(setting, tmp_path):
    slower = ["task.vera.epochs=15"]
    kill_once(command(setting, tmp_path / "killed", *slower), tmp_path / "killed", CHECKPOINT)
    assert not list(tmp_path.rglob("metrics.json"))
    results = []
    for name in ("killed", "calm"):
        done = run(setting, tmp_path / name, *slower)
        assert done.returncode == 0, done.stderr[-3000:]
        path, metrics = only_run(tmp_path / name)
        assert ("resumed" in metrics) == (name == "killed")
        adapter = (path / "adapter" / "adapter_model.safetensors").read_bytes()
        keep = ("accuracy", "test_loss", "validation_loss", "steps")
        results.append(({k: metrics[k] for k in keep}, adapter))
    assert results[0] == results[1]


def test_the_base_model_has_the_loss_of_a_training_that_moves_nothing(setting, tmp_path):
    base, still = base_and_still(partial(run, setting), tmp_path)
    assert base["validation_loss"] == [[0, pytest.approx(still["validation_loss"][-1][1])]]
    assert base["test_loss"] == pytest.approx(still["test_loss"], abs=1e-5)
    assert "train_seconds" not in base


def test_a_higher_rate_of_the_head_moves_the_head_alone(setting, tmp_path):
    heads = []
    for rate in ("1e-12", "1e-2"):
        done = run(setting, tmp_path / rate, "method=lora", "lr=1e-12", f"direct_lr={rate}")
        assert done.returncode == 0, done.stderr[-3000:]
        path, _ = only_run(tmp_path / rate)
        heads.append(load_file(path / "adapter" / "adapter_model.safetensors"))
    moved = {n for n in heads[0] if not heads[0][n].allclose(heads[1][n], atol=1e-8)}
    assert moved == {n for n in heads[0] if "classifier" in n}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["task=sst3"], "there is no task/sst3: did you mean sst2"),
        (["preset=small", "task=cola"], "task=cola is not in the package: take one of sst2, mrpc"),
        (["data.source=./nowhere"], "nowhere/sst2 has no train-"),
        (["data.validation=1.5"], "validation=1.5: give a share"),
        (["task.columns=[text]"], "sst2: train has no column 'text', only idx, sentence, label"),
        (["task.classes=3"], "task.classes=3, but sst2 has 2"),
    ],
)
def test_wrong_input_is_one_line(setting, tmp_path, wrong, words):
    given = command(setting, tmp_path / "runs", *wrong)
    if "preset=small" in wrong:  # which knows none of the other options
        given = [*given[:3], *given[4:5], *wrong]
    done = run_here(given)
    assert done.returncode == 2 and words in done.stderr, done.stderr[-2000:]
    assert len([x for x in done.stderr.splitlines() if x.startswith("error:")]) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("task", ["sst2", "stsb"])
@pytest.mark.parametrize("preset", ["paper", "small"])
def test_dry_run_loads_nothing(tmp_path, preset, task):
    arguments = [sys.executable, "experiments/glue.py", "dry_run=true", f"preset={preset}"]
    arguments += [f"task={task if preset == 'paper' else 'rte'}", f"runtime.runs_dir={tmp_path}"]
    done = run_here(arguments, {"OPLORA_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    # d and b of query and value in every layer: 12 · 2 · (1024 + 768), 6 · 2 · (512 + 384)
    count = "43,008" if preset == "paper" else "10,752"
    assert f"adapter parameters: {count}" in done.stdout
    assert not list(tmp_path.iterdir())
