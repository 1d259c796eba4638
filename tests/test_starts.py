"""How an MLP starts: the distributions of both starts, and that no start changes the model."""

import math

import peft
import pytest
import torch
from tiny_models import TARGETS, adapted, output, train
from torch import nn

import oplora
from oplora.mlp import generator_for, hidden, initial_mlp

SHAPES = [(8, 768), (768, 8)]  # A and B of rank 8


def draws(seeds, **options):
    """h and A of a LoRA of d_in 768 and rank 8 for many seeds."""
    tensors = [torch.zeros(shape) for shape in SHAPES]
    for seed in range(seeds):
        generator = generator_for(seed, "layer")
        mlp = initial_mlp(tensors, ["random", "still"], 32, generator=generator, **options)
        h = hidden(mlp.z, mlp.W1, mlp.b1)
        A, B = (h @ mlp.W2 + mlp.b2).split([8 * 768, 768 * 8])
        assert not B.any()
        yield mlp, h, A


def test_the_authors_start_is_as_small_as_peft_s():
    """Unit j is relu(u), u ~ U(±a), a = 1/√128, as z hardly counts: E u⁺ = a/4, E (u⁺)² = a²/6."""
    a, multipliers, deviations, z = 1 / math.sqrt(128), [], [], []
    for mlp, h, A in draws(60):
        multipliers.append(1 + h.sum())
        deviations.append(A.std())
        z.append(mlp.z)
        assert mlp.b1.abs().max() <= a and mlp.W1.abs().max() <= a
        assert mlp.W2.abs().max() <= 1 / math.sqrt(32)
    # the means of 60 seeds have a standard error of 0.021 and 0.0004
    assert torch.stack(multipliers).mean() == pytest.approx(1 + 32 * a / 4, abs=0.08)  # 1.71
    assert torch.stack(deviations).mean() == pytest.approx(
        a / math.sqrt(6 * 3), abs=0.0015
    )  # 0.021
    assert torch.stack(deviations).mean() == pytest.approx(1 / math.sqrt(3 * 768), abs=0.002)
    assert torch.cat(z).std() == pytest.approx(0.01, rel=0.03)


def test_the_texts_start_has_large_steps_and_a_large_A():
    """u ~ N(0, 1/3): E u⁺ = √(1/3)/√(2π), E (u⁺)² = 1/6."""
    multipliers, deviations = [], []
    for mlp, h, A in draws(60, init="text"):
        multipliers.append(1 + h.sum())
        deviations.append(A.std())
        assert not mlp.b1.any()
    assert torch.stack(multipliers).mean() == pytest.approx(1 + 32 * 0.2303, abs=0.6)  # 8.4
    assert torch.stack(deviations).mean() == pytest.approx(math.sqrt(1 / 18), abs=0.02)  # 0.236


def test_single_knobs_replace_what_the_start_says():
    (mlp, _, small), (other, _, large) = (
        next(draws(1, **options))
        for options in (dict(z_std=1.0, trunk_bias=False), dict(init="text", head_gain=2.0))
    )
    assert not mlp.b1.any() and torch.equal(mlp.z, other.z)
    assert torch.equal(2 * mlp.W2, other.W2) and torch.equal(2 * small, large)
    wrong = [dict(init="paper"), dict(z_std=0.0), dict(head_gain=-1.0), dict(z_std=math.nan)]
    for options in wrong:
        (name, value), *_ = options.items()
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            next(draws(1, **options))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.config = nn.Conv2d(3, 4, 3), None

    def forward(self, x):
        return self.conv(x)


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=4, **TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **TARGETS),
    "loha": lambda: peft.LoHaConfig(r=4, **TARGETS),
    "vera": lambda: peft.VeraConfig(r=8, **TARGETS),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], **TARGETS),
}


@pytest.mark.parametrize("init", ["author", "text"])
@pytest.mark.parametrize("start", ["auto", "keep", "still"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_no_start_changes_the_model(adapter, start, init):
    model = adapted(ADAPTERS[adapter]())
    before = output(model)
    optimizer = oplora.create_oplora_optimizer(model, lr=0.0, start=start, init=init)
    assert (output(model) - before).abs().max() <= 2e-6
    train(model, optimizer, 1)  # lr 0: the tensors are now what the MLPs say
    assert (output(model) - before).abs().max() <= 2e-6


@pytest.mark.parametrize("init", ["author", "text"])
def test_no_start_changes_dora_on_a_convolution(init):
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["conv"])
    model, x = peft.get_peft_model(Convolution(), config), torch.randn(2, 3, 8, 8)
    before = model(x).detach()
    optimizer = oplora.create_oplora_optimizer(model, lr=0.0, init=init)
    model(x).square().mean().backward()
    optimizer.step()
    assert (model(x) - before).abs().max() <= 2e-6


@pytest.mark.parametrize("lite", [False, True])
def test_doras_magnitude_stands_still_as_in_the_authors_code(lite):
    for init, expected in (("author", "still"), ("text", "keep")):
        optimizer = oplora.create_oplora_optimizer(
            adapted(use_dora=True), lr=0.0, init=init, lite=lite
        )
        (stack,) = optimizer.stacks
        assert stack.starts == [["random", "still", expected]] * 4


def test_what_is_trained_besides_has_a_rate_of_its_own():
    model = adapted(modules_to_save=["lm_head"], bias="all")
    optimizer = oplora.create_oplora_optimizer(model, lr=1e-3, direct_lr=3e-2)
    rates = {bool(g["mlp_width"]): g["lr"] for g in optimizer.param_groups}
    assert rates == {True: 1e-3, False: 3e-2}
