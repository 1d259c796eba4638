"""The rules of the claims page: every verdict on made-up runs, with numbers worked out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from oplora.harness.runs import Record
from oplora.report import across, claims, price, rules
from oplora.report.comparison import NOTHING_LEARNED, Comparison
from oplora.report.metrics import Score
from oplora.report.rates import good_rates, loss_at
from oplora.report.rules import EQUAL_RATES, FAILS, HOLDS, NOT_RUN, UNTESTABLE
from oplora.report.tables import rate_table

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


def comparison(scores, sweep=SWEEP, every=(), higher=True, seeds=1, **options):
    """scores: method → one per seed, at the method's best rate of the sweep."""
    runs = [
        run(m, lr, seed, loss)
        for m, losses in sweep.items()
        for lr, loss in losses.items()
        for seed in range(seeds)
    ]
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


def test_only_at_equal_rates_needs_two_neighbouring_shared_rates_with_three_seeds_each():
    sweep = {"lora": {1e-3: 3.0, 1e-2: 2.0, 1e-1: 1.5}, "oplora": {1e-3: 2.9, 1e-2: 1.9, 1e-1: 9}}
    scores = {"lora": [60.0, 60.0, 60.0], "oplora": [57.0, 61.0, 60.5]}
    found = better(scores, sweep=sweep, seeds=3)
    assert found.verdict == EQUAL_RATES and "from 0.001 to 0.01 (3 seeds each)" in found.evidence
    for seeds, words in ((1, "one seed only: does not count"), (2, "2 seeds only")):
        thin = better(scores, sweep=sweep, seeds=seeds)
        assert thin.verdict == UNTESTABLE and words in thin.evidence
    worse = better(scores | {"oplora": [58.0, 58.1, 57.9]}, sweep=sweep, seeds=3)
    assert worse.verdict == FAILS and "from 0.001 to 0.01" in worse.evidence
    one = {"lora": {1e-3: 3.0, 1e-2: 2.0}, "oplora": {1e-3: 3.1, 1e-2: 1.9}}
    assert better(scores, sweep=one, seeds=3).verdict == UNTESTABLE


def test_a_rate_that_one_seed_chose_among_equals_asks_for_more():
    sweep = {"lora": {1e-3: 2.05, 1e-2: 2.0, 1e-1: 4.0}}
    more = [run("lora", 1e-2, seed, loss=2.0 + seed / 10, score=1.0) for seed in (1, 2)]
    c = comparison({}, sweep)
    (row,) = across.sensitivity_of(replace(c, records=[*c.records, *more], swept=c.records))
    assert row.cells["as good within the seeds' spread"] == "0.001"  # 0.05 against 0.1
    assert row.cells["to be run"].endswith("vl_bart method=lora seed=0,1,2")
    (row,) = across.sensitivity_of(c)
    assert "to be run" not in row.cells  # no spread is known


def test_more_seeds_decide_between_the_rates_that_have_them():
    c = comparison({})
    assert c.chosen["lora"] == 1e-2
    unlucky = [run("lora", 1e-2, seed, 3.5) for seed in (1, 2)]
    c = comparison({})
    c.records.extend(unlucky)  # alone: its rivals were not run with these seeds
    assert c.chosen["lora"] == 1e-2
    c = comparison({})
    c.records.extend([*unlucky, *(run("lora", 1e-3, seed, 2.5) for seed in (1, 2))])
    assert c.chosen["lora"] == 1e-3  # 3, 2.5, 2.5 against 2, 3.5, 3.5
    assert c.losses("lora") == SWEEP["lora"] and c.rivals("lora") == []
    cells = rate_table("t", "", c.swept_seeds, c.records).rows[0].cells
    assert cells == {
        "method": "LoRA", "0.001": "2.667 (3 seeds)* (edge)", "0.01": "3.000 (3 seeds)",
        "0.1": "4.000",
    }  # fmt: skip


def test_without_a_number_of_the_papers_an_interval_around_zero_tells_nothing():
    scores = {"lora": [60.0, 60.0, 60.0], "oplora": [60.1, 60.0, 59.9]}
    assert better(scores, cited={}).verdict == UNTESTABLE
    assert better(scores, cited={"lora": 71.0, "oplora": 70.0}).verdict == FAILS  # nor the paper's


def test_the_seeds_that_would_show_the_papers_effect_are_told():
    """Differences 0, 1 and 2: spread 1, and the paper's effect is 1: ten paired seeds at 80%."""
    scores = {"lora": [60.0, 60.0, 60.0], "oplora": [60.0, 61.0, 62.0]}
    found = better(scores)
    assert found.verdict == UNTESTABLE and "+1.0; 10 seeds would show it)" in found.evidence
    (row,) = across.power_of(comparison(scores))
    assert row.cells["spread"] == "1.00" and row.cells["seeds needed, the same"] == "10"
    assert row.cells["seeds needed, independent"] == "9"  # spreads 0 and 1: 0.707 together
    assert row.cells["smallest gain shown here"] == "3.1"  # (4.303 + 1.061) / √3
    noisy = {"lora": [60.0, 60.0, 60.0], "oplora": [30.0, 60.0, 90.0]}
    assert "over 1,000 seeds would show it" in better(noisy).evidence
    assert not across.power_of(comparison(scores, cited={}))


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
    assert good_rates(losses, 1.05).rates == [1e-4]  # 1e-2 is as good, but not a neighbour
    assert good_rates({1.0: 3.0, 2.0: 1.0, 4.0: 1.05, 8.0: 2.0}, 1.05).rates == [2.0, 4.0]
    assert good_rates({1.0: 3.0, 2.0: 2.0}, 1.05).rates == []
    assert str(good_rates({1.0: 1.0, 2.0: 1.0, 4.0: 9.0}, 1.05)) == "1 to 2 (≥ ×2)"


def test_sensitivity_is_a_share_of_the_gain_not_of_the_loss():
    """A floor at 3.0 of a loss that starts at 3.4: 5% of it is over a third of the gain."""
    sweep = {"lora": {1e-3: 3.2, 1e-2: 3.0, 1e-1: 3.04}, "oplora": {1e-3: 3.1, 1e-2: 3.05}}
    base = [run("base", 0.0, loss=3.4, fine_tune=False)]
    c = comparison({}, sweep, base=base, seeds=3)
    assert loss_at(0.75, 3.4, 3.0) == pytest.approx(3.1)
    rows = {row.cells["method"]: row.cells for row in across.sensitivity_of(c)}
    assert rows["LoRA"]["75% of the gain"] == "0.01 to 0.1 (≥ ×10)"
    assert rows["LoRA"]["95% of the gain"] == "0.01 to 0.01 (×1)"
    assert rows["OP-LoRA"]["75% of the gain"] == "0.001 to 0.01 (≥ ×10)"  # of the best adapter's
    assert rows["OP-LoRA"]["95% of the gain"] == "none" and rows["OP-LoRA"]["seeds"] == 3
    unknown = across.sensitivity_of(comparison({}, sweep))[0].cells
    assert unknown["within 5% of the best loss"] == "0.01 to 0.1 (≥ ×10)"
    command = "python experiments/vl_bart.py preset=small fine_tune=false run_name=base"
    assert unknown["90% of the gain"].command == command
    found = rules.less_sensitive(comparison({}, sweep, seeds=3), "oplora", "lora")
    assert (found.verdict, found.command) == (NOT_RUN, command)


def test_where_nothing_was_learned_no_gain_is_shared_out():
    """The best adapter at 0.995 of the base model's loss: less than a hundredth below it."""
    sweep = {"lora": {1e-3: 3.4, 1e-2: 3.0}, "oplora": {1e-3: 2.985, 1e-2: 5.0}}
    base = [run("base", 0.0, loss=3.0, fine_tune=False)]
    flat = comparison({}, sweep, base=base, seeds=3)
    assert not flat.learns and across.sensitivity_of(flat) == []
    for rule in (rules.better, rules.faster, rules.less_sensitive):
        found = rule(flat, "oplora", "lora")
        assert (found.verdict, found.evidence) == (UNTESTABLE, NOTHING_LEARNED)
        assert rule(flat, "loraplus", "lora").verdict == NOT_RUN  # what was not run stays so
    learned = replace(flat, name="b", experiment="sdxl", base=[replace(base[0], metrics={
        "validation_loss": [[0, 3.1]]})])  # fmt: skip
    assert learned.learns and price.settings([flat, learned], "small") == {
        learned.scope.column: learned
    }


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
    options = {"base": [run("base", 0.0, loss=9.0, fine_tune=False)]}
    c = comparison({}, sweep, seeds=3, **options)
    assert rules.less_sensitive(c, "oplora", "lora").verdict == verdict
    one = rules.less_sensitive(comparison({}, sweep, **options), "oplora", "lora")
    assert one.verdict == NOT_RUN and "one seed only" in one.evidence
    assert one.command.endswith("method=lora,oplora seed=0,1,2")


def curved(c, method, rate, losses, seeds=3):
    """The runs of a method at a rate, with a validation curve of its own."""
    for seed in range(seeds):
        for r in [r for r in c.records if (r.config["lr"], r.config["seed"]) == (rate, seed)]:
            if r.config["method"]["name"] == method:
                shift = seed / 100 * (method == "oplora")  # else there is no spread
                r.metrics["validation_loss"] = [[n, v + shift] for n, v in enumerate(losses)]


def test_faster_compares_areas_to_the_same_step():
    sweep = {"lora": {1e-2: 2.0}, "oplora": {1e-3: 2.0, 1e-2: 2.5}}
    c = comparison({}, sweep, seeds=3)
    assert rules.faster(c, "oplora", "lora").verdict == UNTESTABLE  # two evaluations
    curved(c, "lora", 1e-2, [6, 4, 3, 2, 2])
    curved(c, "oplora", 1e-3, [6, 3, 2, 2, 2])  # heights 2.75 and 3.25, shifted by 0, 1 and 2%
    curved(c, "oplora", 1e-2, [6, 6, 6, 6, 6])
    found = rules.faster(c, "oplora", "lora")
    assert found.verdict == HOLDS and "+0.490 ± 0.025 (3 seeds)" in found.evidence
    assert rules.faster(c, "lora", "oplora").verdict == FAILS
    curved(c, "oplora", 1e-3, [6, 3.98, 3, 2, 2])
    assert rules.faster(c, "oplora", "lora").verdict == UNTESTABLE  # 0.005 less, and the shift
    curved(c, "oplora", 1e-2, [6, 3, 2, 2, 2])
    found = rules.faster(c, "oplora", "lora")
    assert found.verdict == EQUAL_RATES and "at the same rate 0.01" in found.evidence
    assert rules.faster(c, "loraplus", "lora").verdict == NOT_RUN


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
