"""Memory and operations of a training step from shapes: counted by hand, and beside real steps."""

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import run_here
from tiny_diffusion import tiny_pipeline
from tiny_language_model import tiny_llama
from tiny_llava import tiny_llava
from tiny_roberta import tiny_classifier
from tiny_vl import tiny_vl_bart
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from oplora.harness.cost import Counter, language_step, step_cost
from oplora.studies.glue.model import example_loss as glue_loss
from oplora.studies.llava_cars.model import example_loss as llava_loss
from oplora.studies.sdxl.diffusion import example_loss as sdxl_loss
from oplora.studies.vl_bart.model import example_loss as bart_loss


def test_a_linear_layer_by_hand():
    with torch.device("meta"):
        layer = nn.Linear(1000, 500, bias=False)
    cost = step_cost(
        layer, lambda net: net(torch.zeros(64, 1000)).sum(), half=False, autocast=False
    )
    # the input, W's gradient, the loss and its gradient
    assert cost.bytes == 4 * (64 * 1000 + 1000 * 500 + 1 + 1)
    assert cost.forward_flop == 2 * 64 * 1000 * 500
    assert cost.flop == 2 * cost.forward_flop  # the input has no gradient


def adapted(dtype):
    model = tiny_llama(100).to(dtype)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"])).train()


@pytest.mark.parametrize("half", [False, True])
def test_without_values_it_counts_what_a_real_step_holds(half):
    model = adapted(torch.bfloat16 if half else torch.float32)
    found = step_cost(
        adapted(torch.float32).get_base_model(), lambda net: language_step(net, 4, 64),
        half=half, autocast=half,
    )  # fmt: skip
    counter = Counter(model)
    with counter, torch.autocast("cpu", torch.bfloat16, enabled=half):
        language_step(model, 4, 64).backward()
    assert found.bytes == pytest.approx(counter.peak, rel=0.02)
    assert found.flop == counter.flop > 2 * found.forward_flop > 0


def test_gradient_checkpointing_needs_less_and_computes_more():
    costs = []
    deep = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=8, vocab_size=8)
    deep["num_attention_heads"] = 2
    for checkpointed in (False, True):
        model = LlamaForCausalLM(LlamaConfig(**deep))
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"])).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        step = lambda net: language_step(net, 8, 256)  # noqa: E731
        costs.append(step_cost(model.get_base_model(), step, half=False, autocast=False))
    assert costs[1].bytes < 0.7 * costs[0].bytes and costs[1].flop > 1.2 * costs[0].flop


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (lambda: tiny_pipeline().unet, lambda net: sdxl_loss(net, 2, 64)),
        (lambda: tiny_vl_bart(), lambda net: bart_loss(net, 3, 7, 4)),
        (lambda: tiny_llava(), lambda net: llava_loss(net, 2, 5)),
        (lambda: tiny_classifier(2), lambda net: glue_loss(net, 2, 5)),
        (lambda: tiny_classifier(1), lambda net: glue_loss(net, 2, 5)),
    ],
)
def test_losses_of_the_presets_shapes(model, loss):
    real = model()
    assert loss(real).isfinite()
    cost = step_cost(real, loss, half=False, autocast=False)
    assert cost.bytes > 0 and cost.flop > 2 * cost.forward_flop


def test_the_dry_run_of_table_2_names_memory_time_and_disk():
    command = [sys.executable, "experiments/commonsense.py", "dry_run=true", "method=oplora"]
    done = run_here(command)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    # eight rows: 13.5 GB of weights, 11 GB of MLPs and moments, 20 GB of activations
    assert lines["memory with activations"].startswith("about 47 GB with 8 rows")
    assert lines["memory with activations"].endswith("fits a GPU of 80 GB")
    assert lines["time"].startswith("about 3.4 h of training and 57 min of evaluation on one H100")
    assert lines["disk"] == "14 GB of models and data, and up to 23.4 GB of checkpoints"
