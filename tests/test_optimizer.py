"""The fast optimizer in lockstep with the definition (`AdapterMLP` through autograd)."""

import pytest
import torch
from tiny_blocks import EVEN, WIDTH, blocks, losses, starts

import oplora
from oplora.mlp import AdapterMLP, generator_for
from oplora.rank1 import rank1_adamw_, rank1_momentum_, rank1_sgd_


def reference(data, start, **kw):
    """In-graph MLPs with the same initial weights as the optimizer's."""
    mlps = []
    for b, tensors in enumerate(data):
        generator = generator_for(0, f"group 0 tensor {b}.0")
        start_b = start if isinstance(start, str) else start[b]
        mlps.append(AdapterMLP(tensors, WIDTH, start_b, z_dim=8, generator=generator, **kw))
    return mlps


def lockstep(make, make_reference, start, steps=20, loss=losses, init="author"):
    data = blocks(start=start)
    mlps = reference(data, starts(start), init=init)
    ours = make(data, mlp_width=WIDTH, z_dim=8, start=starts(start), init=init)
    theirs = make_reference([p for m in mlps for p in m.parameters()])
    for i, mlp in enumerate(mlps):  # units that are off are put close to the threshold
        with torch.no_grad():
            off = mlp.W1 @ mlp.z + mlp.b1 < 0
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


@pytest.mark.parametrize("init", ["author", "text"])
@pytest.mark.parametrize("start", ["paper", "keep", "still"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("form", [oplora.OPAdamW, oplora.OPOptimizer])
def test_adamw_equals_the_mlp_in_the_graph(start, init, weight_decay, form):
    options = dict(lr=0.03, weight_decay=weight_decay)
    woke = lockstep(
        lambda data, **kw: form(data, **options, **kw),
        lambda params: torch.optim.AdamW(params, **options),
        start,
        init=init,
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
        for i, (t, s) in enumerate([(A, "random"), (B, "still")])
    ]
    start = [["random"], ["still"]]
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
        rows = stack.rows  # with those that are drawn again when they are needed
        W2 = torch.cat([rows.W2[i], rows.inactive(i)])
        return torch.empty_like(W2).index_copy_(0, rows.unit_of_row[i], W2)

    expected = [torch.nn.Parameter(by_unit(i)) for i in range(len(data))]
    fused = torch.optim.AdamW(expected, lr=0.1, weight_decay=weight_decay, fused=True)
    first = list(stack.rows.active)
    for _ in range(25):
        ours.zero_grad()
        losses(data).backward()
        for W2, h, g in zip(
            expected, stack.h, stack.tensors.gather_gradient().split(stack.tensors.sizes)
        ):
            W2.grad = torch.outer(h, g)
        fused.step()
        ours.step()
        for i, want in enumerate(expected):
            on = stack.rows.unit_of_row[i, : stack.rows.active[i]]
            # weight decay of a row that never was on is one factor, not one product a step
            exact = on if weight_decay else slice(None)
            if not weight_decay or stack.rows.active[i] == first[i]:
                assert torch.equal(by_unit(i)[exact], want[exact])
            torch.testing.assert_close(by_unit(i), want, rtol=2e-6, atol=1e-7)
    assert stack.rows.active != first, "units were to become active on the way"
    assert max(stack.rows.active) < WIDTH, "and some never"
    assert [len(W2) for W2 in stack.rows.W2] == stack.rows.active, "only active rows take memory"
    assert (stack.rows.shrink < 1).all() == (weight_decay > 0)


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
