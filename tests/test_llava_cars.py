"""LLaVA on cars end to end: the paper's path with a tiny LLaVA and a folder of photos."""

import io
import json
import sys
from functools import partial
from pathlib import Path

import pytest
from processes import CHECKPOINT, base_and_still, kill_once, only_run, run_here
from tiny_llava import CLASSES, photo, save_llava, write_cars

ROOT = Path(__file__).resolve().parent.parent
KEEP = ("train_loss", "validation_loss", "steps", "accuracy", "exact_accuracy", "test_nll")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A model folder and a folder of cars."""
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder / "model")
    write_cars(folder / "cars")
    return folder


def command(setting, runs, *overrides):
    return [
        sys.executable, "experiments/llava_cars.py", f"runtime.runs_dir={runs}", "rank=4",
        f"tokenizer.pretrained_model_name_or_path={setting / 'model'}", "tokenizer.revision=null",
        f"data.source={setting / 'cars'}", "data.revision=null", "data.validation=0.2",
        "mlp_width=8", "lr=0.03", "training.per_device_train_batch_size=4",
        "training.gradient_accumulation_steps=2", "training.num_train_epochs=3",
        "training.eval_strategy=steps", "+training.eval_steps=2", "training.save_steps=2",
        "training.logging_steps=1",
        "+training.use_cpu=true", "evaluate.batch_size=3", "evaluate.max_new_tokens=4",
        *overrides,
    ]  # fmt: skip


def run(setting, runs, *overrides):
    return run_here(command(setting, runs, *overrides))


def result(path, metrics):
    weights = [p.read_bytes() for p in sorted(path.glob("adapter/*.safetensors"))]
    return {k: metrics[k] for k in KEEP}, weights, (path / "predictions.jsonl").read_text()


@pytest.fixture(scope="module")
def calm(setting, tmp_path_factory):
    """An undisturbed run of OP-LoRA."""
    runs = tmp_path_factory.mktemp("calm")
    done = run(setting, runs)
    assert done.returncode == 0, done.stderr[-3000:]
    return runs


def test_paper_path_trains_scores_and_is_skipped_when_finished(setting, calm):
    path, metrics = only_run(calm)
    assert metrics["steps"] == 3 * 2 and len(metrics["validation_loss"]) == 3  # 16 photos, batch 8
    assert metrics["train_loss"][-1][1] < metrics["train_loss"][0][1]
    assert metrics["chance"] == metrics["majority"] == 1 / 4
    assert metrics["adapter_parameters"] == 4 * (24 + 32) + 4 * (32 + 32)
    assert metrics["mlp_parameters"] > 8 * metrics["adapter_parameters"]
    rows = [json.loads(line) for line in (path / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and {row["label"] for row in rows} >= {"2007 Audi S4 Sedan"}
    assert metrics["accuracy"] == sum(row["found"] == row["label"] for row in rows) / 8
    config = json.loads((path / "adapter/adapter_config.json").read_text())
    assert config["lora_alpha"] == 2 * config["r"] == 8
    assert set(config["target_modules"]) == {"linear_1", "linear_2"}
    assert not (path / "checkpoints").exists()
    assert path.name.startswith("oplora-r4-adamw-lr0.03-width8-seed0-")
    assert "finished already" in run(setting, calm).stdout


@pytest.mark.parametrize("method", ["oplora", "full"])
def test_killed_and_resumed_equals_undisturbed(setting, calm, tmp_path, method):
    chosen = [f"method={method}"]
    if method != "oplora":
        calm = tmp_path / "calm"
        done = run(setting, calm, *chosen)
        assert done.returncode == 0, done.stderr[-3000:]
    cut = tmp_path / "cut"
    kill_once(command(setting, cut, *chosen), cut, CHECKPOINT)
    sizes = [path.stat().st_size for path in cut.rglob("checkpoints/*/*model.safetensors")]
    assert 0 < max(sizes) < 10_000  # never of the language model
    done = run(setting, cut, *chosen)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed" in only_run(cut)[1]
    assert result(*only_run(cut)) == result(*only_run(calm))


def test_full_fine_tuning_is_the_projectors(setting, tmp_path):
    done = run(setting, tmp_path, "method=full", "training.num_train_epochs=1", "cache.limit_gb=0")
    assert done.returncode == 0, done.stderr[-3000:]
    path, metrics = only_run(tmp_path)
    assert metrics["trained_parameters"] == 24 * 32 + 32 + 32 * 32 + 32
    assert metrics["adapter_parameters"] == 0 and not (path / "adapter").exists()


def test_the_base_model_is_scored_without_training(setting, tmp_path):
    base, still = base_and_still(partial(run, setting), tmp_path)
    path, _ = only_run(tmp_path / "base")
    assert path.name.startswith("base-") and 0 <= base["accuracy"] <= 1
    assert "steps" not in base and base["chance"] == 0.25
    assert base["validation_loss"] == [[0, pytest.approx(still["validation_loss"][-1][1])]]
    assert base["test_nll"] == pytest.approx(still["test_nll"])


def test_a_truncated_photo_is_one_line_before_training(setting, tmp_path):
    content = io.BytesIO()
    photo(1).resize((200, 200)).save(content, "JPEG")
    damaged = setting / "cars/test" / CLASSES[0] / "9.jpg"
    damaged.write_bytes(content.getvalue()[:-400])
    done = run(setting, tmp_path / "runs")
    damaged.unlink()
    errors = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "test/2" in errors[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["rank=16"], ["adapter parameters: 212,992", "6,400 of 64 rows"]),  # the paper's 0.213M
        (["method=full"], ["MLP parameters: 0", "memory: about 14.4 GB"]),  # not of 7B parameters
    ],
)
def test_dry_run_loads_nothing(tmp_path, overrides, lines):
    command = [sys.executable, "experiments/llava_cars.py", "dry_run=true", "~estimate", *overrides]
    command += [f"runtime.runs_dir={tmp_path / 'runs'}"]
    done = run_here(command, {"OPLORA_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    for words in ("llava-hf/llava-1.5-7b-hf @", "tanganke/stanford_cars", *lines):
        assert words in done.stdout
    assert not list(tmp_path.iterdir())
