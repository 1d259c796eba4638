"""The fast optimizer in lockstep with the definition (`AdapterMLP` through autograd)."""

import copy
import math
import warnings

import pytest
import torch

import oplora
from oplora.mlp import AdapterMLP, generator_for
from oplora.rank1 import rank1_adamw_, rank1_momentum_, rank1_sgd_

SHAPES = [[(4, 10), (7, 4)], [(4, 10), (7, 4), (7,)], [(3, 5), (6, 3)]]
EVEN = [[(4, 8), (8, 4)], [(4, 16), (32, 4), (32,)], [(2, 8), (8, 2)]]
WIDTH = 16


def blocks(dtype=torch.float64, start="paper", layers=SHAPES):
    """Three adapters with A random, B zero (or not), one with a DoRA-like vector."""
    torch.manual_seed(0)
    result = []
    for shapes in layers:
        tensors = [torch.randn(shape, dtype=dtype) / math.sqrt(shape[-1]) for shape in shapes]
        if start == "paper":
            tensors[1].zero_()
        result.append([torch.nn.Parameter(t) for t in tensors])
    return result


def starts(start):
    if start == "keep":
        return "keep"
    return [["random", "zero", "keep"][: len(shapes)] for shapes in SHAPES]


def losses(all_blocks, target=1.0):
    """A loss with curvature and coupling between the tensors of a block."""
    total = 0
    for tensors in all_blocks:
        product = tensors[1] @ tensors[0]
        if len(tensors) == 3:
            product = product * tensors[2][:, None]
        x = torch.linspace(-1, 1, product.numel(), dtype=product.dtype).view_as(product)
        total = total + ((product - target * torch.sin(3 * x)) ** 2).mean()
    return total


def reference(data, start, **kw):
    """In-graph MLPs with the same initial weights as the optimizer's."""
    mlps = []
    for b, tensors in enumerate(data):
        generator = generator_for(0, f"group 0 tensor {b}.0")
        start_b = start if isinstance(start, str) else start[b]
        mlps.append(AdapterMLP(tensors, WIDTH, start_b, z_dim=8, generator=generator, **kw))
    return mlps


def lockstep(make, make_reference, start, steps=20, loss=losses):
    data = blocks(start=start)
    mlps = reference(data, starts(start))
    ours = make(data, mlp_width=WIDTH, z_dim=8, start=starts(start))
    theirs = make_reference([p for m in mlps for p in m.parameters()])
    for i, mlp in enumerate(mlps):  # units that are off are put close to the threshold
        with torch.no_grad():
            off = mlp.W1 @ mlp.z < 0
            mlp.b1[off] = -(mlp.W1 @ mlp.z)[off] - 0.003
            ours.stacks[0].b1[i] = mlp.b1
    active = [torch.relu(m.W1 @ m.z + m.b1) > 0 for m in mlps]
    woke = 0
    for _ in range(steps):
        ours.zero_grad()
        loss(data).backward()
        ours.step()
        theirs.zero_grad()
        loss([m() for m in mlps]).backward()
        theirs.step()
        now = [torch.relu(m.W1 @ m.z + m.b1) > 0 for m in mlps]
        woke += sum(int((n & ~a).sum()) for n, a in zip(now, active))
        active = [a | n for a, n in zip(active, now)]
        for tensors, mlp in zip(data, mlps):
            for tensor, expected in zip(tensors, mlp()):
                torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-12)
    return woke


@pytest.mark.parametrize("start", ["paper", "keep"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("form", [oplora.OPAdamW, oplora.OPOptimizer])
def test_adamw_equals_the_mlp_in_the_graph(start, weight_decay, form):
    options = dict(lr=0.03, weight_decay=weight_decay)
    woke = lockstep(
        lambda data, **kw: form(data, **options, **kw),
        lambda params: torch.optim.AdamW(params, **options),
        start,
    )
    assert woke > 0, "the case is meant to contain units that become active on the way"


@pytest.mark.parametrize(
    "cls, options",
    [
        (torch.optim.SGD, dict(lr=0.05)),
        (torch.optim.SGD, dict(lr=0.05, momentum=0.9, weight_decay=0.01)),
        (torch.optim.Adam, dict(lr=0.01, weight_decay=0.01, amsgrad=True)),
        (torch.optim.RMSprop, dict(lr=0.003)),
    ],
    ids=["sgd", "momentum", "adam", "rmsprop"],
)
@pytest.mark.parametrize("start", ["paper", "keep"])
def test_any_torch_optimizer_equals_the_mlp_in_the_graph(cls, options, start):
    lockstep(
        lambda data, **kw: oplora.OPOptimizer(data, cls, **options, **kw),
        lambda params: cls(params, **options),
        start,
    )


@pytest.mark.parametrize("form", [oplora.OPAdamW, oplora.OPOptimizer])
def test_blocks_that_sit_steps_out_equal_the_mlp_in_the_graph(form):
    calls = []

    def loss(all_blocks):  # called for ours, then for the reference
        calls.append(None)
        step = (len(calls) - 1) // 2
        return losses(all_blocks[::2] if step % 3 else all_blocks)

    options = dict(lr=0.03, weight_decay=0.1)
    lockstep(
        lambda data, **kw: form(data, **options, **kw),
        lambda params: torch.optim.AdamW(params, **options),
        "paper",
        loss=loss,
    )
    assert len(calls) == 40


def test_one_mlp_per_tensor_is_two_trunks():
    data = blocks()[:1]
    A, B = data[0]
    mlps = [
        AdapterMLP([t], WIDTH, [s], z_dim=8, generator=generator_for(0, f"group 0 tensor {i}.0"))
        for i, (t, s) in enumerate([(A, "random"), (B, "zero")])
    ]
    start = [["random"], ["zero"]]
    ours = oplora.OPAdamW([A, B], lr=0.01, mlp_width=WIDTH, z_dim=8, start=start)
    theirs = torch.optim.AdamW([p for m in mlps for p in m.parameters()], lr=0.01)
    for _ in range(10):
        ours.zero_grad()
        losses([[A, B]]).backward()
        ours.step()
        theirs.zero_grad()
        losses([[mlps[0]()[0], mlps[1]()[0]]]).backward()
        theirs.step()
    torch.testing.assert_close(B, mlps[1]()[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(A, mlps[0]()[0], rtol=0, atol=1e-12)


def test_clip_mlp_equals_clip_grad_norm_on_the_modules():
    data, mlps = blocks(), None
    mlps = reference(data, starts("paper"))
    extra, extra_reference = (torch.nn.Parameter(torch.ones(3).double()) for _ in range(2))
    groups = [
        {"params": data, "start": starts("paper")},
        {"params": [extra], "mlp_width": 0},
    ]
    ours = oplora.OPAdamW(groups, lr=0.01, mlp_width=WIDTH, z_dim=8, clip="mlp", max_norm=0.05)
    params = [p for m in mlps for p in m.parameters()] + [extra_reference]
    theirs = torch.optim.AdamW(params, lr=0.01)
    for _ in range(10):
        ours.zero_grad()
        (losses(data) + (extra**3).sum()).backward()
        ours.step()
        theirs.zero_grad()
        (losses([m() for m in mlps]) + (extra_reference**3).sum()).backward()
        assert torch.nn.utils.clip_grad_norm_(params, 0.05) > 0.05
        theirs.step()
    for tensors, mlp in zip(data, mlps):
        for tensor, expected in zip(tensors, mlp()):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(extra, extra_reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fp32_rank1_update_is_bit_identical_to_fused_adamw(weight_decay, monkeypatch):
    """W2 of a whole run equals AdamW(fused=True) fed with the materialised gradients."""
    monkeypatch.setattr("oplora.rank1.SCRATCH", 48)  # several pieces, by rows and by columns
    data = blocks(torch.float32, layers=EVEN)
    ours = oplora.OPAdamW(
        data, lr=0.1, weight_decay=weight_decay, mlp_width=WIDTH, z_dim=8, start=starts("paper")
    )
    (stack,) = ours.stacks

    def by_unit(i):
        state = stack.state(i)  # with the rows that are drawn again when they are needed
        return torch.empty_like(state["W2"]).index_copy_(0, state["order"], state["W2"])

    expected = [torch.nn.Parameter(by_unit(i)) for i in range(len(data))]
    fused = torch.optim.AdamW(expected, lr=0.1, weight_decay=weight_decay, fused=True)
    first = list(stack.active)
    for _ in range(25):
        ours.zero_grad()
        losses(data).backward()
        for W2, h, g in zip(expected, stack.h, stack.gradient().split(stack.sizes)):
            W2.grad = torch.outer(h, g)
        fused.step()
        ours.step()
        for i, want in enumerate(expected):
            assert torch.equal(by_unit(i), want)
    assert stack.active != first, "units were to become active on the way"
    assert max(stack.active) < WIDTH, "and some never"
    assert [len(W2) for W2 in stack.W2] == stack.active, "only active rows take memory"
    assert all((rest is None) == (weight_decay == 0) for rest in stack.rest)


def test_public_operations_equal_the_fused_kernel():
    torch.manual_seed(0)
    for dtype, tolerance in [(torch.float64, 1e-14), (torch.float32, 2e-6)]:
        W, m, v = torch.randn(5, 33, dtype=dtype), *torch.rand(2, 5, 33, dtype=dtype)
        h, g = torch.rand(5, dtype=dtype), torch.randn(33, dtype=dtype)
        results = []
        for fused in (True, False):
            tensors = [t.clone() for t in (W, m, v)]
            options = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, fused=fused)
            rank1_adamw_(*tensors, h, g, torch.tensor(3.0), maximize=True, **options)
            results.append(tensors)
        for fused, public in zip(*results):
            torch.testing.assert_close(fused, public, rtol=tolerance, atol=tolerance)


def test_rank1_updates_serve_batches_with_a_rate_per_member():
    torch.manual_seed(0)
    W, h, g = torch.randn(3, 4, 9), torch.rand(3, 4), torch.randn(3, 9)
    lr = torch.tensor([[0.1], [0.01], [1.0]])
    gradient = h[:, :, None] * g[:, None]
    sgd = W.clone()
    rank1_sgd_(sgd, h, g, lr)
    torch.testing.assert_close(sgd, W - lr[..., None] * gradient)
    momentum, buffer = W.clone(), torch.zeros_like(W)
    for _ in range(2):
        rank1_momentum_(momentum, buffer, h, g, lr, 0.9)
    torch.testing.assert_close(momentum, W - lr[..., None] * gradient * (1 + 1.9))
    batch = [W.clone(), torch.zeros_like(W), torch.zeros_like(W)]
    options = dict(betas=(0.9, 0.999), eps=1e-8)
    rank1_adamw_(*batch, h, g, torch.tensor(1.0), lr=lr, **options)
    for i in range(3):
        single = [W[i].clone(), torch.zeros_like(W[i]), torch.zeros_like(W[i])]
        step = torch.tensor(1.0)
        rank1_adamw_(*single, h[i], g[i], step, lr=lr[i].item(), fused=False, **options)
        torch.testing.assert_close(batch[0][i], single[0])


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
    assert half[1].stacks[0].W2[0].dtype == torch.float32
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
        (lambda: oplora.OPAdamW([parameter(2)], z_init="cauchy"), "cauchy"),
        (lambda: oplora.OPAdamW([parameter(2)], start="papre"), "papre"),
        (lambda: oplora.OPAdamW([parameter(2)], start="paper"), "start='keep'"),
        (lambda: oplora.OPAdamW([parameter(2)], clip="adapter"), "adapter"),
        (lambda: oplora.OPAdamW([parameter(2)], lr=-1.0), "Invalid learning rate: -1.0"),
        (lambda: oplora.OPAdamW([shared, shared]), "twice"),
        (lambda: oplora.OPAdamW([("A", torch.ones(2))]), "A is frozen"),
        (lambda: oplora.OPAdamW([("A", torch.ones(2, dtype=torch.int8))]), "int8"),
        (lambda: oplora.OPOptimizer([parameter(2)], torch.optim.LBFGS), "LBFGS"),
        (lambda: oplora.OPAdamW([parameter(2)], amsgrad=True), "OPOptimizer"),
    ]
    for build, words in cases:
        with pytest.raises((ValueError, TypeError), match=words):
            build()


def test_repr_and_counts():
    data = blocks()
    ours = oplora.OPAdamW(data, mlp_width=8, z_dim=5, start=starts("paper"))
    adapter = sum(t.numel() for b in data for t in b)
    assert ours.adapter_parameters == adapter
    assert ours.mlp_parameters == 3 * (5 + 8 * 5 + 8) + 8 * adapter + adapter
    assert "start='paper'" in repr(ours) and "mlp_width=8" in repr(ours)
