"""The guides in examples/ run as they stand, learn something and save a plain adapter."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from peft import PeftConfig
from processes import ROOT, run_here
from safetensors.torch import load_file

GUIDES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
NEEDS = {"trl_sft": "trl", "trl_dpo": "trl", "trl_grpo": "trl"}
NEEDS |= {"qlora": "bitsandbytes", "lightning_loop": "lightning"}
SAYS = {
    "trainer": ["the saved adapter gives the same logits: True"],
    "accelerate_loop": ["the resumed training makes the same steps: True"],
    "fsdp2": ["the resumed training makes the same steps: True"],
    "qlora": ["base: Linear4bit"],
    "dotted_path": ["OPAdamW(", "mlp_width=32"],
}


def run(name, folder):
    if name == "fsdp2":
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*start, "--nproc-per-node", "2", str(GUIDES[name]), str(folder)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return run_here([sys.executable, str(GUIDES[name]), str(folder)])


@pytest.mark.parametrize("name", GUIDES)
def test_guide(name, tmp_path):
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    result = run(name, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    what, first, last = re.search(r"(loss|reward) (\S+) -> (\S+)", result.stdout).groups()
    better, worse = (last, first) if what == "reward" else (first, last)
    assert float(better) > float(worse)
    for words in SAYS.get(name, []):
        assert words in result.stdout
    (weights,) = (
        tmp_path.glob("*.safetensors")
        if name != "accelerate_loop"
        else [tmp_path / "adapter_model.safetensors"]
    )
    tensors = load_file(weights)
    assert all("lora" in key for key in tensors)
    assert any("lora_B" in key or "lora.up" in key for key in tensors)
    assert all(torch.isfinite(t).all() and t.any() for t in tensors.values())
    if name in ("trainer", "trl_sft", "trl_dpo", "trl_grpo"):
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert "- op-lora" in card and "Trained with [OP-LoRA]" in card
    if name != "diffusers_loop":
        assert PeftConfig.from_pretrained(tmp_path).peft_type == "LORA"


@pytest.mark.parametrize("name", GUIDES)
def test_guides_are_short_show_the_line_and_stand_in_the_readme(name):
    text = GUIDES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert "the one line that matters" in text or "the one that matters" in text
    guides = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert f"](../examples/{name}.py)" in guides
