"""The rules by which a claim about fine-tuning is judged, one function each.

Differences are taken seed by seed; their mean has a 95% t-interval. A method that is compared
stands at its own best learning rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from oplora.harness.runs import Record
from oplora.report.comparison import NOTHING_LEARNED, Comparison
from oplora.report.rates import GOOD, good_rates, loss_at
from oplora.report.statistics import (
    MOST_SEEDS,
    at_shared_steps,
    mean_height,
    mean_interval,
    p_value,
    seeds_needed,
)
from oplora.report.tables import shipped
from oplora.report.titles import title

HOLDS, EQUAL_RATES, FAILS = "holds", "only at equal rates", "does not hold"
UNTESTABLE, NOT_RUN = "not testable at this scale", "not run yet"
CURVE_POINTS = 5  # evaluations that tell which curve falls faster
RANGE_SEEDS = 3  # at each rate, of what is said about a range of them
# the paper's: a method and what it improves
PAIRS = {"oplora": "lora", "opdora": "dora", "opvera": "vera"}
VERDICTS = (HOLDS, EQUAL_RATES, FAILS, UNTESTABLE, NOT_RUN)


@dataclass(frozen=True)
class Finding:
    """What was measured for a claim, and what follows; a command where something is missing."""

    verdict: str
    evidence: str = "—"
    figure: str | None = None
    command: str | None = None
    where: str | None = None  # the learning rates at which it holds, where that is told
    p: float | None = None  # of a gain's two-sided test


def missing(c: Comparison, *methods: str) -> Finding:
    return Finding(NOT_RUN, command=c.command(*methods))


def too_few(gains: Sequence[float], command: str) -> Finding:
    return Finding(NOT_RUN, f"{len(gains)} shared seeds" if gains else "—", command=command)


def nothing_learned(c: Comparison, *methods: str) -> bool:
    """Were these methods swept, and no adapter is clearly better than the base model?"""
    return not c.learns and set(methods) <= set(c.chosen)


def better(c: Comparison, method: str, base: str) -> Finding:
    """Is a method better than another?

    Holds: the interval of the difference lies above zero. Does not hold: it lies below zero. Else
    only at equal rates: at two or more neighbouring shared rates the validation loss is lower, with
    RANGE_SEEDS seeds at each. Not testable: the interval holds both zero and a difference as large
    as the paper's (or the paper has none), or the comparison is unfit (its gate does not hold, or
    no adapter learned anything). Else it does not hold. Fewer than two shared seeds: not run yet.
    """
    if nothing_learned(c, method, base):
        return Finding(UNTESTABLE, NOTHING_LEARNED, c.rates_figure)
    gains = c.advantage(method, base)
    if len(gains) < 2:
        return too_few(gains, c.command(base, method))
    mean, half = mean_interval(gains)
    evidence = f"{_gain(method, base)}: {interval(gains, c)} at each one's best rate"
    expected = cited_gain(c, method, base)
    if expected is not None:
        evidence += f" (the paper's: {expected:+.{c.score.digits}f}"
        evidence += f"; {needed(gains, expected)} would show it)" if expected > 0 else ")"
    p = p_value(gains)
    window = lower_at(c, method, base)
    seeds = c.sweep_seeds(window, method, base) if len(window) > 1 else 0
    if len(window) > 1 and not c.unfit:
        evidence += f"; lower validation loss at the same rate from {window[0]:g} to {window[-1]:g}"
        evidence += f" ({few(seeds)})" if seeds < RANGE_SEEDS else f" ({seeds} seeds each)"

    low, high = mean - half, mean + half
    if c.unfit:
        verdict, evidence = UNTESTABLE, f"{evidence}; {c.unfit}"
    elif low > 0 or high < 0:
        verdict = HOLDS if low > 0 else FAILS
    elif seeds >= RANGE_SEEDS:
        verdict = EQUAL_RATES
    elif expected is None or 0 < expected <= high:
        verdict = UNTESTABLE
    else:
        verdict = FAILS
    return Finding(verdict, evidence, c.rates_figure, p=p)


def needed(gains: Sequence[float], effect: float) -> str:
    """ "21 seeds": how many would show an effect, at these differences' spread."""
    seeds = seeds_needed(effect, float(numpy.std(gains, ddof=1)))
    return f"{seeds} seeds" if seeds else f"over {MOST_SEEDS:,} seeds"


def few(seeds: int) -> str:
    return f"{'one seed' if seeds == 1 else f'{seeds} seeds'} only: does not count"


def not_worse(c: Comparison, method: str, base: str) -> Finding:
    """Is a method at least as good as another?

    Holds: the mean difference is not negative. Does not hold: the interval lies below zero. Else
    the seeds cannot tell, or the comparison is unfit: not testable.
    """
    gains = c.advantage(method, base)
    return _not_worse(c, gains, _gain(method, base), c.command(base, method))


def half_the_rank(c: Comparison, method: str, base: str) -> Finding:
    """Is a method at half of the other's rank at least as good (same rule as `not_worse`)?"""
    gains = c.gains(c.scores_at(method, rank=c.rank / 2), c.scores(base))
    what = f"gain of {title(method)} at rank {c.rank // 2} over {title(base)} at rank {c.rank}"
    return _not_worse(c, gains, what, c.command(base, method, sweep="rank"))


def _not_worse(c: Comparison, gains: list[float], what: str, command: str) -> Finding:
    if len(gains) < 2:
        return too_few(gains, command)
    text = f"{what}: {interval(gains, c)}"
    mean, half = mean_interval(gains)
    if c.unfit:
        return Finding(UNTESTABLE, f"{text}; {c.unfit}")
    if mean >= 0:
        return Finding(HOLDS, text)
    return Finding(FAILS if mean + half < 0 else UNTESTABLE, text)


def less_sensitive(c: Comparison, method: str, base: str) -> Finding:
    """Is the range of good learning rates wider (highest over lowest)?

    A rate is good if it reaches GOOD of the gain from the base model's loss to that of the best
    tuned adapter. Holds or does not: the ranges differ by more than one step of the grid. Else the
    grid is too coarse, or nothing was learned: not testable. Not run yet: the base model's loss is
    not known, a rate has fewer than RANGE_SEEDS seeds, or the narrower range reaches an edge of its
    grid.
    """
    if not (c.losses(method) and c.losses(base)):
        return missing(c, base, method)
    if c.base_loss is None:
        return Finding(NOT_RUN, "no run has the base model's loss", command=c.base_command)
    if nothing_learned(c, method, base):
        return Finding(UNTESTABLE, NOTHING_LEARNED, c.rates_figure)
    bound, figure = loss_at(GOOD, c.base_loss, c.best_loss), c.rates_figure
    mine, theirs = good_rates(c.losses(method), bound), good_rates(c.losses(base), bound)
    evidence = f"rates that reach {GOOD:.0%} of the gain: {title(method)} {mine}, {title(base)} "
    evidence += str(theirs)
    command = c.rates_command(base, method)
    seeds = min(c.sweep_seeds(found.grid, m) for m, found in ((method, mine), (base, theirs)))
    if seeds < RANGE_SEEDS:
        command += f" seed={','.join(map(str, range(RANGE_SEEDS)))}"
        return Finding(NOT_RUN, f"{evidence}; {few(seeds)}", figure, command)
    narrower, wider = sorted((mine, theirs), key=lambda found: found.factor)
    if narrower.open:
        evidence += "; the narrower range reaches the edge of its grid"
        return Finding(NOT_RUN, evidence, figure, f"{command} lr=… (wider)")
    if wider.factor > 1.5 * max(mine.step, theirs.step) * narrower.factor:
        return Finding(HOLDS if wider is mine else FAILS, evidence, figure)
    return Finding(UNTESTABLE, f"{evidence}; they differ by no more than a step", figure)


def faster(c: Comparison, method: str, base: str) -> Finding:
    """Is the area under the validation curve smaller, to the same number of steps?

    Areas are divided by the steps: a gain is a difference of mean losses on the same seed. Holds:
    its interval lies above zero, each at its own best rate. Only at equal rates: not so, but with
    RANGE_SEEDS seeds at the other's best rate. Does not hold: it lies below zero. Not testable: the
    seeds do not tell, nothing was learned, or a curve has fewer than CURVE_POINTS evaluations.
    """
    if nothing_learned(c, method, base):
        return Finding(UNTESTABLE, NOTHING_LEARNED, c.rates_figure)
    best = [c.seed_runs(m, c.chosen[m]) if m in c.chosen else {} for m in (method, base)]
    gains, points = area_gains(c, *best)
    if len(gains) < 2:
        return Finding(NOT_RUN, command=c.command(base, method))
    figure, p = f"{c.name}_curves", p_value(gains)
    evidence = f"mean height of the validation curve, {_gain(method, base)}: {signed(gains)}"
    evidence += " at each one's best rate"
    if points < CURVE_POINTS:
        return Finding(UNTESTABLE, f"{evidence}; evaluated {points} times only", figure, p=p)
    rate = c.chosen[base]
    equal, _ = area_gains(c, c.seed_runs(method, rate), best[1])
    if rate != c.chosen[method] and len(equal) > 1:
        evidence += f"; {signed(equal)} at the same rate {rate:g}"
    mean, half = mean_interval(gains)
    if abs(mean) > half:
        return Finding(HOLDS if mean > 0 else FAILS, evidence, figure, p=p)
    if len(equal) >= RANGE_SEEDS:
        mean, half = mean_interval(equal)
        if mean > half:
            return Finding(EQUAL_RATES, evidence, figure, p=p)
    return Finding(UNTESTABLE, evidence, figure, p=p)


def area_gains(
    c: Comparison, mine: dict[int, Record], theirs: dict[int, Record]
) -> tuple[list[float], int]:
    """For every seed that both have, and the number of evaluations that they share."""
    gains, points = [], 0
    for seed in sorted(mine.keys() & theirs.keys()):
        curves = [r.metrics.get("validation_loss") or [] for r in (mine[seed], theirs[seed])]
        steps, losses = at_shared_steps(curves)
        points = len(steps)
        if points > 1:
            gains.append(mean_height(list(zip(steps, losses[1] - losses[0], strict=True))))
    return gains, points


def best_seed(c: Comparison, method: str, base: str) -> Finding:
    """Is the best seed better than the other's best (at least two seeds each)?"""
    scores = [c.scores(m).values() for m in (method, base)]
    if min(map(len, scores)) < 2:
        return missing(c, base, method)
    mine, theirs = map(max if c.score.higher else min, scores)
    evidence = f"best seed: {title(method)} {mine:.2f}, {title(base)} {theirs:.2f} {c.score.unit}"
    return Finding(HOLDS if c.sign * (mine - theirs) > 0 else FAILS, evidence)


def inverted_u(c: Comparison, method: str) -> Finding:
    """Does the score rise and fall with the MLP's width?

    Holds: the best width lies inside, and its intervals over both ends above zero. Not testable:
    inside, but not clearly. Does not hold: the best width is an end. Needs three widths.
    """
    by_width, (means, evidence) = c.by_width(method), _by_width(c, method)
    if len(means) < 3:
        return _no_widths(c, method)
    best, ends = max(means, key=lambda width: c.sign * means[width]), (min(means), max(means))
    figure = f"{c.name}_width"
    if best in ends:
        return Finding(FAILS, f"{evidence}; the best is an end", figure)
    for end in ends:
        gains = c.gains(by_width[best], by_width[end])
        mean, half = mean_interval(gains) if gains else (0.0, None)
        if half is None or mean - half <= 0:
            return Finding(UNTESTABLE, f"{evidence}; width {end} is not clearly worse", figure)
    return Finding(HOLDS, evidence, figure)


def flat_beyond_one(c: Comparison, method: str) -> Finding:
    """Is a width of 1 too little and the rest flat?

    Holds: width 1 is the worst, by more than all others differ. Needs three widths and width 1.
    """
    means, evidence = _by_width(c, method)
    if len(means) < 3 or 1 not in means:
        return _no_widths(c, method)
    wider = [c.sign * mean for width, mean in means.items() if width > 1]
    holds = min(wider) - c.sign * means[1] > max(wider) - min(wider)
    return Finding(HOLDS if holds else FAILS, evidence, f"{c.name}_width")


def _by_width(c: Comparison, method: str) -> tuple[dict[int, float], str]:
    """Mean score by the MLP's width, and that in words."""
    found = c.by_width(method).items()
    means = {width: mean_interval(list(scores.values()))[0] for width, scores in found}
    return means, "; ".join(f"width {width}: {mean:.2f}" for width, mean in means.items())


def _no_widths(c: Comparison, method: str) -> Finding:
    return Finding(NOT_RUN, command=c.command(method, sweep="mlp_width"))


def ships_the_same(c: Comparison, method: str, base: str) -> Finding:
    """Are as many parameters shipped (the test-suite holds that stock PEFT loads them)?"""
    runs = [c.records_of(m) for m in (method, base)]
    if not all(runs):
        return missing(c, base, method)
    counts = [shipped(found[0]) for found in runs]
    evidence = f"shipped parameters: {title(method)} {counts[0]}, {title(base)} {counts[1]}"
    return Finding(HOLDS if counts[0] == counts[1] else FAILS, evidence)


def width_times(c: Comparison, method: str) -> Finding:
    """Are the MLP's parameters `width` times the adapter's, within 15%?"""
    mlp, adapter = (_metric(c, method, f"{part}_parameters") for part in ("mlp", "adapter"))
    if mlp is None:
        return missing(c, method)
    width, ratio = c.records_of(method)[0].config["mlp_width"], mlp / adapter
    evidence = f"width {width}: {ratio:.1f} times the adapter's parameters"
    return Finding(HOLDS if abs(ratio / width - 1) <= 0.15 else FAILS, evidence)


def quicker(c: Comparison, method: str, *others: str) -> Finding:
    """Does training take less wall time than with each of the others (shortest of the runs)?"""
    seconds = {m: _metric(c, m, "train_seconds") for m in (method, *others)}
    run = {m: s for m, s in seconds.items() if s is not None}
    if method not in run or len(run) < 2:
        return missing(c, method, *others)
    evidence = "; ".join(f"{title(m)} {s:.0f} s" for m, s in run.items())
    ahead = run.pop(method) < min(run.values())
    return Finding(HOLDS if ahead else FAILS, evidence)


def cited_gain(c: Comparison, method: str, base: str) -> float | None:
    """The paper's difference: in points, or for distances the same fraction of the one here."""
    if method not in c.cited or base not in c.cited:
        return None
    if c.score.higher:
        return c.cited[method] - c.cited[base]
    here = mean_interval(list(c.scores(base).values()))[0]
    return here * (c.cited[base] - c.cited[method]) / c.cited[base]


def lower_at(c: Comparison, method: str, base: str) -> list[float]:
    """The longest run of neighbouring shared rates at which the validation loss is lower."""
    mine, theirs = c.losses(method), c.losses(base)
    best: list[float] = []
    window: list[float] = []
    for rate in sorted(mine.keys() & theirs.keys()):
        window = [*window, rate] if mine[rate] < theirs[rate] else []
        best = max(best, window, key=len)
    return best


def _gain(method: str, base: str) -> str:
    return f"gain of {title(method)} over {title(base)}"


def interval(gains: Sequence[float], c: Comparison) -> str:
    """Mean and 95% interval of differences, in the comparison's unit."""
    return signed(gains, c.score.digits, f" {c.score.unit}")


def signed(gains: Sequence[float], digits: int = 3, unit: str = "") -> str:
    """ "+1.9 ± 0.6 points (3 seeds)" """
    mean, half = mean_interval(gains)
    if half is None:
        return f"{mean:+.{digits}f}{unit} (one seed)"
    return f"{mean:+.{digits}f} ± {half:.{digits}f}{unit} ({len(gains)} seeds)"


def _metric(c: Comparison, method: str, key: str) -> float | None:
    values = [r.metrics[key] for r in c.records_of(method) if key in r.metrics]
    return min(values, default=None)
