"""The rules by which a claim about fine-tuning is judged, one function each.

Differences are taken seed by seed; their mean has a 95% t-interval. A method that is compared
stands at its own best learning rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from oplora.report.comparison import Comparison, good_rates
from oplora.report.statistics import at_shared_steps, mean_interval
from oplora.report.tables import shipped
from oplora.report.titles import title

HOLDS, IN_A_RANGE, FAILS = "holds", "holds in a range", "does not hold"
UNTESTABLE, NOT_RUN = "not testable at this scale", "not run yet"
CURVE_POINTS = 5  # evaluations that tell which curve falls faster
VERDICTS = (HOLDS, IN_A_RANGE, FAILS, UNTESTABLE, NOT_RUN)


@dataclass(frozen=True)
class Finding:
    """What was measured for a claim, and what follows; a command where something is missing."""

    verdict: str
    evidence: str = "—"
    figure: str | None = None
    command: str | None = None
    where: str | None = None  # the learning rates at which it holds, where that is told


def missing(c: Comparison, *methods: str) -> Finding:
    return Finding(NOT_RUN, command=c.command(*methods))


def too_few(gains: Sequence[float], command: str) -> Finding:
    return Finding(NOT_RUN, f"{len(gains)} shared seeds" if gains else "—", command=command)


def better(c: Comparison, method: str, base: str) -> Finding:
    """Is a method better than another?

    Holds: the interval of the difference lies above zero. Does not hold: it lies below zero. Else
    in a range: at two or more neighbouring shared rates the validation loss is lower. Not testable:
    the interval holds both zero and a difference as large as the paper's, or the comparison is
    unfit (its gate does not hold). Fewer than two shared seeds: not run yet.
    """
    gains = c.advantage(method, base)
    if len(gains) < 2:
        return too_few(gains, c.command(base, method))
    mean, half = mean_interval(gains)
    evidence = f"{_gain(method, base)}: {interval(gains, c)} at each one's best rate"
    expected = cited_gain(c, method, base)
    if expected is not None:
        evidence += f" (the paper's: {expected:+.{c.score.digits}f})"
    figure = c.rates_figure
    if c.unfit:
        return Finding(UNTESTABLE, f"{evidence}; {c.unfit}", figure)
    low, high = mean - half, mean + half
    if low > 0:
        return Finding(HOLDS, evidence, figure)
    window = lower_at(c, method, base)
    if len(window) > 1:
        evidence += (
            f"; lower validation loss (seeds of the sweep: {c.sweep_seeds(method, base)}) at the "
            f"same rate from {window[0]:g} to {window[-1]:g}"
        )
        return Finding(FAILS if high < 0 else IN_A_RANGE, evidence, figure)
    if expected is not None and low <= 0 < expected <= high:
        return Finding(UNTESTABLE, evidence + "; the interval holds both", figure)
    return Finding(FAILS, evidence, figure)


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
    """Is the range of good learning rates wider (highest over lowest; within 5% of its own best)?

    Holds or does not: the ranges differ by more than one step of the grid. Else the grid is too
    coarse: not testable. If the narrower range reaches an edge of its grid, a longer grid is
    needed: not run yet.
    """
    if not (c.losses(method) and c.losses(base)):
        return missing(c, base, method)
    mine, theirs = good_rates(c.losses(method)), good_rates(c.losses(base))
    evidence = f"within 5% of its own best: {title(method)} {mine}, {title(base)} {theirs}"
    figure = c.rates_figure
    ratio, step = mine.factor / theirs.factor, 1.5 * max(mine.step, theirs.step)
    narrower = theirs if ratio > 1 else mine
    verdict = HOLDS if ratio > step else FAILS if ratio < 1 / step else UNTESTABLE
    if narrower.open:
        evidence += "; the narrower range reaches the edge of its grid"
        wider = f"{c.rates_command(base, method)} lr=… (wider)"
        return Finding(NOT_RUN, evidence, figure, wider)
    if verdict == UNTESTABLE:
        evidence += "; they differ by no more than a step of the grid"
    return Finding(verdict, evidence, figure)


def sooner(c: Comparison, method: str, base: str) -> Finding:
    """Does a method reach the other's final validation loss earlier, both at their best rates?

    Holds: at an earlier step than the other's last; curves are means over seeds. Not testable:
    fewer than CURVE_POINTS evaluations.
    """
    mine, theirs = loss_curve(c, method), loss_curve(c, base)
    if not mine or not theirs:
        return missing(c, base, method)
    last, goal = theirs[-1]
    first = next((step for step, loss in mine if loss <= goal), None)
    reached = "never" if first is None else f"at step {first}"
    evidence = f"{title(base)}'s final validation loss ({goal:.3f}, step {last}): {reached}"
    if len(theirs) < CURVE_POINTS:
        evidence += f"; evaluated {len(theirs)} times only"
        return Finding(UNTESTABLE, evidence, f"{c.name}_curves")
    verdict = HOLDS if first is not None and first < last else FAILS
    return Finding(verdict, evidence, f"{c.name}_curves")


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


def loss_curve(c: Comparison, method: str) -> list[tuple[int, float]]:
    """Mean over seeds of (step, validation loss) at the method's best rate."""
    curves = [r.metrics.get("validation_loss") for r in c.at_best.get(method, [])]
    steps, losses = at_shared_steps([curve for curve in curves if curve])
    return list(zip(steps, losses.mean(0).tolist(), strict=True)) if steps else []


def _gain(method: str, base: str) -> str:
    return f"gain of {title(method)} over {title(base)}"


def interval(gains: list[float], c: Comparison) -> str:
    """Mean and 95% interval of differences, in the comparison's unit."""
    mean, half = mean_interval(gains)
    digits = c.score.digits
    if half is None:
        return f"{mean:+.{digits}f} {c.score.unit} (one seed)"
    return f"{mean:+.{digits}f} ± {half:.{digits}f} {c.score.unit} ({len(gains)} seeds)"


def _metric(c: Comparison, method: str, key: str) -> float | None:
    values = [r.metrics[key] for r in c.records_of(method) if key in r.metrics]
    return min(values, default=None)
