"""The batched matrix-factorization program against single runs with torch.optim."""

import math

import pytest
import torch

from oplora.mlp import AdapterMLP
from oplora.studies.matrix_factorization.factorization import (
    SGD,
    Adam,
    Momentum,
    Problem,
    build,
    effective_rank,
    factorize,
    product_singular_values,
    svd_reference,
)

SMALL = Problem(rows=12, columns=9, rank=3, steps=40, warmup_steps=5, log_every=5)
MLP = dict(width=8, z_dim=6)
RULES = {
    "sgd": (SGD, lambda params, lr: torch.optim.SGD(params, lr)),
    "momentum": (Momentum, lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9)),
    "adam": (Adam, lambda params, lr: torch.optim.Adam(params, lr, fused=True)),
}
RATES = {"sgd": [0.3, 1.0], "momentum": [0.05, 0.1], "adam": [0.003, 0.01]}


def single_run(seed, lr, make_optimizer, predicted, clipped_steps=None):
    """One run as the paper writes it: modules, autograd, torch.optim.

    Its final error, and at every step the gradient norms of the adapter and of what is trained.
    """
    M = SMALL.target(seed)
    generator = torch.Generator().manual_seed(10_000 + seed)
    shapes = {"A": (3, 9), "B": (12, 3)}
    modules = {
        name: AdapterMLP([torch.zeros(shapes[name])], MLP["width"], [start], z_dim=MLP["z_dim"],
                         generator=generator)
        for name, start in (("A", "random"), ("B", "still"))
    }  # fmt: skip
    if predicted:
        params = [p for m in modules.values() for p in m.parameters()]
        values = lambda: (modules["A"]()[0], modules["B"]()[0])  # noqa: E731
    else:
        bound, generator = 1 / math.sqrt(9), torch.Generator().manual_seed(20_000 + seed)
        A = torch.nn.Parameter(torch.empty(3, 9).uniform_(-bound, bound, generator=generator))
        B = torch.nn.Parameter(torch.zeros(12, 3))
        params, values = [A, B], lambda: (A, B)
    optimizer = make_optimizer(params, lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, SMALL.factor)
    norms = {"adapter": [], "trained": []}
    for _ in range(SMALL.steps):
        A, B = values()
        optimizer.zero_grad()
        A.retain_grad()
        B.retain_grad()
        ((B @ A - M) ** 2).mean().backward()
        for name, tensors in (("adapter", (A, B)), ("trained", params)):
            norms[name].append(torch.nn.utils.get_total_norm([t.grad for t in tensors]).item())
        optimizer.step()
        scheduler.step()
    A, B = values()
    return ((B @ A - M) ** 2).mean().item(), norms


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("method", ["plain", "predicted"])
def test_members_equal_single_runs(name, method):
    rule, make_optimizer = RULES[name]
    result, _ = factorize(SMALL, [0, 1], RATES[name], method=method, rule=rule, **MLP)
    for i, lr in enumerate(RATES[name]):
        for j, seed in enumerate([0, 1]):
            expected, norms = single_run(seed, lr, make_optimizer, method == "predicted")
            assert result["final_mse"][i][j] == pytest.approx(expected, rel=2e-4)
            for whose, each in norms.items():
                peak = {k: v[i][j] for k, v in result["gradient_peaks"][whose].items()}
                top = max(range(len(each)), key=each.__getitem__)
                wanted = dict(first=each[0], highest=each[top], lowest_after=min(each[top:]))
                assert peak == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("method", ["plain", "predicted", "matched"])
def test_a_diverged_member_disturbs_nobody(method):
    alone, curves_alone = factorize(SMALL, [3], [0.3], method=method, rule=SGD, **MLP)
    both, curves = factorize(SMALL, [3], [0.3, 1e6], method=method, rule=SGD, **MLP)
    assert both["diverged"] == [[False], [True]]
    assert both["final_mse"][1] == [None] and both["diverged_step"][1][0] >= 0
    assert both["final_mse"][0] == pytest.approx(alone["final_mse"][0], rel=1e-5)
    torch.testing.assert_close(curves["mse"][0], curves_alone["mse"][0])
    assert curves["mse"][1, 0, -1].isnan()


def test_matched_control_takes_the_steps_of_its_companion():
    """With h frozen, OP-MF itself is plain MF with multiplied steps: the control must equal it."""

    class FrozenTrunk(SGD):
        def dense(self, name, x, g, lr):
            if name in ("A", "B") or name.endswith("b2"):
                super().dense(name, x, g, lr)

    options = dict(rule=FrozenTrunk, initial_A="mlp", **MLP)
    _, op_curves = factorize(SMALL, [0, 1], [0.3, 1.0], method="predicted", **options)
    _, curves = factorize(SMALL, [0, 1], [0.3, 1.0], method="matched", **options)
    torch.testing.assert_close(curves["mse"], op_curves["mse"], rtol=1e-4, atol=1e-6)
    assert (curves["step_multiplier"] > 1.1).all()


def test_frobenius_loss_is_mse_with_a_larger_rate():
    frobenius = Problem(**{**SMALL.__dict__, "loss": "frobenius"})
    a, _ = factorize(SMALL, [0], [0.5], method="plain", rule=SGD, **MLP)
    b, _ = factorize(frobenius, [0], [0.5 / 108], method="plain", rule=SGD, **MLP)
    assert a["final_mse"][0][0] == pytest.approx(b["final_mse"][0][0], rel=1e-4)


def test_effective_rank_by_hand_and_through_the_small_problem():
    assert effective_rank(torch.tensor([1.0, 1.0, 0.0])).item() == pytest.approx(2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(torch.tensor([3.0, 1.0])).item() == pytest.approx(math.exp(entropy))
    B, A = torch.randn(4, 12, 3), torch.randn(4, 3, 9)
    expected = torch.linalg.svdvals((B @ A).double())[:, :3].flip(-1)
    torch.testing.assert_close(product_singular_values(B, A), expected, rtol=1e-5, atol=1e-6)


def test_target_agrees_with_the_known_reference_values():
    figures = [svd_reference(Problem().target(seed), 8) for seed in range(3)]
    for figure, condition in zip(figures, (1692, 2001, 3039)):
        assert 0.0625 <= figure["svd_mse"] <= 0.0633 + 5e-5
        assert 0.0815 <= figure["rank1_mse"] <= 0.083
        assert 4.455 <= figure["svd_effective_rank"] <= 4.505
        assert figure["condition_number"] == pytest.approx(condition, rel=1e-3)


def test_chosen_condition_number():
    problem = Problem(condition_number=100.0)
    M = problem.target(0)
    assert svd_reference(M, 8)["condition_number"] == pytest.approx(100, rel=1e-3)
    assert M.norm().item() == pytest.approx(Problem().target(0).norm().item(), rel=1e-4)


def test_rates_share_the_start_of_a_seed_and_seeds_differ():
    model = build("predicted", "lora", SGD, SMALL, [0, 1], 3, None, **MLP)
    A, B = model.tensors()
    assert torch.equal(A[0], A[2]) and not torch.equal(A[0], A[1])
    assert not B.any()


def test_wrong_problems_name_the_value():
    for wrong, words in [
        (dict(rank=9), "rank=9"),
        (dict(rank=0), "rank=0"),
        (dict(loss="l1"), "l1"),
        (dict(warmup_steps=40), "warmup_steps=40"),
        (dict(log_every=3), "log_every=3"),
        (dict(condition_number=0.5), "0.5"),
    ]:
        with pytest.raises(ValueError, match=words):
            Problem(**{**SMALL.__dict__, **wrong})
    for rates in ([0.0], [-1.0], ["fast"], [math.nan], []):
        with pytest.raises(ValueError, match="learning rates"):
            factorize(SMALL, [0], rates, method="plain", rule=SGD, **MLP)
