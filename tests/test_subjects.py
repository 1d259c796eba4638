"""Subjects: DreamBench, emoji characters, fidelity by hand, and the experiment end to end."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from processes import CHECKPOINT, kill_once, only_run, run_here
from tiny_diffusion import pictures, tiny_clip, tiny_pipeline
from tiny_emoji import emoji_packages
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from oplora.harness.emoji import CATEGORIES, split_of
from oplora.harness.runs import open_run
from oplora.studies.sdxl.images import TransformersViT
from oplora.studies.subjects.fidelity import between, unit_features, within
from oplora.studies.subjects.subjects import dreambench, emoji_subjects, read_prompts

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = """Classes

subject_name,class
mug,mug
cat2,cat

Prompts

Object Prompts
prompt_list = [
'a {0} {1} under water'.format(unique_token, class_token),
'a green {0} {1}'.format(unique_token, class_token),
]
Live Subject Prompts
prompt_list = [
'a {0} {1} with a scarf'.format(unique_token, class_token),
'a {0} {1} on skis'.format(unique_token, class_token),
]
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subjects")
    tiny_pipeline().save_pretrained(folder / "pipeline")
    tiny_clip().save_pretrained(folder / "clip")
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    for name, count in (("mug", 3), ("cat2", 2)):
        (folder / "dreambooth" / "dataset" / name).mkdir(parents=True)
        for number, picture in enumerate(
            pictures(6)[:count] if name == "mug" else pictures(6)[3:5]
        ):
            picture.save(folder / "dreambooth" / "dataset" / name / f"{number:02d}.jpg")
    (folder / "dreambooth" / "dataset" / "prompts_and_classes.txt").write_text(PROMPTS)
    return folder


def command(setting, runs, *overrides):
    encoders = "oplora.studies.sdxl.images.TransformersViT"
    return [
        sys.executable, "experiments/subjects.py", f"runtime.runs_dir={runs}", "resolution=16",
        f"dataset.subjects.source={setting / 'dreambooth'}", "rank=2", "alpha=4", "mlp_width=4",
        f"pipeline.pretrained_model_name_or_path={setting / 'pipeline'}",
        "pipeline.dtype.path=torch.float32", "~pipeline.revision", "~pipeline.vae",
        "training.bf16=false", "+training.use_cpu=true", "training.max_steps=6",
        "training.save_steps=2", "generate.steps=2", "pictures=2", "shown=2",
        f"encoders.dino._target_={encoders}",
        f"encoders.dino.pretrained_model_name_or_path={setting / 'vit'}", "~encoders.dino.revision",
        f"encoders.clip_i.pretrained_model_name_or_path={setting / 'clip'}",
        "~encoders.clip_i.revision", "side_metrics.clip_t=null", *overrides,
    ]  # fmt: skip


def environment(setting):
    return {**os.environ, "OPLORA_CACHE": str(setting / "cache")}


def run(setting, runs, *overrides):
    return run_here(command(setting, runs, *overrides), environment(setting))


def measured(setting, runs, *overrides):
    done = run(setting, runs, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    return only_run(runs)


@pytest.mark.parametrize("method", ["oplora", "pissa"])
def test_every_subject_gets_an_adapter_and_scores(setting, tmp_path, method):
    path, metrics = measured(setting, tmp_path, f"method={method}", "lr=0.05")
    assert metrics["steps"] == 6 and set(metrics["subjects"]) == {"mug", "cat2"}
    for name in ("dino", "clip_i"):
        each = [scores[name] for scores in metrics["subjects"].values()]
        assert metrics[name] == pytest.approx(sum(each) / 2) and all(-1 <= s <= 1 for s in each)
    for name in ("samples", "reference"):  # one picture of each subject
        assert Image.open(path / f"{name}.png").size == (2 * 16, 16)
    assert metrics["adapter_parameters"] > 0 and "yardsticks" not in metrics
    assert (metrics["mlp_parameters"] > 0) == (method == "oplora")
    # Stock diffusers draws what was measured from the exported file alone, for each subject.
    for name, prompt in (("mug", "a sks mug under water"), ("cat2", "a sks cat with a scarf")):
        part = path / "subjects" / name
        assert len(list((part / "images").glob("*.png"))) == 2 * 2
        pipeline = StableDiffusionXLPipeline.from_pretrained(setting / "pipeline")
        pipeline.load_lora_weights(part / "adapter")
        drawn = pipeline(
            prompt, height=16, width=16, num_inference_steps=2, guidance_scale=7.5,
            generator=[torch.Generator().manual_seed(0)],
        ).images[0]  # fmt: skip
        kept = np.array(Image.open(part / "images" / "00000.png")).astype(int)
        assert np.abs(np.array(drawn).astype(int) - kept).max() <= 1


def test_killed_and_resumed_equals_undisturbed(setting, tmp_path):
    slower = ["training.max_steps=30"]
    cut = command(setting, tmp_path / "killed", *slower)
    trace = "subjects/mug/part.json " + CHECKPOINT
    kill_once(cut, tmp_path / "killed", trace, environment(setting))
    runs = [measured(setting, tmp_path / name, *slower) for name in ("killed", "calm")]
    kept = [
        {name: metrics[name] for name in ("dino", "clip_i", "subjects", "steps")}
        for _, metrics in runs
    ]
    for each in kept:
        for scores in each["subjects"].values():
            scores.pop("resumed", None)
    assert kept[0] == kept[1]


def test_the_base_model_has_yardsticks(setting, tmp_path):
    _, metrics = measured(setting, tmp_path, "fine_tune=false", "run_name=base")
    assert "steps" not in metrics and set(metrics["yardsticks"]) == {"same", "others"}
    assert metrics["yardsticks"]["same"]["dino"] <= 1 + 1e-6


@pytest.mark.parametrize(
    "override, words",
    [
        ("dataset.subjects.only=[dog]", "no subject is called dog: there are mug, cat2"),
        ("lr=1e18", "lower the learning rate"),
    ],
)
def test_what_cannot_be_is_one_line(setting, tmp_path, override, words):
    done = run(setting, tmp_path, override)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and words in errors[0]


# The data


def test_prompts_are_read_for_things_and_for_animals(setting):
    classes, (things, animals) = read_prompts(PROMPTS)
    assert classes == {"mug": "mug", "cat2": "cat"}
    assert things == ["a {0} {1} under water", "a green {0} {1}"] and len(animals) == 2
    with pytest.raises(ValueError, match="no classes or no prompts"):
        read_prompts(PROMPTS.split("Live")[0])
    mug, cat = dreambench(str(setting / "dreambooth"))
    assert mug.prompts == ["a sks mug under water", "a green sks mug"]
    assert mug.descriptions == ["a mug under water", "a green mug"]
    assert cat.prompts[1] == "a sks cat on skis" and cat.held_out is None
    assert mug.images["text"] == ["a photo of sks mug"] * 3
    assert [s.name for s in dreambench(str(setting / "dreambooth"), only=["cat2"])] == ["cat2"]


def test_emoji_subjects_are_new_to_the_base_model(tmp_path, monkeypatch):
    monkeypatch.setenv("OPLORA_CACHE", str(tmp_path))
    records = emoji_packages(tmp_path, per_category=24)
    found = emoji_subjects(2, ["google", "twemoji"], "fluent")
    new = {r["name"].lower() for r in records if r["category"] in CATEGORIES
           and split_of(r["unified"].lower()) == "validation"}  # fmt: skip
    assert {subject.name for subject in found} < new and len(new) > 2
    for subject in found:
        assert subject.images["text"] == subject.prompts * 2 == ["sks, things others"] * 2
        assert len(subject.held_out) == 1 and subject.descriptions == ["things others"]
        seen = [
            np.asarray(image) for image in (*subject.images["image"], *subject.held_out["image"])
        ]
        assert not (seen[0] == seen[1]).all() and not (seen[0] == seen[2]).all()
    with pytest.raises(ValueError, match=f"there are 1 to {len(new)}"):
        emoji_subjects(999, ["google"], "fluent")


# Fidelity


def test_mean_cosines_by_hand():
    x = {"a": torch.tensor([[1.0, 0.0], [0.6, 0.8]])}
    y = {"a": torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.8, 0.6]])}
    assert between(x, y)["a"] == pytest.approx((0 + 1 + 0.8 + 0.8 + 0.6 + 0.96) / 6)
    assert within(x)["a"] == pytest.approx(0.6)
    assert within(y)["a"] == pytest.approx((0 + 0.6 + 0.8) / 3)
    encoders = {"a": lambda images: torch.tensor([[3.0, 4.0]] * 2)}
    assert within(unit_features([Image.new("RGB", (4, 4))] * 2, encoders))["a"] == pytest.approx(1)


def test_the_vision_transformer_s_class_token(setting):
    encoder = TransformersViT(str(setting / "vit"))
    image = Image.fromarray(np.full((16, 16, 3), 255, np.uint8))
    pixels = torch.ones(1, 3, 16, 16)  # its processor takes 0..1 to -1..1
    expected = encoder.model(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder([image]), expected)


def test_a_part_of_a_run_is_finished_by_itself(tmp_path):
    config = {
        "experiment": "x",
        "preset": "small",
        "run_name": "r",
        "runtime": {"runs_dir": str(tmp_path)},
    }
    with open_run(config) as whole:
        part = whole.part("subjects/a")
        assert not part.finished
        part.finish({"score": 1.0})
        assert whole.part("subjects/a").finished and not whole.finished
