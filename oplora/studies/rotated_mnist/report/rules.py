"""The claims of the second text's section on rotated MNIST, and the rules that judge them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy

from oplora.harness.runs import Record
from oplora.report import rules, titles
from oplora.report.claims import Claim, Thesis, better
from oplora.report.comparison import Comparison
from oplora.report.rules import EQUAL_RATES, FAILS, HOLDS, NOT_RUN, UNTESTABLE, Finding
from oplora.report.statistics import mean_interval
from oplora.report.titles import title
from oplora.studies.rotated_mnist.report.members import PROJECTION, Batch, command

ORDERS = (2, 3)  # of magnitude below the best rate
MOST = 0.5  # of the fall of the loss at the best rate: where that is left, the loss is low


def lower_everywhere(c: Comparison, method: str, base: str) -> Finding:
    """Is the mean loss lower at every rate at which neither diverges?

    Only at equal rates: at two or more neighbouring ones.
    """
    mine, theirs = c.losses(method), c.losses(base)
    if not mine or not theirs:
        return rules.missing(c, base, method)
    both = [r for r in mine.keys() & theirs.keys() if max(mine[r], theirs[r]) < numpy.inf]
    lower = [r for r in both if mine[r] < theirs[r]]
    evidence = f"at {len(lower)} of the {len(both)} rates at which neither diverges"
    if len(lower) == len(both):
        return Finding(HOLDS, evidence, c.rates_figure, where="the whole grid")
    window = rules.lower_at(c, method, base)
    if len(window) < 2:
        return Finding(FAILS, evidence, c.rates_figure)
    where = f"rates {window[0]:g} to {window[-1]:g}"
    return Finding(EQUAL_RATES, evidence, c.rates_figure, where=where)


def kept(c: Comparison, method: str) -> list[float]:
    """Which share of its best rate's fall a method's loss has, ORDERS of magnitude below it.

    At the nearest rates of the grid; of those below the grid there is none.
    """
    losses, base = c.losses(method), c.runs_of(method)[0].metrics["base_loss"]
    best = c.chosen[method]
    found = []
    for wanted in (best / 10**orders for orders in ORDERS):
        nearest = min(losses, key=lambda rate: abs(numpy.log(rate / wanted)))
        if numpy.isclose(nearest, wanted, rtol=0.5):
            found.append((base - losses[nearest]) / (base - losses[best]))
    return found


def stays_low(c: Comparison, method: str, base: str) -> Finding:
    """Does the loss keep MOST of its fall at rates ORDERS of magnitude below the best one?

    Only at equal rates: at the first of them only. Not run yet: the grid does not reach so far.
    """
    if not {method, base} <= c.sweep.keys():
        return rules.missing(c, base, method)
    shares = {m: kept(c, m) for m in (method, base)}
    told = [
        f"{title(m)} {' and '.join(f'{share:.0%}' for share in each)}" for m, each in shares.items()
    ]
    evidence = (
        f"of the fall at its own best rate there remain, 10^{ORDERS[0]} and 10^{ORDERS[1]} times "
        f"lower: {', '.join(told)}"
    )
    low = [share >= MOST for share in shares[method]]
    if len(low) < len(ORDERS):
        return Finding(NOT_RUN, evidence, c.rates_figure, c.rates_command(base, method))
    if all(low):
        return Finding(HOLDS, evidence, c.rates_figure)
    if low[0]:
        where = f"10^{ORDERS[0]} times below the best rate"
        return Finding(EQUAL_RATES, evidence, c.rates_figure, where=where)
    return Finding(FAILS, evidence, c.rates_figure)


def steeper(c: Comparison, method: str, base: str) -> Finding:
    """Is |vᵀg| larger at the end, each at its best rate?

    By the interval of the difference; not testable if it holds both zero and the paper's own.
    """
    gains = c.advantage(method, base)
    if len(gains) < 2:
        return rules.too_few(gains, c.command(base, method))
    means = [mean_interval(list(c.scores(m).values()))[0] for m in (method, base)]
    mean, half = mean_interval(gains)
    expected = rules.cited_gain(c, method, base)
    evidence = (
        f"{title(method)} {means[0]:.2f}, {title(base)} {means[1]:.2f}; difference "
        f"{mean:+.2f} ± {half:.2f} ({len(gains)} seeds; the paper's: {expected:+.2f})"
    )
    figure = f"{c.name}_projection"
    if mean - half > 0:
        return Finding(HOLDS, evidence, figure)
    unclear = mean - half <= 0 and mean + half >= expected
    return Finding(UNTESTABLE if unclear else FAILS, evidence, figure)


def bounds(of_weight: float, of_factor: float) -> tuple[float, float]:
    """Between what κ(H_A) lies if κ(H) and κ(B) are these (second text, Eq. 3)."""
    square = of_factor**2
    return max(of_weight / square, square / of_weight), square * of_weight


def within_bounds(runs: Sequence[Record]) -> tuple[int, int, int]:
    """For how many members κ(H_A) keeps Eq. 3's lower and its upper bound, and of how many."""
    lower = upper = count = 0
    for run in runs:
        numbers = run.metrics["condition_numbers"]
        for of_weight, of_factor, found in zip(
            *(numbers[name] for name in ("H_W", "B", "H_A")), strict=True
        ):
            low, high = bounds(of_weight, of_factor)
            lower, upper, count = lower + (found >= low), upper + (found <= high), count + 1
    return lower, upper, count


def bracketed(batch: Batch) -> Finding:
    """Does κ(H_A) lie between Eq. 3's bounds for every method and seed that was measured?"""
    runs = measured(batch)
    if not runs:
        return Finding(NOT_RUN, command=command(batch.preset, "lora", "oplora"))
    lower, upper, count = within_bounds(runs)
    evidence = f"lower bound kept by {lower}, upper bound by {upper} of {count} (output layer)"
    return Finding(HOLDS if lower == upper == count else FAILS, evidence)


def measured(batch: Batch) -> list[Record]:
    """The runs with condition numbers: those of LoRA's form."""
    return [run for run in batch.runs.values() if "condition_numbers" in run.metrics]


PAIR = ("oplora", "lora")
THESES = (
    better("Rotated MNIST: OP-LoRA's best training loss is lower than LoRA's", "2nd text, Fig. 2a",
           *PAIR),
    Thesis("Rotated MNIST: across rates OP-LoRA's training loss is lower", "2nd text, Fig. 2a",
           lower_everywhere, PAIR),
    Thesis("Rotated MNIST: OP-LoRA's loss stays low two to three orders below its best rate",
           "2nd text, Fig. 2a", stays_low, PAIR),
    Thesis("Rotated MNIST: OP-LoRA is less sensitive to the learning rate", "2nd text, Fig. 2a",
           rules.less_sensitive, PAIR),
)  # fmt: skip
STEEPER = Thesis(
    "Rotated MNIST: OP-LoRA ends with more gradient along the steepest direction (|vᵀg|)",
    "2nd text, Table 5", steeper, PAIR,
)  # fmt: skip
EQ3, EQ3_AT = "Rotated MNIST: κ(H_A) lies between the bounds of Eq. 3", "2nd text, Eq. 3"


def claims(batches: Sequence[Batch]) -> list[Claim]:
    """Of every preset, run or not."""
    by_preset = {batch.preset: batch for batch in batches}
    found = []
    for preset in dict.fromkeys([*titles.presets("rotated_mnist"), *by_preset]):
        scope = titles.preset("rotated_mnist", preset)
        if batch := by_preset.get(preset):
            judged = [claim for thesis in THESES for claim in thesis.claims([batch.comparison])]
            judged += STEEPER.claims([batch.compare(PROJECTION)])
            runs = measured(batch)
            judged.append(
                Claim.of(bracketed(batch), text=EQ3, section=EQ3_AT, scope=scope, runs=runs)
            )
            found += [replace(claim, scope=scope) for claim in judged]
        else:
            missing = Finding(NOT_RUN, command=command(preset, *PAIR[::-1]))
            text = "All claims on rotated MNIST"
            found.append(Claim.of(missing, text=text, section="2nd text", scope=scope))
    return found
