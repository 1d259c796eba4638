"""What it costs not to tune the learning rate: every method at one rate for all settings.

A setting is a fine-tuning experiment whose base model's loss is known and whose learning rates
were swept. The price of a run is the part of the gain, from the base model's validation loss to
the best adapter's, that it misses: 0 for the best adapter at its best rate, 1 for no training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from matplotlib.figure import Figure

from oplora.report.comparison import Comparison, one_per_scale
from oplora.report.page import Missing, Part, ReportFigure, Row, Statement, Table
from oplora.report.style import style
from oplora.report.titles import in_order, method, method_of, title

WITHIN = (0.05, 0.1, 0.25)  # of the gain
ENOUGH = 2  # settings that a method needs to be listed
ONE_RATE = (
    "Every method at one learning rate for all settings, the one with its lowest mean price: the "
    "part of the gain from the base model's validation loss to the best adapter's that is missed. "
    "All rates are chosen on these same runs, for every method alike; mean and worst are over the "
    "settings that it has; OP with each setting's own width of the MLP."
)
WHOLE_GRID = (
    "Every rate of a method's grids: the share of them within a price, mean over settings, and the "
    "mean price, of which no rate counts more than 100% (as bad as no training)."
)


@dataclass(frozen=True)
class Price:
    """Of one method: setting → learning rate → the part of the gain that is missed."""

    method: str
    by_setting: dict[str, dict[float, float]]

    @cached_property
    def shared(self) -> dict[float, list[float]]:
        """Learning rate → prices of all settings, of rates that all of them have."""
        rates = set.intersection(*map(set, self.by_setting.values()))
        return {r: [found[r] for found in self.by_setting.values()] for r in sorted(rates)}

    @cached_property
    def rate(self) -> float | None:
        """With the lowest mean price."""
        return min(self.shared, key=lambda rate: fmean(self.shared[rate]), default=None)

    @property
    def at_one_rate(self) -> list[float]:
        return self.shared[self.rate]

    def within(self, price: float) -> float:
        """Share of the rates that cost at most this, mean over settings."""
        return fmean(fmean(p <= price for p in v.values()) for v in self.by_setting.values())

    @property
    def mean(self) -> float:
        """Over all rates."""
        return fmean(fmean(min(p, 1) for p in v.values()) for v in self.by_setting.values())


def settings(comparisons: Sequence[Comparison], preset: str) -> dict[str, Comparison]:
    """Those of a preset whose price can be told, by what tables call them."""
    known = [c for c in one_per_scale(comparisons) if c.own_sweep and c.base_loss is not None]
    return {c.scope.column: c for c in known if c.preset == preset}


def prices(found: dict[str, Comparison]) -> list[Price]:
    """Of every adapter in several settings: those in most, with the lowest price, first."""
    names = in_order(m for c in found.values() for m in c.sweep if method(m).role != "full")
    every = [
        Price(m, {name: price_of(c, m) for name, c in found.items() if m in c.sweep}) for m in names
    ]
    usable = [p for p in every if len(p.by_setting) >= ENOUGH and p.rate is not None]
    return sorted(usable, key=lambda p: (-len(p.by_setting), fmean(p.at_one_rate)))


def price_of(c: Comparison, method: str) -> dict[float, float]:
    """Learning rate → the part of the gain that is missed; infinite where a run diverged."""
    gain = c.base_loss - c.best_loss
    return {rate: (loss - c.best_loss) / gain for rate, loss in c.losses(method).items()}


def parts(comparisons: Sequence[Comparison]) -> list[Part]:
    """Of every preset that has two settings a sentence, a figure and both tables."""
    shown: list[Part] = []
    for preset in sorted({c.preset for c in comparisons}):
        found = settings(comparisons, preset)
        listed, name = prices(found), f"price_{preset}"
        if listed:
            shown += [
                Statement(name, sentence(listed, found)),
                drawn(name, listed),
                Table(f"{name}_one_rate", ONE_RATE, [_one_rate(p, found) for p in listed]),
                Table(f"{name}_grid", WHOLE_GRID, [_whole_grid(p, found) for p in listed]),
            ]
    return shown


def seeds(price: Price, found: dict[str, Comparison]) -> int:
    """How many at least its one rate was run with."""
    mine = [c for name, c in found.items() if name in price.by_setting]
    return min(len(c.sweep[price.method][price.rate]) for c in mine)


def sentence(listed: Sequence[Price], found: dict[str, Comparison]) -> str:
    """The best at one rate of those that have all settings, beside LoRA."""
    told = [p for p in listed if p is listed[0] or p.method == "lora"]
    each = [
        f"{title(p.method)} at {p.rate:g} misses {_percent(fmean(p.at_one_rate))} of the gain "
        f"(worst setting {_percent(max(p.at_one_rate))})"
        for p in told
    ]
    fewest = min(seeds(p, found) for p in told)
    by = "one seed" if fewest == 1 else f"{fewest} seeds"
    return f"Without tuning, at one rate for all {len(found)} settings: {'; '.join(each)} ({by})."


def drawn(name: str, listed: Sequence[Price]) -> ReportFigure:
    """Every rate of every setting as a dot, the best one rate's mean as a star."""
    figure = Figure(figsize=(8, 0.8 + 0.32 * len(listed)))
    axis = figure.subplots()
    for y, price in enumerate(reversed(listed)):
        dots = [100 * min(p, 1) for v in price.by_setting.values() for p in v.values()]
        color = style(price.method).color
        axis.plot(dots, [y] * len(dots), "o", color=color, ms=5, alpha=0.35, mew=0)
        axis.plot(100 * min(fmean(price.at_one_rate), 1), y, "*", color=color, ms=12)
    names = [f"{title(p.method)} at {p.rate:g}" for p in reversed(listed)]
    axis.set_yticks(range(len(listed)), names)
    axis.set(xlabel="missed part of the gain, % (100: no better than untrained)", xlim=(-2, 102))
    axis.spines[["top", "right"]].set_visible(False)
    caption = (
        "The price of not tuning. Dots: every rate of every setting; stars: the mean over settings "
        f"at one rate for all, the method's best. Least: {names[-1]}."
    )
    return ReportFigure(name, caption, figure)


def _one_rate(price: Price, found: dict[str, Comparison]) -> Row:
    mine = price.by_setting
    cells = {"method": title(price.method), "rate": f"{price.rate:g}"}
    for name, c in found.items():
        missing = Missing(c.rates_command(price.method))
        cells[name] = _percent(mine[name][price.rate]) if name in mine else missing
    cells |= {
        "mean": _percent(fmean(price.at_one_rate)),
        "worst": _percent(max(price.at_one_rate)),
        "settings": len(mine),
        "seeds": seeds(price, found),
    }
    return Row(cells, _runs(price, found))


def _whole_grid(price: Price, found: dict[str, Comparison]) -> Row:
    cells = {"method": title(price.method)}
    cells |= {f"within {share:.0%}": f"{price.within(share):.0%}" for share in WITHIN}
    cells |= {"mean price": _percent(price.mean), "settings": len(price.by_setting)}
    return Row(cells, _runs(price, found))


def _runs(price: Price, found: dict[str, Comparison]) -> list:
    every = (r for c in found.values() for r in c.sweep_runs)
    return [r for r in every if method_of(r) == price.method]


def _percent(price: float) -> str:
    return "diverged" if math.isinf(price) else f"{price:.0%}"
