"""The commonsense experiment end to end: the paper's path with a tiny model of its class."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from processes import CHECKPOINT, base_and_still, kill_once, only_run, run_here
from tiny_language_model import tiny_llama, tiny_tokenizer, with_llamas_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

from oplora.harness.checkpoints import BestWeights
from oplora.studies.commonsense.metrics import held_out_nll
from oplora.studies.commonsense.packaged_items import TASKS
from oplora.studies.commonsense.tasks import paper_sides

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A model folder, and records in the file layout of the LLM-Adapters repository."""
    folder = tmp_path_factory.mktemp("commonsense")
    tokenizer = with_llamas_tokens(tiny_tokenizer("left"))
    tokenizer.save_pretrained(folder / "model")
    tiny_llama(len(tokenizer)).save_pretrained(folder / "model")

    def record(word, n):
        answer = f"{word}{1 + n % 2}"
        labels = f"{word}1/{word}2"
        text = f"Which is warm? case {n}\n\n{word}1: sun {word}2: moon\n\nAnswer format: {labels}"
        output = f"the correct answer is {answer}"
        return {"instruction": text, "input": "", "output": output, "answer": answer}

    def write(path, records):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records))

    write(
        folder / "records/ft-training_set/commonsense_170k.json",
        [record("answer", n) for n in range(40)],
    )
    for task in TASKS.values():
        word = "true" if task.folder == "boolq" else task.word
        write(
            folder / f"records/dataset/{task.folder}/test.json", [record(word, n) for n in range(2)]
        )
    return folder


def command(setting, runs, *overrides):
    model = setting / "model"
    return [
        sys.executable, "experiments/commonsense.py", f"runtime.runs_dir={runs}",
        f"model.pretrained_model_name_or_path={model}", "model.dtype=float32",
        f"tokenizer.pretrained_model_name_or_path={model}",
        f"records={setting / 'records'}", "data.validation_rows=8", "score_dtype=float32",
        "~model.revision", "~tokenizer.revision", "rank=2", "alpha=4", "mlp_width=4",
        "training.bf16=false", "+training.use_cpu=true", "training.per_device_train_batch_size=4",
        "training.gradient_accumulation_steps=1",
        "training.eval_steps=3", "training.save_steps=3", "evaluate.max_new_tokens=4",
        "evaluate.num_beams=2", *overrides,
    ]  # fmt: skip


def run(setting, runs, *overrides):
    return run_here(command(setting, runs, *overrides))


METHODS = ["oplora", "opdora", "lora", "lora_matched_mlp_start", "full", "opprompt", "rosa"]


@pytest.mark.parametrize("method", METHODS)
def test_paper_path_trains_scores_and_is_skipped_when_finished(setting, tmp_path, method):
    done = run(setting, tmp_path, f"method={method}")
    assert done.returncode == 0, done.stderr[-3000:]
    path, metrics = only_run(tmp_path)
    assert metrics["steps"] == 24 and len(metrics["validation_loss"]) == 8
    assert 0 <= metrics["accuracy"] <= 1 and set(TASKS) == {
        key.removeprefix("accuracy_") for key in metrics if key.startswith("accuracy_")
    }
    predictions = (path / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 2 * len(TASKS)
    assert (path / "adapter" / "adapter_model.safetensors").exists() == (method != "full")
    assert not (path / "checkpoints").exists()
    assert metrics["mlp_parameters"] > 0 or not method.startswith("op")
    assert "finished already" in run(setting, tmp_path, f"method={method}").stdout


@pytest.mark.parametrize("when", ["training", "scoring"])
def test_killed_and_resumed_equals_undisturbed(setting, tmp_path, when):
    slower = ["training.num_train_epochs=6", "evaluate.batch_size=1"]
    trace = CHECKPOINT if when == "training" else "predictions.jsonl"
    kill_once(command(setting, tmp_path / "killed", *slower), tmp_path / "killed", trace)
    assert not list(tmp_path.rglob("metrics.json"))
    results = []
    for name in ("killed", "calm"):
        done = run(setting, tmp_path / name, *slower)
        assert done.returncode == 0, done.stderr[-3000:]
        path, metrics = only_run(tmp_path / name)
        assert ("resumed" in metrics) == (name == "killed")
        adapter = (path / "adapter" / "adapter_model.safetensors").read_bytes()
        rows = (path / "predictions.jsonl").read_text()
        keep = ("accuracy", "validation_nll", "validation_loss", "steps")
        results.append(({k: metrics[k] for k in keep}, adapter, rows))
    assert results[0] == results[1]


def test_loglikelihood_switch_and_seeds(setting, tmp_path):
    score = "evaluate._target_=oplora.studies.commonsense.metrics.evaluate_loglikelihood"
    drop = ["~evaluate.num_beams", "~evaluate.max_new_tokens", "~evaluate.batch_size"]
    arguments = [a for a in command(setting, tmp_path, score) if "evaluate." not in a]
    done = run_here([*arguments, score, *drop])
    assert done.returncode == 0, done.stderr[-3000:]
    _, metrics = only_run(tmp_path)
    assert metrics["held_out_nll"] > 0


@pytest.mark.parametrize("method", ["oplora", "full"])
def test_a_run_that_diverges_is_recorded_and_not_tried_again(setting, tmp_path, method):
    arguments = (f"method={method}", "lr=1e18")
    done = run(setting, tmp_path, *arguments)
    assert done.returncode == 2 and "lower the learning rate" in done.stderr.lower()
    path, metrics = only_run(tmp_path)
    assert metrics.keys() == {"diverged", "steps"} and not (path / "checkpoints").exists()
    assert run(setting, tmp_path, *arguments).returncode == 0


def test_scores_keep_updates_that_half_precision_weights_would_round_away(setting, tmp_path):
    half = ["model.dtype=bfloat16", "training.bf16=true", "score_test=false", "method=lora"]
    done = run(setting, tmp_path, *half, "lr=1e-3", "training.num_train_epochs=1")
    assert done.returncode == 0, done.stderr[-3000:]
    path, metrics = only_run(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(setting / "model")
    rows = paper_sides(
        tokenizer, 0, source=str(setting / "records"), validation_rows=8,
        train_file="ft-training_set/commonsense_170k.json", test_file="dataset/{folder}/test.json",
    )["validation"]  # fmt: skip

    def nll(dtype):  # merged in this type
        base = AutoModelForCausalLM.from_pretrained(setting / "model", dtype=torch.bfloat16)
        model = PeftModel.from_pretrained(base, path / "adapter").to(dtype).merge_and_unload()
        return held_out_nll(model.float(), tokenizer, rows)

    assert metrics["validation_nll"] == pytest.approx(nll(torch.float32), abs=1e-6)
    assert abs(nll(torch.bfloat16) - nll(torch.float32)) > 1e-5


def test_the_weights_of_the_lowest_validation_loss_are_kept(tmp_path):
    model, path = torch.nn.Linear(2, 2), tmp_path / "checkpoints" / "best.safetensors"
    best = BestWeights(model, path)
    for step, loss in ((1, 3.0), (2, 1.0), (3, float("nan")), (4, 2.0)):
        torch.nn.init.constant_(model.weight, step)
        best.on_evaluate(None, TrainerState(global_step=step), None, {"eval_loss": loss})
    again = BestWeights(model, path)  # after a cut
    again.on_evaluate(None, TrainerState(global_step=5), None, {"eval_loss": 1.5})
    again.load()
    assert again.step == 2 and (model.weight == 2).all()
    assert not path.with_suffix(".partial").exists()


@pytest.mark.parametrize("method", ["eva", "adalora"])
def test_methods_that_read_data_or_the_number_of_steps_first(setting, tmp_path, method):
    short = ["training.num_train_epochs=1", "train_rows=32", "score_test=false"]
    done = run(setting, tmp_path, f"method={method}", *short)
    assert done.returncode == 0, done.stderr[-3000:]
    path, metrics = only_run(tmp_path)
    assert metrics["steps"] == 8
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == (method if method != "adalora" else True)
    assert config.get("total_step") == (8 if method == "adalora" else None)


def test_an_optimizer_that_finds_its_rate_shows_what_it_is_given():
    script = [sys.executable, "experiments/commonsense.py", "preset=small", "dry_run=true"]
    assert "learning rate 1, seed 0" in run_here([*script, "optimizer=prodigy"]).stdout
    assert "learning rate 0.0001, seed 0" in run_here(script).stdout


def test_a_method_that_reads_data_first_reads_the_training_s(setting, tmp_path):
    done = run(setting, tmp_path / "runs", "method=lora_ga")
    assert done.returncode == 0, done.stderr[-3000:]
    path, _ = only_run(tmp_path / "runs")
    config = json.loads((path / "adapter/adapter_config.json").read_text())
    assert config["r"] == 2 * 2 and config["init_lora_weights"] is True  # B A - B0 A0


def test_a_chain_refuses_the_best_checkpoint(setting, tmp_path):
    done = run(setting, tmp_path, "method=cola")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "keep_best=false" in errors[0]
    last = "keep_best=false"
    assert run(setting, tmp_path, "method=cola", last).returncode == 0


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("rank=x", "rank=x must be a whole number, at least 1"),
        ("lr=fast", "lr=fast must be a number"),
        ("dry_run=yess", "dry_run=yess must be true or false"),
        ("method=opmf", "this method is not for this experiment"),
        ("optimizer=schedulefree", "schedule-free"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(tmp_path, wrong, words):
    script = [sys.executable, "experiments/commonsense.py"]
    done = run_here([*script, "preset=small", "dry_run=true", wrong])
    assert done.returncode == 2 and words in done.stderr


def test_missing_data_is_one_line(setting, tmp_path):
    done = run(setting, tmp_path / "runs", "records=nowhere")
    assert done.returncode == 2 and "nowhere" in done.stderr
    assert len([x for x in done.stderr.splitlines() if x.startswith("error:")]) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("preset", ["paper", "small"])
@pytest.mark.parametrize("method", ["oplora", "pissa", "full"])
def test_dry_run_loads_nothing(tmp_path, preset, method):
    command = [sys.executable, "experiments/commonsense.py", "dry_run=true", f"preset={preset}"]
    command += [f"method={method}", f"runtime.runs_dir={tmp_path / 'runs'}"]
    command += ["~estimate"] * (preset == "paper")  # tested in test_cost.py
    done = run_here(command, {"OPLORA_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    for words in ("model:", "data:", "optimizer steps:", "MLP parameters:", "memory: about"):
        assert words in done.stdout
    assert not list(tmp_path.iterdir())
    if (preset, method) == ("paper", "oplora"):
        assert "adapter parameters: 56,098,816" in done.stdout


def test_the_base_model_has_the_loss_of_a_training_that_moves_nothing(setting, tmp_path):
    base, still = base_and_still(partial(run, setting), tmp_path)
    assert base["validation_loss"] == [[0, pytest.approx(still["validation_loss"][-1][1])]]
    assert base["validation_nll"] == pytest.approx(still["validation_nll"])
    assert base["accuracy"] == still["accuracy"]
