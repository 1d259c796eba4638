"""Means with intervals, over seeds and over items."""

import math
from collections.abc import Sequence
from functools import cache

import numpy
from scipy import stats


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


def shown(values: Sequence[float], digits: int) -> str | None:
    """ "71.2 ± 0.8 (3)": mean, half-width and number of values; None where there is none."""
    if len(values) == 0:
        return None
    mean, half = mean_interval(values)
    if half is None:
        return f"{mean:.{digits}f} (1)"
    return f"{mean:.{digits}f} ± {half:.{digits}f} ({len(values)})"


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
