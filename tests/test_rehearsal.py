"""Every paper preset as a GPU would run it, with tiny models of its classes: precision, launcher,
all methods of its table and full fine-tuning, from an empty cache through the report.
"""

import json

import pytest
import test_commonsense_experiment as commonsense
import test_glue_experiment as glue
import test_llava_cars as llava_cars
import test_sdxl_experiment as sdxl
import test_subjects as subjects
import test_vl_experiment as vl_bart
from processes import run_here

from oplora.report import build

BOTH = ["lora", "oplora", "dora", "opdora"]
SHORT = "training.num_train_epochs=1"
# What the tests of an experiment run in float32 goes back to the preset's own.
REHEARSED = {
    "commonsense": (
        commonsense,
        [*BOTH, "full"],
        ["training.bf16=true", "model.dtype=bfloat16", "training.gradient_accumulation_steps=2",
         "training.per_device_train_batch_size=2"],
    ),
    "sdxl": (
        sdxl,
        [*BOTH, "pissa", "full"],
        ["training.bf16=true", "pipeline.dtype.path=torch.bfloat16", "images.steps=[]"],
    ),
    "subjects": (
        subjects,
        ["lora", "oplora"],
        ["training.bf16=true", "pipeline.dtype.path=torch.bfloat16"],
    ),
    "vl_bart": (vl_bart, [*BOTH, "full"], []),
    "llava_cars": (llava_cars, ["lora", "oplora", "full"], ["model.dtype=bfloat16"]),
    "glue": (glue, ["vera", "opvera", "lora", "oplora"], ["training.bf16=true"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of all presets, and of SDXL the model as it is."""
    folder = tmp_path_factory.mktemp("rehearsal")
    env = {"OPLORA_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hub")}
    for name, (module, methods, options) in REHEARSED.items():
        setting = module.setting.__wrapped__(tmp_path_factory)
        command = module.command(setting, folder / "runs", *options, SHORT)
        sweep = ["launcher=basic", f"method={','.join(methods)}"]
        done = run_here([*command[:2], "--multirun", *command[2:], *sweep], env)
        assert done.returncode == 0, (name, done.stderr[-3000:])
        if name == "sdxl":
            done = run_here([*command, "fine_tune=false", "run_name=base"], env)
            assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs"


@pytest.mark.parametrize("name", REHEARSED)
def test_every_method_finishes_in_the_presets_precision(runs, name):
    found = {}
    for path in (runs / name / "paper").rglob("config.yaml"):
        half = name in ("commonsense", "sdxl", "subjects", "glue")
        assert ("bf16: true" in path.read_text()) == half
        found[path.parent.name] = json.loads((path.parent / "metrics.json").read_text())
    methods = REHEARSED[name][1]
    assert len(found) == len(methods) + (name == "sdxl")
    for method in methods:
        (metrics,) = (m for run, m in found.items() if method in run.split("-"))
        assert metrics["steps"] > 0 and metrics["trained_parameters"] > 0
    assert not (runs / "multirun.yaml").exists()


def test_the_report_of_all_of_them(runs, tmp_path):
    text = build(runs).write(tmp_path / "report").with_name("report.md").read_text()
    for title in ("LLaMA-7B", "SDXL 1.0", "BART-base", "LLaVA-1.5-7B", "RoBERTa-base"):
        assert title in text
    for row in ("OP-LoRA", "OP-DoRA", "OP-VeRA", "PiSSA", "full fine-tuning", "base model"):
        assert f"| {row}" in text, row
    assert "None" not in text and "nan" not in text.split()  # missing is left out
