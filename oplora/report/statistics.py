"""Means with intervals, over seeds and over items."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache

import numpy
from scipy import stats
from scipy.integrate import trapezoid

POWER, MOST_SEEDS = 0.8, 1000


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and the half-width of its 95% t-interval (None for a single value)."""
    values = numpy.asarray(values, float)
    n = len(values)
    if n == 0:
        raise ValueError("no values to average")
    if n == 1 or not numpy.isfinite(values).all():  # a run that diverged is infinite
        return float(values.mean()), None
    return float(values.mean()), t95(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)


@cache
def t95(degrees: int) -> float:
    """The two-sided 95% quantile of Student's t, to the three decimals that are tabulated."""
    return round(float(stats.t.ppf(0.975, degrees)), 3)


def p_value(differences: Sequence[float]) -> float:
    """Of a two-sided t-test of their mean against zero; needs two."""
    if len(set(differences)) == 1:  # no spread: no test
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The same after Holm's correction for as many tests."""
    p = numpy.asarray(p_values, float)
    order = p.argsort()
    adjusted = numpy.maximum.accumulate(p[order] * numpy.arange(len(p), 0, -1)).clip(max=1)
    return adjusted[order.argsort()].tolist()


def seeds_needed(effect: float, spread: float, paired: bool = True) -> int | None:
    """With how many seeds (of each) a t-test at 5% sees an effect in POWER of the cases.

    spread: standard deviation over seeds, paired: of the differences. None: over MOST_SEEDS.
    """
    if spread == 0:
        return 2

    def sees(n: int) -> bool:
        degrees, shift = (n - 1, n**0.5) if paired else (2 * n - 2, (n / 2) ** 0.5)
        return stats.nct.sf(t95(degrees), degrees, shift * effect / spread) >= POWER

    return 2 + bisect_left(range(2, MOST_SEEDS + 1), True, key=sees) if sees(MOST_SEEDS) else None


def smallest_effect(spread: float, seeds: int) -> float:
    """That as many paired seeds see in POWER of the cases."""
    power = float(stats.t.ppf(POWER, seeds - 1))
    return (t95(seeds - 1) + power) * spread / math.sqrt(seeds)


def mean_height(curve: Sequence[tuple[float, float]]) -> float:
    """The area under (x, y) divided by its width."""
    x, y = numpy.array(curve, float).T
    return float(trapezoid(y, x) / (x[-1] - x[0]))


def ahead(values: Sequence[float]) -> int:
    """Of differences. 1: the 95% interval lies above zero, -1: below, 0: it holds zero."""
    mean, half = mean_interval(values)
    return (mean - half > 0) - (mean + half < 0)


def shown(values: Sequence[float], digits: int, sign: str = "") -> str | None:
    """ "71.2 ± 0.8 (3)": mean, half-width and number of values; None where there is none.

    sign: "+" for differences.
    """
    if len(values) == 0:
        return None
    mean, half = mean_interval(values)
    if half is None:
        return f"{mean:{sign}.{digits}f} (1)"
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f} ({len(values)})"


def at_shared_steps(
    curves: Sequence[Sequence[tuple[float, float]]],
) -> tuple[list[float], numpy.ndarray]:
    """Steps at which all curves of (step, value) have a value, and these values (curves, steps)."""
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    return steps, numpy.array([[table[step] for step in steps] for table in tables])


def paired_bootstrap(
    differences: Sequence[float], weights: Sequence[float] | None = None, draws: int = 2000
) -> tuple[float, float, float]:
    """(Weighted) mean of differences over shared items, and its 95% bootstrap interval."""
    differences = numpy.asarray(differences, float)
    weights = numpy.ones_like(differences) if weights is None else numpy.asarray(weights, float)
    picks = numpy.random.default_rng(0).integers(len(differences), size=(draws, len(differences)))
    means = (differences * weights)[picks].sum(1) / weights[picks].sum(1)
    low, high = numpy.quantile(means, [0.025, 0.975])
    return float((differences * weights).sum() / weights.sum()), float(low), float(high)
