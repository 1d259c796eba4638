"""What it costs not to tune the learning rate: every method at one rate for all settings.

A setting is a fine-tuning experiment whose base model's loss is known, whose learning rates were
swept, and in which something was learned. The price of a run is the part of the gain, from the base
model's validation loss to the best adapter's, that it misses: 0 for the best adapter at its best
rate, 1 for no training. In training loss it is the price of optimizing badly; on held-out data what
generalizes badly comes on top.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

from matplotlib.figure import Figure

from oplora.harness.runs import Record
from oplora.report.comparison import Comparison, one_per_scale
from oplora.report.page import Missing, Part, ReportFigure, Row, Statement, Table
from oplora.report.rates import by_seed, shared_seeds, trained
from oplora.report.style import style
from oplora.report.titles import by_method, in_order, method, method_of, title

WITHIN = (0.05, 0.1, 0.25)  # of the gain
ENOUGH = 2  # settings that a method needs to be listed
ONE_RATE = (
    "Every method at one learning rate for all settings, the one with its lowest mean price: the "
    "part of the gain from the base model's validation loss to the best adapter's that is missed. "
    "All rates are chosen on these same runs, for every method alike; mean and worst are over the "
    "settings that it has. The width of the MLP acts as a learning rate, too: where settings have "
    "different ones, a second row has the same width everywhere."
)
IN_TRAINING = (
    "The same in training loss, the mean of the last fifth of what was logged, from the highest "
    "first loss of any method's lowest rate to the best adapter's. All methods see the same "
    "batches, so this is optimization alone: what is cheaper here than on held-out data fits the "
    "training data more than it helps."
)
WHOLE_GRID = (
    "Every rate of a method's grids: the share of them within a price, mean over settings, and the "
    "mean price, of which no rate counts more than 100% (as bad as no training)."
)


@dataclass(frozen=True)
class Price:
    """Of one method: setting → its runs, and → learning rate → the part of the gain missed."""

    method: str
    width: int | None  # of the MLP, where it is not each setting's own
    runs: dict[str, list[Record]]
    by_setting: dict[str, dict[float, float]]

    @property
    def title(self) -> str:
        everywhere = f", width {self.width} everywhere" if self.width else ""
        return f"{title(self.method)}{everywhere}"

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

    @property
    def seeds(self) -> int:
        """With how many at least the one rate was run."""
        return min(
            len({r.config["seed"] for r in runs if r.config["lr"] == self.rate})
            for runs in self.runs.values()
        )

    def within(self, price: float) -> float:
        """Share of the rates that cost at most this, mean over settings."""
        return fmean(fmean(p <= price for p in v.values()) for v in self.by_setting.values())

    @property
    def mean(self) -> float:
        """Over all rates."""
        return fmean(fmean(min(p, 1) for p in v.values()) for v in self.by_setting.values())


def settings(comparisons: Sequence[Comparison], preset: str) -> dict[str, Comparison]:
    """Those of a preset whose price can be told, by what tables call them."""
    known = [
        c
        for c in one_per_scale(comparisons)
        if c.own_sweep and c.base_loss is not None and c.learns
    ]
    return {c.scope.column: c for c in known if c.preset == preset}


def prices(found: dict[str, Comparison]) -> list[Price]:
    """Of every adapter in several settings: those in most, with the lowest price, first.

    A method whose settings have MLPs of different widths also with the commonest one everywhere.
    """
    every = []
    for name in in_order(m for c in found.values() for m in c.sweep if method(m).role != "full"):
        having = {setting: c for setting, c in found.items() if name in c.sweep}
        every.append(price_of(name, None, having))
        own = Counter(usual_width(c, name) for c in having.values())
        if method(name).mlp != "none" and len(own) > 1:
            every.append(price_of(name, own.most_common(1)[0][0], having))
    every = [p for p in every if p.width is None or len(p.shared) > 1]  # a rate is chosen
    usable = [p for p in every if len(p.by_setting) >= ENOUGH and p.rate is not None]
    return sorted(usable, key=lambda p: (-len(p.by_setting), fmean(p.at_one_rate)))


def price_of(name: str, width: int | None, having: dict[str, Comparison]) -> Price:
    """Of a method in these settings, at each one's usual width or at this one."""
    runs, by_setting = {}, {}
    for setting, c in having.items():
        own = width in (None, usual_width(c, name))
        mine = [r for r in (c.sweep_runs if own else c.every) if method_of(r) == name]
        if not own:
            mine = [r for r in mine if (r.config["rank"], r.config["mlp_width"]) == (c.rank, width)]
        gain = c.base_loss - c.best_loss
        for values in shared_seeds(by_seed(mine, c.loss)).values():
            runs[setting] = mine
            by_setting[setting] = {r: (fmean(v) - c.best_loss) / gain for r, v in values.items()}
    return Price(name, width, runs, by_setting)


def in_training(c: Comparison) -> Comparison | None:
    """The same runs by training loss; None where none was logged."""
    logged = [r for r in trained(c.sweep_runs) if r.metrics.get("train_loss")]
    if not logged:
        return None
    lowest = [min(runs, key=lambda r: r.config["lr"]) for runs in by_method(logged).values()]
    starts = [replace(r, metrics={"train_loss": r.metrics["train_loss"][:1]}) for r in lowest]
    return replace(c, loss=end_of_training, base=[max(starts, key=end_of_training)])


def end_of_training(record: Record) -> float | None:
    """The mean of the last fifth of the training losses that were logged."""
    losses = [loss for _, loss in record.metrics.get("train_loss") or ()]
    return fmean(losses[-max(1, len(losses) // 5) :]) if losses else None


def usual_width(c: Comparison, name: str) -> int:
    return next(r.config["mlp_width"] for r in c.sweep_runs if method_of(r) == name)


def parts(comparisons: Sequence[Comparison]) -> list[Part]:
    """Of every preset that has two settings a sentence, a figure and the tables."""
    shown: list[Part] = []
    for preset in sorted({c.preset for c in comparisons}):
        found = settings(comparisons, preset)
        listed, name = prices(found), f"price_{preset}"
        training = {s: again for s, c in found.items() if (again := in_training(c))}
        optimized = prices(training)
        if listed:
            shown += [
                Statement(name, sentence(listed, optimized, found)),
                drawn(name, listed),
                Table(f"{name}_one_rate", ONE_RATE, [_one_rate(p, found) for p in listed]),
                Table(f"{name}_grid", WHOLE_GRID, [_whole_grid(p) for p in listed]),
            ]
        if optimized:
            rows = [_one_rate(p, training) for p in optimized]
            shown.append(Table(f"{name}_training", IN_TRAINING, rows))
    return shown


def sentence(
    listed: Sequence[Price], optimized: Sequence[Price], found: dict[str, Comparison]
) -> str:
    """The best at one rate of those that have all settings, LoRA and OP-LoRA."""
    fewest = min(p.seeds for p in _told(listed))
    seeds = "one seed" if fewest == 1 else f"{fewest} seeds"
    text = (
        f"Untuned, at one rate for all {len(found)} settings, the part of the gain that is missed: "
        f"{_missed(listed)} ({seeds})."
    )
    return f"{text} In training loss: {_missed(optimized)}." if optimized else text


def _told(listed: Sequence[Price]) -> list[Price]:
    return [p for p in listed if p.method in (listed[0].method, "lora", "oplora")]


def _missed(listed: Sequence[Price]) -> str:
    return "; ".join(
        f"{p.title} at {p.rate:g}: {_percent(fmean(p.at_one_rate))} "
        f"(worst {_percent(max(p.at_one_rate))})"
        for p in _told(listed)
    )


def drawn(name: str, listed: Sequence[Price]) -> ReportFigure:
    """Every rate of every setting as a dot, the best one rate's mean as a star."""
    figure = Figure(figsize=(8, 0.8 + 0.32 * len(listed)))
    axis = figure.subplots()
    for y, price in enumerate(reversed(listed)):
        dots = [100 * min(p, 1) for v in price.by_setting.values() for p in v.values()]
        color = style(price.method).color
        axis.plot(dots, [y] * len(dots), "o", color=color, ms=5, alpha=0.35, mew=0)
        axis.plot(100 * min(fmean(price.at_one_rate), 1), y, "*", color=color, ms=12)
    names = [f"{p.title} at {p.rate:g}" for p in reversed(listed)]
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
    cells = {"method": price.title, "rate": f"{price.rate:g}"}
    for name, c in found.items():
        missing = Missing(c.rates_command(price.method))
        cells[name] = _percent(mine[name][price.rate]) if name in mine else missing
    cells |= {
        "mean": _percent(fmean(price.at_one_rate)),
        "worst": _percent(max(price.at_one_rate)),
        "settings": len(mine),
        "seeds": price.seeds,
    }
    return Row(cells, [r for runs in price.runs.values() for r in runs])


def _whole_grid(price: Price) -> Row:
    cells = {"method": price.title}
    cells |= {f"within {share:.0%}": f"{price.within(share):.0%}" for share in WITHIN}
    cells |= {"mean price": _percent(price.mean), "settings": len(price.by_setting)}
    return Row(cells, [r for runs in price.runs.values() for r in runs])


def _percent(price: float) -> str:
    return "diverged" if math.isinf(price) else f"{price:.0%}"
