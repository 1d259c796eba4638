"""The Lite form: exact where its assumption holds, close on a small problem, resumable."""

import copy
import math
from functools import partial

import pytest
import torch

import oplora
from oplora.peft import create_oplora_lite_optimizer
from oplora.rows import SharedRow

OPAdamWLite = partial(oplora.OPAdamW, lite=True)
OPTIONS = dict(mlp_width=16, z_dim=8, start="paper")


def adapters(count=2, rank=3, size=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(rank, size, generator=generator, dtype=dtype) for _ in range(count)]
    zeros = [torch.zeros(size, rank, dtype=dtype) for _ in range(count)]
    return [[torch.nn.Parameter(A), torch.nn.Parameter(B)] for A, B in zip(draws, zeros)]


def loss(blocks):
    total = 0
    for i, (A, B) in enumerate(blocks):
        product = B @ A
        target = torch.sin(torch.arange(product.numel(), dtype=A.dtype) * (0.1 + i))
        total = total + ((product - target.view_as(product)) ** 2).mean()
    return total


def train(optimizer, blocks, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(blocks)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def freeze_hidden(optimizer):
    """Keep z, W1 and b1 where they are: h stands still, and the Lite form is exact."""
    for stack in optimizer.stacks:
        backward = stack.backward
        stack.backward = lambda g, f=backward: tuple(torch.zeros_like(t) for t in f(g))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("start", ["paper", "keep"])
def test_with_a_constant_h_the_lite_form_is_exact(weight_decay, start):
    results = []
    for cls in (oplora.OPAdamW, OPAdamWLite):
        blocks = adapters(dtype=torch.float64)
        options = {**OPTIONS, "start": start}
        optimizer = cls(blocks, lr=0.01, eps=1e-20, weight_decay=weight_decay, **options)
        freeze_hidden(optimizer)
        train(optimizer, blocks, 15)
        assert not torch.equal(blocks[0][1], adapters(dtype=torch.float64)[0][1])
        results.append([t for block in blocks for t in block])
    if weight_decay:  # z, W1 and b1 decay, so that h moves, nearly in proportion
        tolerance = dict(rtol=0, atol=3e-4)
    else:
        tolerance = dict(rtol=0, atol=1e-12)
    for exact, lite in zip(*results):
        torch.testing.assert_close(lite, exact, **tolerance)


def test_dh_is_that_of_the_exact_form_at_the_first_step():
    gradients = []
    for cls in (oplora.OPAdamW, OPAdamWLite):
        blocks = adapters(dtype=torch.float64)
        (stack,) = cls(blocks, **OPTIONS).stacks
        loss(blocks).backward()
        gradients.append(stack.backward(stack.tensors.gather_gradient()))
    for exact, lite in zip(*gradients):
        torch.testing.assert_close(lite, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("init, most", [("text", 0.02), ("author", 0.06)])
def test_training_stays_close_to_the_exact_form(init, most):
    curves, options = [], {**OPTIONS, "init": init}
    for cls in (oplora.OPAdamW, OPAdamWLite):
        blocks = adapters()
        curves.append(train(cls(blocks, lr=1e-3, weight_decay=0.0, **options), blocks, 200))
    exact, lite = map(torch.tensor, curves)
    learned = exact < 0.05 * exact[0]
    assert learned.any(), "the case is meant to be one in which much is learned"
    assert ((lite - exact).abs() / exact)[~learned].max() < most


def test_units_that_wake_up_bring_the_rows_they_were_drawn_with():
    blocks = adapters()
    optimizer = OPAdamWLite(blocks, **OPTIONS)
    exact = oplora.OPAdamW(adapters(), **OPTIONS)
    (stack,), (full,) = optimizer.stacks, exact.stacks
    before = stack.rows.on.clone()
    stack.b1 += 10.0  # all on
    stack.refresh()
    assert stack.rows.on.all() and not before.all()
    for i in range(2):
        W2 = torch.cat([full.rows.W2[i], full.rows.inactive(i)])
        rows = torch.empty_like(W2).index_copy_(0, full.rows.unit_of_row[i], W2)
        (columns,), (kept,) = stack.rows.columns[i], stack.rows.first[i]  # nothing of B is kept
        assert columns == slice(0, 36) and torch.equal(kept, rows[:, columns])


def test_it_takes_the_memory_it_says():
    blocks = adapters(count=1, rank=4, size=1000)
    lite, exact = OPAdamWLite(blocks, **OPTIONS), oplora.OPAdamW(adapters(1, 4, 1000), **OPTIONS)
    train(lite, blocks, 1)
    (stack,) = lite.stacks
    active = int(stack.rows.on.sum())
    adapter, trunk = 8000, 8 + 16 * 8 + 16
    # S and b2 with two moments each, z, W1, b1 too; A's active rows alone; steps
    expected = 4 * (3 * (2 * adapter + trunk) + 4000 * active)
    assert lite.state_bytes() == pytest.approx(expected, abs=64)
    assert lite.mlp_parameters == 2 * adapter + trunk
    assert exact.mlp_parameters == 17 * adapter + trunk


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_resume_is_bit_identical(weight_decay):
    def build():
        blocks = adapters()
        return blocks, OPAdamWLite(blocks, lr=0.03, weight_decay=weight_decay, **OPTIONS)

    whole, optimizer = build()
    train(optimizer, whole, 12)
    first, half = build()
    train(half, first, 6)
    state = copy.deepcopy(half.state_dict())
    second, resumed = build()
    with torch.no_grad():
        for tensors, saved in zip(second, first):
            for tensor, value in zip(tensors, saved):
                tensor.copy_(value)
    resumed.load_state_dict(state)
    train(resumed, second, 6)
    for tensors, expected in zip(second, whole):
        for tensor, want in zip(tensors, expected):
            assert torch.equal(tensor, want)


def test_wrong_use_is_named():
    saved = OPAdamWLite(adapters(), seed=1, **OPTIONS).state_dict()
    with pytest.raises(ValueError, match="seed=1"):
        OPAdamWLite(adapters(), seed=0, **OPTIONS).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"W2 is \(8, 72\)"):
        exact = oplora.OPAdamW(adapters(), **OPTIONS).state_dict()
        OPAdamWLite(adapters(), **OPTIONS).load_state_dict(exact)
    with pytest.raises(ValueError, match="SGD"):
        create_oplora_lite_optimizer(torch.nn.Linear(2, 2), torch.optim.SGD, lr=0.1)


def test_bf16_adapters_have_fp32_state():
    blocks = adapters(dtype=torch.bfloat16)
    optimizer = OPAdamWLite(blocks, lr=0.01, **OPTIONS)
    assert isinstance(optimizer.stacks[0].rows, SharedRow)
    losses = train(optimizer, blocks, 30)
    assert losses[-1] < losses[0] and math.isfinite(losses[-1])
    assert {t.dtype for t in optimizer.stacks[0].rows.W2} == {torch.float32}
