"""What is saved is a plain adapter: stock PEFT and diffusers load it without oplora."""

import os
import subprocess
import sys

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES

import oplora

PEFT_USER = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

base, *adapters = sys.argv[1:]
batch, outputs = load_file(base + "/batch.safetensors"), {}
for path in adapters:
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), path).eval()
    with torch.no_grad():
        outputs[path] = model(**batch).logits
        if hasattr(model, "merge_and_unload"):  # a prompt has nothing to merge
            outputs[path + " merged"] = model.merge_and_unload()(**batch).logits
assert not any(name.split(".")[0] == "oplora" for name in sys.modules)
save_file(outputs, base + "/outputs.safetensors")
"""

DIFFUSERS_USER = """
import sys, torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

base, *adapters = sys.argv[1:]
batch, outputs = load_file(base + "/batch.safetensors"), {}
rest = ["vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"]
for path in adapters:
    unet = UNet2DConditionModel.from_pretrained(base).eval()
    parts = dict.fromkeys(rest)
    pipe = StableDiffusionPipeline(unet=unet, requires_safety_checker=False, **parts)
    pipe.load_lora_weights(path)
    with torch.no_grad():
        outputs[path] = unet(**batch).sample
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        outputs[path + " merged"] = unet(**batch).sample
assert not any(name.split(".")[0] == "oplora" for name in sys.modules)
save_file(outputs, base + "/outputs.safetensors")
"""


def in_another_process(program, folder, adapters):
    """Outputs of every saved adapter, plain and merged, from a process without oplora."""
    command = [sys.executable, "-W", "ignore", "-c", program, folder, *adapters]
    threads = str(torch.get_num_threads())  # sums of another order differ in the last bits
    env = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": ""}
    subprocess.run(list(map(str, command)), cwd=folder, check=True, env=env)
    return load_file(folder / "outputs.safetensors")


def checkpoints(family, model, save, folder, steps=3):
    """(folder, output) of the adapter before training and after every step."""
    optimizer = oplora.create_oplora_optimizer(model, lr=3e-3, mlp_width=8)
    for step in range(steps + 1):
        path = folder / f"step-{step}"
        save(path)
        with torch.no_grad():
            yield path, family.output(model)
        optimizer.zero_grad()
        family.loss(model).backward()
        optimizer.step()


def check(saved, outputs):
    first = next(iter(saved.values()))
    assert (list(saved.values())[-1] - first).abs().max() > 1e-3, "nothing was trained"
    for path, expected in saved.items():
        # convolutions may sum in another order in another process
        assert (outputs[str(path)] - expected).abs().max() <= 2e-6
        assert (outputs[f"{path} merged"] - expected).abs().max() <= 2e-6


def test_a_checkpoint_of_any_step_loads_in_stock_peft(tmp_path):
    family, saved = FAMILIES["decoder"], {}
    options = dict(r=4, target_modules=family.targets)
    configs = {
        "lora": LoraConfig(**options),
        "dora": LoraConfig(use_dora=True, **options),
        "loha": peft.LoHaConfig(**options),
    }
    save_file(family.batch, tmp_path / "batch.safetensors")
    family.build().save_pretrained(tmp_path)
    for name, config in configs.items():
        model = get_peft_model(family.build(), config).eval()
        saved[name] = dict(checkpoints(family, model, model.save_pretrained, tmp_path / name))
    paths = [path for steps in saved.values() for path in steps]
    outputs = in_another_process(PEFT_USER, tmp_path, paths)
    for steps in saved.values():
        check(steps, outputs)


@pytest.mark.parametrize("use_dora", [False, True])
def test_diffusers_saves_loads_and_fuses(use_dora, tmp_path):
    family = FAMILIES["unet"]
    unet = family.build()
    unet.save_pretrained(tmp_path)
    save_file(family.batch, tmp_path / "batch.safetensors")
    # without metadata diffusers takes alpha = r
    options = dict(r=4, lora_alpha=4, target_modules=family.targets, use_dora=use_dora)
    unet.add_adapter(LoraConfig(**options))

    def save(path):
        layers = get_peft_model_state_dict(unet)
        StableDiffusionPipeline.save_lora_weights(path, unet_lora_layers=layers)

    saved = dict(checkpoints(family, unet, save, tmp_path / "adapter"))
    check(saved, in_another_process(DIFFUSERS_USER, tmp_path, saved))
