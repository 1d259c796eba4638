"""What the report says over all settings, on made-up runs, with numbers worked out by hand."""

import math
from dataclasses import replace

from test_report_rules import comparison, run

from oplora import report
from oplora.report import against, claims, front, price
from oplora.report.rules import FAILS, HOLDS, NOT_RUN, UNTESTABLE, Finding
from oplora.report.titles import Scope


def test_the_price_of_not_tuning_is_what_one_rate_misses_of_the_gain():
    base = [run("base", 0.0, loss=11.0, fine_tune=False)]
    first = {"lora": {1e-3: 3.0, 1e-2: 1.0, 1e-1: math.inf}, "oplora": {1e-3: 1.5, 1e-2: 2.0}}
    second = {
        "lora": {1e-3: 1.5, 1e-2: 6.0, 1e-1: 11.0},
        "oplora": {1e-3: 1.0},
        "full": {1e-3: 0.0},
    }
    one = replace(comparison({}, first, base=base), name="a", experiment="vl_bart")
    two = replace(comparison({}, second, base=base), name="b", experiment="sdxl")
    alone = replace(
        one, name="c", experiment="llava_cars", base=[]
    )  # its base model's loss is not known
    text, figure, at_one_rate, grid = price.parts([one, two, alone])
    assert text.text == (
        "Untuned, at one rate for all 2 settings, the part of the gain that is missed: OP-LoRA at "
        "0.001: 2% (worst 5%); LoRA at 0.001: 12% (worst 20%) (one seed)."
    )
    assert [row.cells["method"] for row in at_one_rate.rows] == ["OP-LoRA", "LoRA"]
    assert list(at_one_rate.rows[1].cells.values()) == [
        "LoRA",
        "0.001",
        "20%",
        "5%",
        "12%",
        "20%",
        2,
        1,
    ]
    # LoRA's prices: 20%, 0, infinite; and 5%, 50%, 100%
    assert list(grid.rows[1].cells.values()) == ["LoRA", "33%", "33%", "50%", "46%", 2]
    assert figure.caption.endswith("Least: OP-LoRA at 0.001.")
    assert price.parts([one]) == price.parts([alone, one]) == []  # one setting tells nothing


def test_the_price_in_training_loss_is_told_apart():
    """Of the fall from 10, the highest first loss at a lowest rate, to the best end."""

    def trained(method, rate, first, end):
        """The last fifth of ten logged losses has the mean `end`."""
        made = run(method, rate, loss=1.0 + rate)
        losses = [first, *[5.0] * 7, end - 0.5, end + 0.5]
        return replace(made, metrics=made.metrics | {"train_loss": list(enumerate(losses))})

    base = [run("base", 0.0, loss=11.0, fine_tune=False)]
    runs = [trained("lora", 1e-3, 10.0, 4.0), trained("lora", 1e-2, 20.0, 3.0),
            trained("oplora", 1e-3, 9.0, 2.0), trained("oplora", 1e-2, 8.0, 3.6)]  # fmt: skip
    one = replace(comparison({}, {}, base=base), records=runs, swept=runs, name="a")
    two = replace(one, name="b", experiment="sdxl")
    text, *_, training = price.parts([one, two])
    assert text.text.endswith(
        " In training loss: OP-LoRA at 0.001: 0% (worst 0%); LoRA at 0.01: 12% (worst 12%)."
    )
    assert [list(row.cells.values())[:3] for row in training.rows] == [
        ["OP-LoRA", "0.001", "0%"],
        ["LoRA", "0.01", "12%"],
    ]
    silent = [replace(r, metrics={"validation_loss": [[0, 1.0]]}) for r in runs]
    assert price.in_training(replace(one, records=silent, swept=silent)) is None


def gain(values, name="x", **options):
    given = {"methods": ("oplora", "lora"), "level": 50.0, "digits": 1, "rates": (1e-3, 1e-2)}
    return front.Gain(scope=Scope(name, unit="points"), values=values, **given | options)


def test_the_first_screen_counts_intervals():
    gains = [gain([1.0, 1.2, 1.1], "a"), gain([-1.0, -1.2, -1.1], "b", rates=(1e-2, 1e-2)),
             gain([-1.0, 0.0, 1.0], "c", costs=[(1e9, 5.0)] * 2)]  # fmt: skip
    text = front.answer(gains)
    assert "beats LoRA in 1 of 3 comparisons [a (points) +1.1 ± 0.2 (3)]" in text
    assert "is behind in 1 [b (points) -1.1 ± 0.2 (3)], and in 1 the seeds do not tell" in text
    assert "What to use: LoRA with a tuned rate" in text
    assert "in fine-tuning OP-LoRA's best is 0.1 times LoRA's" in text
    assert "What to use: OP-LoRA" in front.answer([gains[0]])
    rows = front.which("which", "", gains).frame
    assert rows["best rate"].tolist() == ["0.01 → 0.001", "0.01 → 0.01", "0.01 → 0.001"]
    assert rows["memory, GB"].tolist()[2] == "1.00 → 1.00"


def test_your_runs_are_inside_where_one_more_seed_would_be():
    """Of 59, 60 and 61 one more seed lies within 60 ± 4.303 · √(4/3) = 4.97."""
    published = comparison({"lora": [59.0, 60.0, 61.0], "oplora": [61.0]})
    for value, verdict in ((64.9, "inside"), (65.0, "outside"), (55.1, "inside")):
        mine = comparison({"lora": [value], "oplora": [61.0]})
        table = against.against(against.measured(mine), against.measured(published))
        (row,) = table.rows  # of the other one seed is published: it has no spread
        assert row.cells["yours is"] == verdict and row.cells["range"] == "55.0 to 65.0"
        assert (row.cells["yours"], row.cells["published"]) == (
            f"{value:.1f} (1)",
            "60.0 ± 2.5 (3)",
        )
    other = comparison({"lora": [60.0]}, {"lora": {1e-3: 1.0}})  # at another rate
    assert not against.against(against.measured(other), against.measured(published)).rows


def test_claims_that_would_hold_by_chance():
    def claim(verdict, p):
        finding = Finding(verdict, p=p)
        return claims.Claim.of(finding, text=f"{verdict} {p}", section="1", scope=Scope("m"))

    judged = [claim(HOLDS, 0.01), claim(HOLDS, 0.03), claim(FAILS, 0.5), claim(UNTESTABLE, 0.9)]
    parts = claims.parts(judged)
    (table,) = [p for p in parts if getattr(p, "name", "") == "claims"]
    assert table.frame["p"].tolist() == [
        "0.010 (0.040)", "0.030 (0.090)", "0.500 (1.000)", "0.900 (1.000)",
    ]  # fmt: skip
    text = "4 claims are judged by the interval of a gain. Without any difference 0.1 of them "
    assert text + "would hold by chance; 2 do, and 1 still do after Holm's correction." in parts


def test_every_claim_is_told_even_without_any_run(tmp_path):
    found = report.build(tmp_path).claims
    assert {claim.verdict for claim in found} == {NOT_RUN}
    assert {thesis.text for thesis in claims.GENERAL} <= {claim.text for claim in found}
    assert all(claim.command for claim in found if str(claim.scope) != "—")
    assert all(claim.section and claim.evidence for claim in found)
