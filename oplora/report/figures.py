"""Figures of methods beside one another: over learning rates, over training, over widths."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from oplora.harness.runs import Record
from oplora.report import titles
from oplora.report.comparison import Comparison
from oplora.report.page import Part, ReportFigure
from oplora.report.rates import Sweep
from oplora.report.statistics import at_shared_steps, mean_interval
from oplora.report.style import INK, style
from oplora.report.tables import Groups, rate_table
from oplora.report.titles import by_method, by_number, title

FULL, FEW = 11, 6  # lines that a panel of a figure can hold, and that it can of one colour
REFERENCE = "lora"  # stands in every panel


def loss_curve(record: Record) -> list[list[float]]:
    """(step, validation loss)"""
    return record.metrics.get("validation_loss") or []


@dataclass(frozen=True)
class Curves:
    """What is drawn over training."""

    caption: str
    points: Callable[[Record], list] = loss_curve
    ylabel: str = "validation loss"
    xlabel: str = "step"
    higher: bool = False  # is better


def rate_parts(c: Comparison, caption: str, ylabel: str) -> list[Part]:
    """The sweep of a comparison as a figure and as a table."""
    name = c.rates_figure
    return [
        over_rates(name, caption, c.sweep, c.chosen, ylabel),
        rate_table(name, caption, c.swept_seeds, c.sweep_runs),
    ]


def over_rates(
    name: str, caption: str, sweep: Sweep, chosen: Mapping[str, float], ylabel: str
) -> ReportFigure:
    """Every method's result by its learning rate, mean and range over seeds."""
    figure = Figure()
    for axis, method in _panels(figure, sweep, "learning rate", ylabel, xscale="log"):
        by_rate, best = sweep[method], chosen[method]
        values = [numpy.array(v) for v in by_rate.values()]
        values = [v if numpy.isfinite(v).all() else v * numpy.nan for v in values]  # a gap
        means = [v.mean() for v in values]
        (line,) = axis.plot(list(by_rate), means, label=title(method), **style(method).line)
        shade(axis, line, [v.min() for v in values], [v.max() for v in values])
        axis.plot(best, means[list(by_rate).index(best)], "*", color=line.get_color(), ms=12)
    for axis in figure.axes:
        clip(axis)
        label_ends(axis)
    best = ", ".join(f"{title(method)} at {rate:g}" for method, rate in chosen.items())
    seeds = [len(v) for by_rate in sweep.values() for v in by_rate.values()]
    told = f"Best: {best} (stars). {caption} Mean and range; {_seeds(seeds)} a rate."
    return ReportFigure(name, told, figure)


def over_training(name: str, groups: Groups, curves: Curves, scope: str) -> ReportFigure:
    """Mean and range over seeds for every method."""
    figure, ends, seeds = Figure(), {}, []
    drawn = {
        method: lines
        for method, records in groups.items()
        if (lines := [line for r in records if (line := curves.points(r))])
    }
    for axis, method in _panels(figure, drawn, curves.xlabel, curves.ylabel):
        xs, values = at_shared_steps(drawn[method])
        (line,) = axis.plot(xs, values.mean(0), label=title(method), **style(method).line)
        shade(axis, line, values.min(0), values.max(0))
        ends[title(method)] = values.mean(0)[-1]
        seeds.append(len(drawn[method]))
    for axis in figure.axes:
        clip(axis, higher=curves.higher)
        label_ends(axis)
    order = sorted(ends, key=ends.get, reverse=curves.higher)
    found = ", ".join(f"{method} {ends[method]:.4g}" for method in order)
    told = f"At the end, best first: {found}. {curves.caption}; {scope}; {_seeds(seeds)}."
    return ReportFigure(name, told, figure)


def over_widths(
    name: str,
    caption: str,
    records: Sequence[Record],
    score: Callable[[Record], float],
    ylabel: str,
    lines: Groups,
) -> ReportFigure:
    """Mean and range over seeds by the MLP's width; the means of methods without one as lines."""
    axis = _named(Figure(figsize=(8, 4)).subplots(), "width of the MLP", ylabel)
    for method, runs in by_method(records).items():
        values = {w: list(map(score, same)) for w, same in by_number(runs, "mlp_width").items()}
        means = [mean_interval(v)[0] for v in values.values()]
        (line,) = axis.plot(list(values), means, label=title(method), **style(method).line)
        shade(axis, line, list(map(min, values.values())), list(map(max, values.values())))
    for method, runs in lines.items():
        if runs:
            mean, look = mean_interval([score(r) for r in runs])[0], style(method)
            axis.plot(axis.get_xlim(), [mean] * 2, color=look.color, label=title(method))
    axis.set_xscale("log", base=2)
    label_ends(axis)
    return ReportFigure(name, caption, axis.figure)


def strips(name: str, caption: str, files: Mapping[str, Path]) -> ReportFigure:
    """Rows of pictures from image files, those that there are, under what they are of."""
    found = [(what, matplotlib.image.imread(f)) for what, f in files.items() if f.exists()]
    figure = Figure(figsize=(9, 0.95 * len(found)))
    axes = figure.subplots(len(found), squeeze=False)[:, 0]
    for axis, (what, image) in zip(axes, found, strict=True):
        axis.imshow(image, interpolation="nearest", aspect="equal")
        axis.set_ylabel(what, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    return ReportFigure(name, caption, figure, photo=True)


def _seeds(counts: Sequence[int]) -> str:
    """ "3 to 8 seeds" """
    few, many = min(counts, default=0), max(counts, default=0)
    if few == many == 1:
        return "one seed"
    return f"{many} seeds" if few == many else f"{few} to {many} seeds"


def _panels(
    figure: Figure, methods: Iterable[str], xlabel: str, ylabel: str, **options: str
) -> Iterator[tuple[Axes, str]]:
    """Where to draw which method: too many for one panel, the families that the paper is about
    are in the first and the others below, a few at a time and beside plain LoRA."""
    panels = [list(methods)]
    if len(panels[0]) > FULL:
        others = [name for name in panels[0] if titles.method(name).family == "other"]
        beside = [name for name in panels[0] if name == REFERENCE]
        panels = [[name for name in panels[0] if name not in others]]
        panels += [[*beside, *others[n : n + FEW]] for n in range(0, len(others), FEW)]
    figure.set_size_inches(8, 4 * len(panels))
    for axis, drawn in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _named(axis, xlabel, ylabel, **options)
        yield from ((axis, name) for name in drawn)


def _named(axis: Axes, xlabel: str, ylabel: str, **options: str) -> Axes:
    axis.set(xlabel=xlabel, ylabel=ylabel, **options)
    axis.spines[["top", "right"]].set_visible(False)
    return axis


def shade(axis: Axes, line: Line2D, low: Sequence[float], high: Sequence[float]) -> None:
    """The range around a line."""
    axis.fill_between(line.get_xdata(), low, high, color=line.get_color(), alpha=0.15, lw=0)


def reach(values: Sequence[float], higher: bool = False) -> float:
    """Where an axis may end: three times as far from the best as the median, or at the worst."""
    best, worst = (max(values), min(values)) if higher else (min(values), max(values))
    far = best + 3 * (float(numpy.median(values)) - best)
    return max(worst, far) if higher else min(worst, far)


def clip(axis: Axes, higher: bool = False) -> None:
    """Let no point that went astray flatten the rest."""
    values = numpy.array([y for line in axis.lines for y in line.get_ydata()], float)
    values = values[numpy.isfinite(values)]
    if not len(values):
        return
    best, worst = (values.max(), values.min()) if higher else (values.min(), values.max())
    end = reach(values, higher)
    if end not in (best, worst):
        axis.set_ylim(*sorted((best + 0.06 * (best - end), end)))
        text = "points beyond the axis are not shown"
        at = {"xy": (0.5, 0.02 if higher else 0.98), "xycoords": "axes fraction"}
        axis.annotate(text, **at, ha="center", va="center", fontsize=8, color=INK, alpha=0.6)


def label_ends(axis: Axes) -> None:
    """Every line's name at its right end, apart from one another, with the line's own look."""
    low, high = axis.get_ylim()
    log = axis.get_yscale() == "log"
    named = [line for line in axis.lines if not line.get_label().startswith("_")]
    ends = []
    for line in named:
        x, y = numpy.asarray(line.get_xdata(), float), numpy.asarray(line.get_ydata(), float)
        inside = numpy.flatnonzero(numpy.isfinite(y) & (y >= low) & (y <= high))
        if len(inside):
            last = inside[-1]
            span = (numpy.log(y[last] / low) / numpy.log(high / low) if log
                    else (y[last] - low) / (high - low))  # fmt: skip
            ends.append((float(span), x[last], y[last], line))
    ends.sort(key=lambda end: end[0])
    apart, heights = 0.07, []
    for span, *_ in ends:
        heights.append(max(span, heights[-1] + apart) if heights else span)
    shift = max(0.0, heights[-1] - 1) if heights else 0.0
    for n, height in enumerate(reversed(heights)):  # down again, where they left the top
        heights[-1 - n] = min(height, 1 - n * apart) if shift else height
    for (_, x, y, line), height in zip(ends, heights, strict=True):
        axis.annotate(
            line.get_label(), (x, y), xytext=(1.1, height), textcoords="axes fraction",
            va="center", fontsize=9, color=line.get_color(),
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "alpha": 0.3, "lw": 0.7},
        )  # fmt: skip
        axis.plot(
            [1.04, 1.09], [height] * 2, color=line.get_color(), ls=line.get_linestyle(),
            marker=line.get_marker(), ms=line.get_markersize(), transform=axis.transAxes,
            clip_on=False, lw=line.get_linewidth(),
        )  # fmt: skip
