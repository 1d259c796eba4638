"""The optimizer around its step: resuming, edits, NaN, refused arguments, parameter groups."""

import copy
import math
import warnings

import pytest
import torch
from tiny_blocks import WIDTH, blocks, losses, starts

import oplora


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [oplora.OPAdamW, oplora.OPOptimizer])
def test_resume_is_bit_identical(dtype, cls, tmp_path):
    def build(data):
        extra = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        groups = [
            {"params": data, "start": starts("paper")},
            {"params": [extra], "mlp_width": 0},
        ]
        optimizer = cls(groups, lr=0.03, mlp_width=WIDTH, z_dim=8)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))
        return extra, optimizer, scheduler

    def train(data, extra, optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (losses([[t.float() for t in b] for b in data]) + (extra**2).sum()).backward()
            optimizer.step()
            scheduler.step()

    data = blocks(dtype)
    whole = build(data)
    train(data, *whole, 14)
    first = blocks(dtype)
    half = build(first)
    train(first, *half, 7)
    assert half[1].stacks[0].rows.W2[0].dtype == torch.float32
    values = [[t.detach().clone() for t in b] for b in first] + [[half[0].detach().clone()]]
    torch.save([half[1].state_dict(), half[2].state_dict(), values], tmp_path / "state.pt")
    optimizer_state, scheduler_state, values = torch.load(tmp_path / "state.pt", weights_only=True)
    second = blocks(dtype)
    resumed = build(second)
    with torch.no_grad():
        for tensors, saved in zip([*second, [resumed[0]]], values):
            for tensor, value in zip(tensors, saved):
                tensor.copy_(value)
    resumed[1].load_state_dict(optimizer_state)
    resumed[1].load_state_dict(copy.deepcopy(resumed[1].state_dict()))  # as accelerate does
    resumed[2].load_state_dict(scheduler_state)
    with warnings.catch_warnings(action="error"):
        train(second, *resumed, 7)
    for ours, expected in zip([*second, [resumed[0]]], [*data, [whole[0]]]):
        for tensor, want in zip(ours, expected):
            assert torch.equal(tensor, want)


def test_state_of_other_shapes_is_refused_and_nothing_changes():
    ours = oplora.OPAdamW(blocks(), mlp_width=8)
    before = copy.deepcopy(ours.state_dict())
    for other, words in [
        (oplora.OPAdamW(blocks(), mlp_width=16), "z_dim|mlp_width"),
        (oplora.OPAdamW(blocks(), mlp_width=8, z_dim=4), "z_dim"),
        (torch.optim.AdamW([t for b in blocks() for t in b]), "without MLPs"),
    ]:
        with pytest.raises(ValueError, match=words):
            ours.load_state_dict(other.state_dict())
    for refuses, words in [
        (oplora.OPOptimizer(blocks(), mlp_width=8), "load it into OPAdamW"),
        (oplora.OPAdamW(blocks(), mlp_width=0), "mlp_width=0"),
    ]:
        with pytest.raises(ValueError, match=words):
            refuses.load_state_dict(ours.state_dict())
    after = ours.state_dict()
    for i in before["state"]:
        assert torch.equal(before["state"][i]["mlp"]["W2"], after["state"][i]["mlp"]["W2"])
    assert before["param_groups"] == after["param_groups"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_gradients_never_poison(bad):
    for mode in ("raise", "skip"):
        data = blocks()
        ours = oplora.OPAdamW(data, mlp_width=8, nonfinite=mode)
        losses(data).backward()
        data[1][0].grad[0, 0] = bad
        before = [t.detach().clone() for b in data for t in b]
        if mode == "raise":
            with pytest.raises(FloatingPointError, match=r"group 0 tensor 1\.0"):
                ours.step()
        else:
            ours.step()
            assert ours.skipped_steps == 1
        for tensor, value in zip([t for b in data for t in b], before):
            assert torch.equal(tensor, value)
        ours.zero_grad()
        losses(data).backward()
        ours.step()
        assert all(t.isfinite().all() for b in data for t in b)


@pytest.mark.parametrize("clip", [None, "mlp"])
def test_nonfinite_gradients_of_directly_trained_tensors_never_poison(clip):
    data, extra = blocks(), torch.nn.Parameter(torch.ones(3).double())
    groups = [{"params": data}, {"params": [("scale", extra)], "mlp_width": 0}]
    ours = oplora.OPAdamW(groups, mlp_width=8, clip=clip)
    (losses(data) + (extra * torch.tensor([1.0, math.nan, 1.0])).sum()).backward()
    with pytest.raises(FloatingPointError, match="scale"):
        ours.step()
    assert all(t.isfinite().all() for t in [*(t for b in data for t in b), extra])


def test_an_update_that_overflows_is_told_as_divergence():
    """With finite gradients all the way: it is the MLPs' own product that overflows."""
    torch.manual_seed(0)
    A, B = torch.nn.Parameter(torch.randn(8, 100)), torch.nn.Parameter(torch.zeros(100, 8))
    target = torch.rand(100, 100)
    ours = oplora.OPOptimizer(
        [[A, B]],
        torch.optim.SGD,
        lr=10.0,
        start="paper",
        init="text",
        nonfinite="skip",
        edited="raise",
    )
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        for _ in range(60):
            ours.zero_grad()
            ((B @ A - target) ** 2).mean().backward()
            ours.step()
    assert ours.skipped_steps == 0


def test_a_tensor_frozen_later_is_refused():
    data = blocks()
    ours = oplora.OPAdamW(data, mlp_width=8)
    data[1][0].requires_grad_(False)
    before = [t.detach().clone() for b in data for t in b]
    losses(data).backward()
    with pytest.raises(RuntimeError, match=r"group 0 tensor 1\.0 was frozen"):
        ours.step()
    assert all(torch.equal(t, b) for t, b in zip([t for x in data for t in x], before))


@pytest.mark.parametrize("first, then", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_cast_after_the_optimizer_was_built_is_no_edit(first, then):
    data = blocks(getattr(torch, first))
    ours = oplora.OPAdamW(data, lr=1e-3, mlp_width=8, edited="raise")
    for block in data:
        for tensor in block:
            tensor.data = tensor.data.to(getattr(torch, then))
    before = [t.detach().float().clone() for b in data for t in b]
    for _ in range(20):
        ours.zero_grad()
        losses([[t.float() for t in b] for b in data]).backward()
        ours.step()
    moved = [(t.float() - b).abs().max() for t, b in zip((t for b in data for t in b), before)]
    assert min(moved) > 1e-3


def test_edits_from_outside_are_absorbed_or_refused():
    data = blocks()
    ours = oplora.OPAdamW(data, lr=1e-9, weight_decay=0, mlp_width=8)
    losses(data).backward()
    ours.step()
    data[2][1].data += 1.0  # .data hides the edit from autograd's version counter
    edited = data[2][1].detach().clone()
    with pytest.warns(UserWarning, match="group 0 tensor 2.1"):
        ours.step()
    torch.testing.assert_close(data[2][1], edited, rtol=0, atol=1e-7)
    ours.edited = "raise"
    with torch.no_grad():
        data[0][0].mul_(2)
    with pytest.raises(RuntimeError, match=r"group 0 tensor 0\.0"):
        ours.step()
    data[0][0].data.fill_(math.nan)
    ours.edited = "absorb"
    with pytest.raises(RuntimeError, match="NaN"):
        ours.step()


def test_tensors_without_gradient_are_left_alone():
    data = blocks()
    ours = oplora.OPAdamW(data, lr=0.1, weight_decay=0.1, mlp_width=8, start=starts("paper"))
    before = [t.detach().clone() for t in data[1]]
    losses([data[0], data[2]]).backward()
    ours.step()
    assert all(torch.equal(t, b) for t, b in zip(data[1], before))
    assert data[0][1].any()


def test_closure_scheduler_and_added_group():
    data = blocks()
    ours = oplora.OPAdamW(data[:2], lr=0.1, mlp_width=8)
    ours.add_param_group({"params": data[2:], "lr": 0.02, "mlp_width": 4})
    scheduler = torch.optim.lr_scheduler.StepLR(ours, 1, 0.5)

    def closure():
        ours.zero_grad()
        loss = losses(data)
        loss.backward()
        return loss

    first = ours.step(closure)
    scheduler.step()
    assert [g["lr"] for g in ours.param_groups] == [0.05, 0.01]
    for _ in range(30):
        last = ours.step(closure)
    assert last < first
    assert [g["lr"] for g in ours.inner.param_groups] == [0.05, 0.01]


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    data = blocks()
    ours = oplora.OPAdamW(data[:1], mlp_width=8)
    with pytest.raises(ValueError, match="start lists 2 blocks"):
        ours.add_param_group({"params": data[1:2], "start": [["keep"], ["keep"]]})
    losses(data).backward()
    ours.step()
    assert len(ours.param_groups) == 1
    with pytest.raises(ValueError, match="is frozen"):
        ours.add_param_group({"params": [*data[1:2], torch.ones(2)]})
    ours.add_param_group({"params": data[1:2]})


def test_zero_width_trains_directly():
    data, plain = blocks(), blocks()
    ours = oplora.OPAdamW(data, lr=0.01, mlp_width=0)
    theirs = torch.optim.AdamW([t for b in plain for t in b], lr=0.01, fused=True)
    for _ in range(3):
        for tensors, optimizer in ((data, ours), (plain, theirs)):
            optimizer.zero_grad()
            losses(tensors).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for x, y in zip(data, plain) for a, b in zip(x, y))


def test_same_names_and_seed_give_the_same_mlp_whatever_was_drawn_before():
    def first_values(seed, draws):
        torch.manual_seed(draws)
        A, B = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.zeros(3, 2))
        oplora.OPAdamW([[("A", A), ("B", B)]], start="paper", seed=seed)
        return A

    assert torch.equal(first_values(0, 1), first_values(0, 2))
    assert not torch.equal(first_values(0, 1), first_values(1, 1))


def test_bad_arguments_are_named():
    def parameter(*shape, **kw):
        return torch.nn.Parameter(torch.ones(shape, **kw))

    shared = parameter(2)
    cases = [
        (lambda: oplora.OPAdamW([parameter(2)], mlp_width=-1), "mlp_width=-1"),
        (lambda: oplora.OPAdamW([parameter(2)], mlp_width=2.5), "mlp_width=2.5"),
        (lambda: oplora.OPAdamW([parameter(2)], z_dim=0), "z_dim"),
        (lambda: oplora.OPAdamW([parameter(2)], init="cauchy"), "cauchy"),
        (lambda: oplora.OPAdamW([parameter(2)], start="papre"), "papre"),
        (lambda: oplora.OPAdamW([parameter(2)], start="paper"), "start='keep'"),
        (lambda: oplora.OPAdamW([parameter(2)], clip="adapter"), "adapter"),
        (lambda: oplora.OPAdamW([parameter(2)], lr=-1.0), "Invalid learning rate: -1.0"),
        (lambda: oplora.OPAdamW([shared, shared]), "twice"),
        (lambda: oplora.OPAdamW([[shared], [("B", torch.nn.Parameter(shared.data))]]), "B shares"),
        (lambda: oplora.OPAdamW([("A", torch.ones(2))]), "A is frozen"),
        (lambda: oplora.OPAdamW([("A", torch.ones(2, dtype=torch.int8))]), "int8"),
        (lambda: oplora.OPOptimizer([parameter(2)], torch.optim.LBFGS), "LBFGS"),
        (lambda: oplora.OPOptimizer([parameter(2)], torch.optim.SparseAdam), "SparseAdam"),
        (lambda: oplora.OPOptimizer([parameter(2)], "adamw"), "'adamw' is no optimizer class"),
        (lambda: oplora.OPAdamW([parameter(2)], clip="mlp", max_norm=-1), "max_norm=-1"),
        (lambda: oplora.OPAdamW([parameter(2)], amsgrad=True), "OPOptimizer"),
    ]
    for build, words in cases:
        with pytest.raises((ValueError, TypeError), match=words):
            build()
    halves = torch.ones(4).split(2)  # of one buffer, side by side
    oplora.OPAdamW([torch.nn.Parameter(half) for half in halves], fused=True, foreach=False)


def test_repr_and_counts():
    data = blocks()
    ours = oplora.OPAdamW(data, mlp_width=8, z_dim=5, start=starts("paper"))
    adapter = sum(t.numel() for b in data for t in b)
    assert ours.adapter_parameters == adapter
    assert ours.mlp_parameters == 3 * (5 + 8 * 5 + 8) + 8 * adapter + adapter
    assert "start='paper'" in repr(ours) and "mlp_width=8" in repr(ours)
