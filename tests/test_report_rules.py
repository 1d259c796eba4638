"""The rules of the claims page: every verdict on made-up runs, with numbers worked out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from oplora import report
from oplora.harness.runs import Record
from oplora.report import claims, rules
from oplora.report.comparison import Comparison, good_rates
from oplora.report.metrics import Score
from oplora.report.rules import FAILS, HOLDS, IN_A_RANGE, NOT_RUN, UNTESTABLE

SWEEP = {"lora": {1e-3: 3.0, 1e-2: 2.0, 1e-1: 4.0}, "oplora": {1e-3: 3.1, 1e-2: 1.9, 1e-1: 4.1}}
CITED = {"lora": 70.0, "oplora": 71.0}


def run(method, lr, seed=0, loss=2.0, score=None, **options):
    config = {
        "method": {"name": method}, "lr": lr, "seed": seed, "rank": 8, "mlp_width": 32,
    } | options  # fmt: skip
    mlp = 320 * method.startswith("op")
    parameters = {
        "adapter_parameters": 10, "mlp_parameters": mlp, "trained_parameters": mlp or 10
    }  # fmt: skip
    metrics = {"validation_loss": [[5, 9.0], [10, loss]], "train_seconds": 5.0, **parameters}
    return Record(Path(method), config, {}, metrics | ({} if score is None else {"score": score}))


def comparison(scores, sweep=SWEEP, every=(), higher=True, **options):
    """scores: method → one per seed, at the method's best rate of the sweep."""
    runs = [run(m, lr, loss=loss) for m, losses in sweep.items() for lr, loss in losses.items()]
    for method, values in scores.items():
        rate = min(sweep[method], key=sweep[method].get)
        runs += [run(method, rate, seed, sweep[method][rate], s) for seed, s in enumerate(values)]
    return Comparison(
        experiment="vl_bart",
        preset="small",
        name="x",
        records=runs,
        every=[*runs, *every],
        loss=lambda r: r.metrics["validation_loss"][-1][1],
        score=Score("points", "score", scale=1, higher=higher),
        **{"cited": CITED} | options,
    )


def better(scores, **options):
    return rules.better(comparison(scores, **options), "oplora", "lora")


@pytest.mark.parametrize(
    ("mine", "verdict"),
    [
        ([61.0, 61.2, 61.1], HOLDS),  # differences 1.0, 1.2, 1.1: 1.1 ± 0.25
        ([59.0, 60.0, 61.0], UNTESTABLE),  # 0 ± 2.5: both zero and the paper's 1.0 lie inside
        ([60.1, 60.0, 59.9], FAILS),  # 0 ± 0.25: the paper's 1.0 lies outside
        ([58.0, 58.1, 57.9], FAILS),
        ([61.0], NOT_RUN),  # one seed has no interval
        ([], NOT_RUN),
    ],
)
def test_better_is_judged_by_the_interval_over_shared_seeds(mine, verdict):
    found = better({"lora": [60.0, 60.0, 60.0], "oplora": mine})
    assert found.verdict == verdict
    assert (found.command is not None) == (verdict == NOT_RUN)


def test_better_in_a_range_needs_two_neighbouring_shared_rates():
    sweep = {"lora": {1e-3: 3.0, 1e-2: 2.0, 1e-1: 1.5}, "oplora": {1e-3: 2.9, 1e-2: 1.9, 1e-1: 9}}
    scores = {"lora": [60.0, 60.0, 60.0], "oplora": [57.0, 61.0, 60.5]}
    found = better(scores, sweep=sweep)
    assert found.verdict == IN_A_RANGE and "from 0.001 to 0.01" in found.evidence
    worse = better(scores | {"oplora": [58.0, 58.1, 57.9]}, sweep=sweep)
    assert worse.verdict == FAILS and "from 0.001 to 0.01" in worse.evidence
    one = {"lora": {1e-3: 3.0, 1e-2: 2.0}, "oplora": {1e-3: 3.1, 1e-2: 1.9}}
    assert better(scores, sweep=one).verdict in (FAILS, UNTESTABLE)


def test_distances_are_better_when_lower_and_the_papers_gain_is_a_fraction():
    scores = {"lora": [2.0, 2.0], "oplora": [1.0, 1.01]}
    c = comparison(scores, higher=False, cited={"lora": 20.0, "oplora": 15.0})
    assert rules.better(c, "oplora", "lora").verdict == HOLDS
    assert rules.cited_gain(c, "oplora", "lora") == 0.5  # a quarter of 2.0
    assert rules.better(c, "lora", "oplora").verdict == FAILS


def test_missing_runs_are_asked_for_by_their_rates():
    found = better({"lora": [60.0], "oplora": []})
    assert found.command == "scripts/sweep_seeds.sh vl_bart lora=0.01 oplora=0.01"
    nothing = rules.better(comparison({}), "loraplus", "lora").command
    assert nothing == "scripts/sweep_learning_rates.sh vl_bart method=loraplus"


@pytest.mark.parametrize(
    ("mine", "verdict"),
    [([60.5, 59.5, 60.0], HOLDS), ([59.0, 59.1, 58.9], FAILS), ([55.0, 64.0, 60.0], UNTESTABLE)],
)
def test_not_worse(mine, verdict):
    c = comparison({"lora": [60.0, 60.0, 60.0], "oplora": mine})
    assert rules.not_worse(c, "oplora", "lora").verdict == verdict


def test_half_the_rank_is_compared_at_the_chosen_rate():
    half = [run("oplora", 1e-2, seed, score=61.0 + seed, rank=4) for seed in range(2)]
    other = [run("oplora", 1e-1, seed, score=10.0, rank=4) for seed in range(2)]
    c = comparison({"lora": [60.0, 60.0], "oplora": [62.0, 62.0]}, every=half + other)
    found = rules.half_the_rank(c, "oplora", "lora")
    assert found.verdict == HOLDS and "+1.5" in found.evidence
    c = comparison({"lora": [60.0, 60.0], "oplora": [62.0, 62.0]})
    command = rules.half_the_rank(c, "oplora", "lora").command
    assert command == "scripts/sweep_rank.sh vl_bart lora=0.01 oplora=0.01"


def test_good_rates_are_neighbours_of_the_best():
    losses = {1e-4: 1.0, 1e-3: 2.0, 1e-2: 1.0, 1e-1: 1.04, 1.0: 1.06}
    assert good_rates(losses).rates == [1e-4]  # 1e-2 is as good, but not a neighbour
    assert good_rates({1.0: 3.0, 2.0: 1.0, 4.0: 1.05, 8.0: 2.0}).rates == [2.0, 4.0]
    assert good_rates({1.0: 3.0, 2.0: 2.0}, best=1.0).rates == []
    assert str(good_rates({1.0: 1.0, 2.0: 1.0, 4.0: 9.0})) == "1 to 2 (≥ ×2)"


@pytest.mark.parametrize(
    ("mine", "theirs", "verdict"),
    [
        ([9, 1, 1, 1, 9], [9, 9, 1, 9, 9], HOLDS),
        ([9, 9, 1, 9, 9], [9, 1, 1, 1, 9], FAILS),
        ([9, 1, 1, 9, 9], [9, 9, 1, 1, 9], UNTESTABLE),  # as wide, or different by a step
        ([9, 1, 1, 1, 9], [9, 1, 1, 9, 9], UNTESTABLE),  # by one step of the grid
        ([1, 1, 1, 9, 9], [9, 9, 1, 9, 9], HOLDS),  # at the edge, but wider already
        ([9, 9, 1, 9, 9], [1, 1, 1, 9, 9], FAILS),  # the other's may be wider still
        ([9, 9, 1, 1, 9], [1, 1, 9, 9, 9], UNTESTABLE),  # as wide, perhaps
        ([9, 1, 1, 1, 9], [1, 1, 9, 9, 9], NOT_RUN),  # the other's may be wider than seen
        ([1, 9, 9, 9, 9], [9, 1, 1, 9, 9], NOT_RUN),  # its own may be
    ],
)
def test_less_sensitive(mine, theirs, verdict):
    rates = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    sweep = {"oplora": dict(zip(rates, mine)), "lora": dict(zip(rates, theirs))}
    assert rules.less_sensitive(comparison({}, sweep), "oplora", "lora").verdict == verdict


def test_sooner_compares_with_the_others_last_step():
    fast = {"lora": {1e-2: 2.0}, "oplora": {1e-2: 1.0}}
    c = comparison({}, fast)
    assert rules.sooner(c, "oplora", "lora").verdict == UNTESTABLE  # two evaluations
    for run_ in c.records:
        run_.metrics["validation_loss"][:0] = [[step, 9.5] for step in (1, 2, 3)]
    assert rules.sooner(c, "oplora", "lora").verdict == FAILS  # below it at the last step only
    c.at_best["oplora"][0].metrics["validation_loss"][3][1] = 1.9
    found = rules.sooner(c, "oplora", "lora")
    assert found.verdict == HOLDS and "at step 5" in found.evidence
    assert rules.sooner(c, "lora", "oplora").verdict == FAILS
    assert rules.sooner(c, "loraplus", "lora").verdict == NOT_RUN


def test_best_seed():
    c = comparison({"lora": [60.0, 63.0], "oplora": [50.0, 64.0]})
    assert rules.best_seed(c, "oplora", "lora").verdict == HOLDS
    assert rules.best_seed(c, "lora", "oplora").verdict == FAILS
    assert rules.best_seed(comparison({"lora": [60.0, 63.0]}), "oplora", "lora").verdict == NOT_RUN


@pytest.mark.parametrize(
    ("by_width", "inverted", "flat"),
    [
        ({1: [50, 51], 8: [60, 61], 64: [50, 51]}, HOLDS, FAILS),
        ({1: [50, 51], 8: [60, 61], 64: [59.5, 60.5], 128: [60, 60.4]}, UNTESTABLE, HOLDS),
        ({1: [50, 51], 8: [60, 61], 64: [70, 71]}, FAILS, FAILS),
        ({1: [50, 51], 8: [60, 61]}, NOT_RUN, NOT_RUN),
    ],
)
def test_the_mlps_width(by_width, inverted, flat):
    runs = [
        run("oplora", 1e-2, seed, score=score, mlp_width=width)
        for width, scores in by_width.items()
        for seed, score in enumerate(scores)
    ]
    c = comparison({}, every=runs)
    assert rules.inverted_u(c, "oplora").verdict == inverted
    assert rules.flat_beyond_one(c, "oplora").verdict == flat


def test_parameters_and_seconds():
    c = comparison({})
    assert rules.ships_the_same(c, "oplora", "lora").verdict == HOLDS
    assert rules.width_times(c, "oplora").verdict == HOLDS
    assert rules.quicker(c, "oplora", "lora_pro").verdict == NOT_RUN
    c.records_of("oplora")[0].metrics["train_seconds"] = 4.0
    assert rules.quicker(c, "oplora", "lora").verdict == HOLDS
    assert rules.quicker(c, "lora", "oplora").verdict == FAILS
    for r in c.records_of("oplora"):
        r.metrics.update(adapter_parameters=11, mlp_parameters=999)
    assert rules.ships_the_same(c, "oplora", "lora").verdict == FAILS
    assert rules.width_times(c, "oplora").verdict == FAILS


def test_consistent_gains_need_two_experiments_and_all_of_them():
    good = {"lora": [60.0, 60.0], "oplora": [62.0, 62.1]}
    bad = {"lora": [60.0, 60.0], "oplora": [58.0, 58.1]}
    unclear = {"lora": [60.0, 60.0, 60.0], "oplora": [59.0, 60.0, 61.0]}
    cases = {
        NOT_RUN: [("vl_bart", good)],
        HOLDS: [("vl_bart", good), ("sdxl", good)],
        FAILS: [("vl_bart", good), ("sdxl", bad)],
        UNTESTABLE: [("vl_bart", good), ("sdxl", unclear)],
    }
    for verdict, parts in cases.items():
        compared = [
            replace(comparison(scores), experiment=experiment, name=experiment)
            for experiment, scores in parts
        ]
        assert claims.consistent(compared).verdict == verdict


def test_every_claim_is_told_even_without_any_run(tmp_path):
    found = report.build(tmp_path).claims
    assert {claim.verdict for claim in found} == {NOT_RUN}
    assert {thesis.text for thesis in claims.GENERAL} <= {claim.text for claim in found}
    assert all(claim.command for claim in found if str(claim.scope) != "—")
    assert all(claim.section and claim.evidence for claim in found)
