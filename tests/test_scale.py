"""ScaleAdamW in lockstep with its definition, and what it promises to users."""

import copy
import math

import pytest
import torch
from tiny_blocks import blocks, losses
from tiny_models import adapted
from torch import nn

import oplora

BETAS, EPS = (0.9, 0.999), 1e-8


def literal(start, steps, lr, decay, schedule, eta=0.1, line_betas=(0.9, 0.99)):
    """The definition, line by line: the blocks after these steps, and their scales."""
    theta = [[t.detach().clone() for t in block] for block in start]
    zeros = lambda: [[torch.zeros_like(t) for t in block] for block in theta]  # noqa: E731
    m, v, log_s = zeros(), zeros(), [0.0] * len(theta)
    lines = [[0.0, 0.0] for _ in theta]
    for step in range(1, steps + 1):
        leaves = [[t.clone().requires_grad_() for t in block] for block in theta]
        gradients = iter(torch.autograd.grad(losses(leaves), [t for b in leaves for t in b]))
        for i, block in enumerate(theta):
            g = [next(gradients) for _ in block]
            m[i] = [BETAS[0] * a + (1 - BETAS[0]) * b for a, b in zip(m[i], g)]
            v[i] = [BETAS[1] * a + (1 - BETAS[1]) * b**2 for a, b in zip(v[i], g)]
            mean = [a / (1 - BETAS[0] ** step) for a in m[i]]
            square = [a / (1 - BETAS[1] ** step) for a in v[i]]
            D = [t - t0 for t, t0 in zip(block, start[i])]
            all_of = lambda parts: torch.cat([part.flatten() for part in parts])  # noqa: E731
            if step > 1:
                q = -(all_of(g) @ all_of(D)).item() / all_of(D).norm().item()
                lines[i] = [b * x + (1 - b) * q**k for b, x, k in zip(line_betas, lines[i], (1, 2))]
                first, second = (x / (1 - b ** (step - 1)) for b, x in zip(line_betas, lines[i]))
                u = min(1.0, max(-1.0, first / math.sqrt(second)))
                log_s[i] += eta * u * schedule(step - 1)
            n = [a / (b.sqrt() + EPS) + decay * t for a, b, t in zip(mean, square, block)]
            rate = lr * schedule(step - 1) * math.exp(log_s[i])
            theta[i] = [t - rate * e for t, e in zip(block, n)]
    return theta, [math.exp(each) for each in log_s]


def train(optimizer, data, steps, scheduler=None):
    for _ in range(steps):
        optimizer.zero_grad()
        losses(data).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


@pytest.mark.parametrize("decay", (0.0, 0.1))
def test_the_step_is_its_definition(decay):
    data = blocks()
    start = [[t.detach().clone() for t in block] for block in data]
    optimizer = oplora.ScaleAdamW(data, lr=1e-3, weight_decay=decay)
    schedule = lambda step: 1 - step / 50  # noqa: E731
    train(optimizer, data, 25, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule))
    expected, scales = literal(start, 25, 1e-3, decay, schedule)
    for block, right in zip(data, expected):
        for tensor, value in zip(block, right):
            torch.testing.assert_close(tensor.data, value, rtol=0, atol=1e-12)
    found = list(optimizer.scales().values())
    assert found == pytest.approx([s for s, b in zip(scales, data) for _ in b], rel=1e-12)
    assert max(scales) > 5  # the test would say little if s had stayed at 1


@pytest.mark.parametrize("change", ({"eta": 0.0}, {"scaled": False}))
def test_without_its_scale_it_is_adamw(change):
    data, twin = blocks(), blocks()
    flat = [t for block in twin for t in block]
    optimizer = oplora.ScaleAdamW([{"params": data, **change}], lr=1e-2)
    train(optimizer, data, 20)
    train(torch.optim.AdamW(flat, lr=1e-2), twin, 20)
    for tensor, value in zip((t for block in data for t in block), flat):
        torch.testing.assert_close(tensor, value, rtol=0, atol=1e-13)


def test_the_rate_of_the_first_step_matters_little():
    """Over a factor of 1,000, where AdamW's result depends on it."""
    ends = {}
    for form in ("scale", "adamw"):
        for lr in (1e-5, 1e-4, 1e-3, 1e-2):
            data = blocks()
            flat = [t for block in data for t in block]
            scale = form == "scale"
            optimizer = oplora.ScaleAdamW(data, lr=lr) if scale else torch.optim.AdamW(flat, lr=lr)
            train(optimizer, data, 150)
            ends[form, lr] = losses(data).item()
    begun = losses(blocks()).item()
    assert max(ends["scale", lr] for lr in (1e-5, 1e-4, 1e-3, 1e-2)) < begun / 1000
    assert min(ends["adamw", lr] for lr in (1e-5, 1e-4, 1e-3)) > begun / 2


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_resume_is_bit_identical(dtype, tmp_path):
    data = blocks(dtype)
    optimizer = oplora.ScaleAdamW(data, lr=1e-3)
    train(optimizer, data, 5)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = copy.deepcopy(data)
    resumed = oplora.ScaleAdamW(again, lr=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(optimizer, data, 5)
    train(resumed, again, 5)
    for block, twin in zip(data, again):
        assert all(map(torch.equal, block, twin))
    for state in optimizer.state.values():
        assert all(t.dtype != torch.bfloat16 for t in state.values())


def test_bf16_tensors_move_though_a_step_is_below_their_rounding():
    data = [[nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]]
    optimizer = oplora.ScaleAdamW(data, lr=1e-4, eta=0.0, weight_decay=0.0)
    for _ in range(100):
        data[0][0].grad = torch.ones_like(data[0][0])
        optimizer.step()
    assert data[0][0].float().tolist() == pytest.approx([0.99] * 3, abs=0.004)
    with torch.no_grad():
        data[0][0].fill_(2.0)  # by another hand: goes on from there
    data[0][0].grad = torch.ones_like(data[0][0])
    optimizer.step()
    assert data[0][0].tolist() == [2.0] * 3


def test_large_gradients_are_no_fault():
    """Though their squares overflow: an ordinary AdamW takes them, too."""
    tensor = nn.Parameter(torch.ones(3))
    optimizer = oplora.ScaleAdamW([tensor], lr=1e-2)
    tensor.grad = torch.full((3,), 1e30)
    optimizer.step()
    assert tensor.isfinite().all()


def test_nan_in_a_gradient_changes_nothing_and_is_named():
    data = blocks()
    optimizer = oplora.ScaleAdamW([[("A", data[0][0]), ("B", data[0][1])]], lr=1e-3)
    train(optimizer, data, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    data[0][1].grad[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="gradient of B: nothing was updated"):
        optimizer.step()
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[index][name]) for name, value in state.items())


def test_a_peft_model_has_a_scale_per_layer_and_the_rest_is_trained_by_adamw():
    model = adapted(modules_to_save=["lm_head"])
    optimizer = oplora.create_scale_optimizer(model, lr=1e-4, direct_lr=1e-2)
    scaled, *direct = optimizer.param_groups
    assert scaled["block_sizes"] == [2] * (len(scaled["params"]) // 2)
    assert not any(group["scaled"] for group in direct)
    assert {group["lr"] for group in direct} == {1e-2}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        (dict(lr=-1.0), ValueError, "lr=-1.0 is negative"),
        (dict(eta=-1.0), ValueError, "eta=-1.0 is negative"),
        (dict(betas=(0.9, 1.0)), ValueError, "betas="),
        (dict(line_betas=(1.0, 0.9)), ValueError, r"betas=\(1.0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, said):
    with pytest.raises(error, match=said):
        oplora.ScaleAdamW(blocks(), **arguments)


def test_another_optimizer_class_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="needs optimizer=adamw, not SGD"):
        oplora.create_scale_optimizer(model, torch.optim.SGD, lr=1e-4)
    with pytest.raises(ValueError, match="trains no tensor"):
        oplora.create_scale_optimizer(nn.Linear(2, 2))
