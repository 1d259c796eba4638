"""What `create_oplora_optimizer` refuses, and what it survives, on real PEFT models."""

import warnings

import peft
import pytest
import torch
from tiny_models import TARGETS, adapted, decoder, output, train
from torch import nn

import oplora
from oplora.peft import create_oplora_lite_optimizer


def test_values_loaded_behind_the_optimizer_are_absorbed_or_refused(tmp_path):
    model = adapted()
    optimizer = oplora.create_oplora_optimizer(model, lr=1e-3, mlp_width=8)
    train(model, optimizer, 2)
    other = adapted(init_lora_weights=False)
    other.save_pretrained(tmp_path)
    weights = peft.load_peft_weights(tmp_path)
    for group in optimizer.param_groups:
        group.update(lr=0.0)
    with pytest.warns(UserWarning, match="changed from outside"):
        peft.set_peft_model_state_dict(model, weights)
        train(model, optimizer, 1)
    assert (output(model) - output(other)).abs().max() <= 2e-6
    optimizer.edited = "raise"
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data += 1
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.q_proj\.lora_A\.default"):
        train(model, optimizer, 1)


def test_rounding_is_no_edit():
    """A small kept value is a difference of large ones, also after resuming."""

    def build(values):
        params = [[nn.Parameter(value.clone())] for value in values]
        return params, oplora.OPAdamW(params, lr=1e-2, edited="raise")

    def step(params, optimizer, count):
        optimizer.zero_grad()
        sum((p - 1).square().sum() for (p,) in params[:count]).backward()
        optimizer.step()

    params, optimizer = build([torch.full((40, 40), 0.01)] * 2)
    step(params, optimizer, 1)  # the other tensor has no gradient and is never written
    resumed, again = build([p.detach() for (p,) in params])
    again.load_state_dict(optimizer.state_dict())
    step(resumed, again, 2)


def moved(optimizer):
    """As if the model had been on another device when the optimizer was built."""
    for stack in optimizer.stacks:
        stack.tensors.device = torch.device("cuda", 7)


def test_a_model_moved_before_training_is_followed():
    results = []
    for move in (False, True):
        model = adapted(use_dora=True)
        optimizer = oplora.create_oplora_optimizer(model, lr=1e-2, mlp_width=8)
        optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does
        if move:
            moved(optimizer)
        with warnings.catch_warnings(action="error"):
            train(model, optimizer, 3)
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    moved(optimizer)
    with pytest.raises(RuntimeError, match="before training"):
        train(model, optimizer, 1)
    other = oplora.create_oplora_optimizer(adapted(use_dora=True), lr=1e-2, mlp_width=8)
    other.load_state_dict(optimizer.state_dict())
    moved(other)
    with pytest.raises(RuntimeError, match="before load_state_dict"):
        train(model, other, 1)


def test_a_state_is_loaded_into_a_model_that_moved_before():
    results = []
    for move in (False, True):
        model = adapted()
        optimizer = oplora.create_oplora_optimizer(model, lr=1e-2, mlp_width=8)
        if move:
            moved(optimizer)
        other = adapted()
        trained = oplora.create_oplora_optimizer(other, lr=1e-2, mlp_width=8)
        train(other, trained, 2)
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(other))
        optimizer.load_state_dict(trained.state_dict())
        train(model, optimizer, 2)
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_values_loaded_before_a_move_are_kept():
    model, trained = adapted(), adapted(init_lora_weights=False)
    optimizer = oplora.create_oplora_optimizer(model, lr=0.0, mlp_width=8)
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(trained))
    moved(optimizer)
    with pytest.warns(UserWarning, match="changed from outside"):
        train(model, optimizer, 1)
    assert (output(model) - output(trained)).abs().max() <= 2e-6


def test_a_merge_is_refused_before_and_harmless_between_steps():
    model = adapted(init_lora_weights=False)
    optimizer = oplora.create_oplora_optimizer(model, lr=1e-3, mlp_width=8)
    train(model, optimizer, 1)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        oplora.create_oplora_optimizer(model, lr=1e-3)
    model.unmerge_adapter()
    with warnings.catch_warnings(action="error"):
        train(model, optimizer, 1)


def test_errors_name_the_value_and_the_remedy():
    build = oplora.create_oplora_optimizer

    def quantised():
        model = adapted()
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        weight = layer.lora_A["default"].weight
        layer.lora_A["default"].weight = nn.Parameter(weight.to(torch.float8_e4m3fn))
        return model

    cases = [
        (lambda: build(decoder(), lr=1e-3), "get_peft_model"),
        (lambda: build(adapted().requires_grad_(False), lr=1e-3), "do not freeze"),
        (lambda: build(adapted(), lr=1e-3, start="papre"), "papre"),
        (lambda: build(adapted(init_lora_weights="pissa"), lr=1e-3, start="paper"), "start='auto'"),
        (
            lambda: build(adapted(peft.LoHaConfig(r=4, **TARGETS)), lr=1e-3, start="paper"),
            "needs LoRA",
        ),
        (lambda: build(adapted(), torch.optim.LBFGS, lr=1e-3), "LBFGS"),
        (lambda: build(quantised(), lr=1e-3), r"lora_A\.default\.weight has dtype torch.float8"),
        (lambda: build(adapted().to("meta"), lr=1e-3), "meta device"),
        (lambda: build(deepspeed(), lr=1e-3), "DeepSpeed"),
        (lambda: build(tied(), lr=1e-3), "ensure_weight_tying"),
    ]
    for construct, words in cases:
        with pytest.raises(ValueError, match=words):
            construct()
    with pytest.raises(TypeError):
        build(adapted())  # a learning rate is never guessed
    with pytest.raises(TypeError):
        create_oplora_lite_optimizer(adapted())
    with pytest.raises(TypeError, match="generator is no model"):
        build(adapted().parameters(), lr=1e-3)


def tied():
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    return peft.get_peft_model(decoder(tie_word_embeddings=True), config)


def deepspeed():
    return type("DeepSpeedEngine", (nn.Module,), {})()
