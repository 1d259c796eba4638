"""The SDXL experiment end to end: the paper's path with tiny components of the very classes."""

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from processes import CHECKPOINT, base_and_still, kill_once, only_run, run_here
from safetensors.torch import load_file
from tiny_diffusion import naruto_folder, tiny_clip, tiny_pipeline, wikiart_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_pipeline().save_pretrained(folder / "pipeline")
    tiny_clip().save_pretrained(folder / "clip")
    naruto_folder(folder / "naruto")
    wikiart_folder(folder / "wikiart")
    return folder


def command(setting, runs, *overrides, dataset="naruto"):
    return [
        sys.executable, "experiments/sdxl.py", f"runtime.runs_dir={runs}", f"dataset={dataset}",
        f"dataset.train.path={setting / dataset}", "resolution=16", "rank=2", "alpha=4",
        "mlp_width=4", f"pipeline.pretrained_model_name_or_path={setting / 'pipeline'}",
        "pipeline.dtype.path=torch.float32", "~pipeline.revision", "~pipeline.vae",
        "training.bf16=false", "+training.use_cpu=true", "training.save_steps=4",
        "generate.steps=2", "images.shown=2", "images.steps=[4]", "images.at_steps=3",
        "distance.encoder._target_=oplora.studies.sdxl.images.TransformersClip",
        f"+distance.encoder.pretrained_model_name_or_path={setting / 'clip'}",
        "side_metrics=null", *overrides,
    ]  # fmt: skip


def environment(setting):
    return {**os.environ, "OPLORA_CACHE": str(setting / "cache")}


def run(setting, runs, *overrides, dataset="naruto"):
    done = run_here(command(setting, runs, *overrides, dataset=dataset), environment(setting))
    assert done.returncode == 0, done.stderr[-3000:]
    return only_run(runs)


@pytest.mark.parametrize(
    "dataset, method", [("naruto", "oplora"), ("wikiart", "opdora"), ("naruto", "pissa")]
)
def test_paper_path_trains_exports_generates_and_measures(setting, tmp_path, dataset, method):
    path, metrics = run(setting, tmp_path, f"method={method}", "lr=0.05", dataset=dataset)
    assert metrics["steps"] == 12  # 6 images, 2 epochs, batch 1
    assert 0 <= metrics["images"]["cmmd"] <= 40 and set(metrics["snapshots"]) == {"4"}
    assert len(list((path / "images").glob("*.png"))) == 6
    assert Image.open(path / "samples.png").size == Image.open(path / "reference.png").size
    if dataset == "wikiart":
        assert metrics["captions"][0] == "A painting of genre cityscape"
    # Stock diffusers, from the exported file alone, draws the images that were measured.
    pipeline = StableDiffusionXLPipeline.from_pretrained(setting / "pipeline")
    plain = drawn(pipeline, metrics["captions"][0])
    pipeline.load_lora_weights(path / "adapter")
    exported = drawn(pipeline, metrics["captions"][0])
    measured = np.array(Image.open(path / "images" / "00000.png")).astype(int)
    assert np.abs(exported - measured).max() <= 1
    assert np.abs(plain - measured).max() > 5


def drawn(pipeline, caption):
    image = pipeline(
        caption, height=16, width=16, num_inference_steps=2, guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(0)],
    ).images[0]  # fmt: skip
    return np.array(image).astype(int)


def test_base_model_without_fine_tuning_gets_its_yardsticks(setting, tmp_path):
    style = "dataset.base_style=${dataset.train}"
    _, metrics = run(setting, tmp_path, "fine_tune=false", "run_name=base", style)
    assert "train_seconds" not in metrics
    sticks = metrics["yardsticks"]
    assert sticks["gap"]["cmmd"] == pytest.approx(0, abs=1e-9)  # the same images here
    assert sticks["base"]["cmmd"] == pytest.approx(metrics["images"]["cmmd"])
    assert sticks["floor"] > 0


def test_the_base_model_has_the_loss_of_a_training_that_moves_nothing(setting, tmp_path):
    start = partial(run, setting)
    base, still = base_and_still(
        lambda runs, *rest: start(runs, "hold_out=0.4", "training.eval_strategy=epoch", *rest),
        tmp_path,
    )
    assert base["validation_loss"] == [[0, pytest.approx(still["validation_loss"][-1][1])]]


@pytest.mark.parametrize("when", ["training", "generating"])
def test_killed_and_resumed_equals_undisturbed(setting, tmp_path, when):
    slower = ["training.num_train_epochs=8"]
    slower += ["generate.batch_size=1", "generate.steps=60"] if when == "generating" else []
    trace = CHECKPOINT if when == "training" else "images/0*.png"
    kill_once(
        command(setting, tmp_path / "killed", *slower),
        tmp_path / "killed",
        trace,
        environment(setting),
    )
    assert not list(tmp_path.rglob("metrics.json"))
    results = []
    for name in ("killed", "calm"):
        path, metrics = run(setting, tmp_path / name, *slower)
        assert ("resumed" in metrics) == (name == "killed")
        # not the file's bytes: safetensors writes its header in random order
        tensors = load_file(path / "adapter" / "pytorch_lora_weights.safetensors")
        weights = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        images = {p.name: p.read_bytes() for p in (path / "images").glob("*.png")}
        kept = {key: metrics[key] for key in ("images", "snapshots", "steps")}
        results.append((kept, weights, images))
    assert results[0] == results[1]


def test_a_sweep_member_measures_the_held_out_loss_only(setting, tmp_path):
    held_out = "dataset.validation=${dataset.train}"
    every = ["training.eval_strategy=steps", "+training.eval_steps=6"]
    path, metrics = run(setting, tmp_path, "measure=false", "method=full", held_out, *every)
    assert [step for step, _ in metrics["validation_loss"]] == [6, 12]
    assert "images" not in metrics and not (path / "samples.png").exists()
    assert (path / "adapter" / "trained.safetensors").exists()


@pytest.mark.parametrize("method", ["full", "opdora"])
def test_half_precision_of_the_paper_trains_and_measures(setting, tmp_path, method):
    half = "pipeline.dtype.path=torch.bfloat16"
    options = ["training.bf16=true", "images.steps=[]", "training.num_train_epochs=1"]
    _, metrics = run(setting, tmp_path, f"method={method}", half, *options)
    assert metrics["steps"] == 6 and 0 <= metrics["images"]["cmmd"] <= 40


def test_wrong_input_is_one_line(setting, tmp_path):
    wrong = ["images.measured=0"]
    done = run_here(command(setting, tmp_path / "runs", *wrong), environment(setting))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and errors == ["error: 0 images wanted: at least 1"]


@pytest.mark.parametrize("dataset", ["naruto", "wikiart"])
def test_a_rate_is_chosen_on_held_out_images(setting, tmp_path, dataset):
    options = ["measure=false", "hold_out=0.3", "training.eval_strategy=epoch"]
    path, metrics = run(setting, tmp_path, *options, dataset=dataset)
    assert metrics["steps"] == 2 * 4 and len(metrics["validation_loss"]) == 2  # 4 of 6 images
    assert "images" not in metrics and not (path / "images").exists()


def test_dry_run_of_the_paper_loads_nothing(tmp_path):
    done = run_here(
        [sys.executable, "experiments/sdxl.py", "dry_run=true", "dataset=wikiart", "~estimate"],
        {"OPLORA_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "adapter parameters: 5,806,080" in done.stdout
    assert "base parameters: 2,567,463,684" in done.stdout
    assert "optimizer steps: 2,668" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", ["paper", "small"])
def test_dry_run_of_the_model_as_it_is_shows_no_adapter(preset):
    script = [sys.executable, "experiments/sdxl.py", "dry_run=true", f"preset={preset}"]
    done = run_here([*script, "fine_tune=false", "run_name=base"])
    assert done.returncode == 0, done.stderr
    assert "method: none" in done.stdout and "adapter" not in done.stdout


@pytest.mark.parametrize("method", ["vera", "eva"])
def test_methods_that_do_not_fit_say_why(setting, tmp_path, method):
    options = (f"method={method}", "measure=false")
    done = run_here(command(setting, tmp_path, *options), environment(setting))
    words = "not for diffusers models"
    assert done.returncode == 2 and words in done.stderr and not list(tmp_path.rglob("*.yaml"))
