"""Figures of methods beside one another: over learning rates, over training, over widths."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from oplora.harness.runs import Record
from oplora.report.comparison import Comparison, Sweep
from oplora.report.page import Part, ReportFigure
from oplora.report.statistics import at_shared_steps, mean_interval
from oplora.report.tables import Groups, rate_table
from oplora.report.titles import by_method, by_number, method, title


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


def rate_parts(
    c: Comparison, caption: str, ylabel: str, margin: tuple[float, float] | None = None
) -> list[Part]:
    """The sweep of a comparison as a figure and as a table."""
    name = c.rates_figure
    return [
        over_rates(name, caption, c.sweep, ylabel, margin),
        rate_table(name, caption, c.sweep, c.sweep_runs),
    ]


def over_rates(
    name: str, caption: str, sweep: Sweep, ylabel: str, margin: tuple[float, float] | None = None
) -> ReportFigure:
    """Every method's result by its learning rate; margin: of the y axis around the best."""
    axis = _axis("learning rate", ylabel, xscale="log")
    for name_, by_rate in sweep.items():
        means = [mean_interval(values)[0] for values in by_rate.values()]
        means = [mean if mean < math.inf else math.nan for mean in means]  # a gap in the line
        axis.plot(list(by_rate), means, "o" + _line(name_), ms=4, label=title(name_))
    if margin:
        best = min(min(map(min, by_rate.values())) for by_rate in sweep.values())
        axis.set_ylim(best - margin[0], best + margin[1])
    return _finished(name, caption, axis)


def over_training(name: str, groups: Groups, curves: Curves, scope: str) -> ReportFigure:
    """Mean and range over seeds for every method."""
    axis = _axis(curves.xlabel, curves.ylabel)
    for name_, records in groups.items():
        lines = [line for r in records if (line := curves.points(r))]
        if lines:
            xs, values = at_shared_steps(lines)
            (line,) = axis.plot(xs, values.mean(0), _line(name_), label=title(name_))
            shade(axis, line, values.min(0), values.max(0))
    return _finished(name, f"{curves.caption}; {scope}.", axis)


def over_widths(
    name: str,
    caption: str,
    records: Sequence[Record],
    score: Callable[[Record], float],
    ylabel: str,
    lines: Groups,
) -> ReportFigure:
    """Mean and range over seeds by the MLP's width; the means of two methods as lines."""
    axis = _axis("width of the MLP", ylabel)
    for name_, runs in by_method(records).items():
        values = {w: list(map(score, same)) for w, same in by_number(runs, "mlp_width").items()}
        means = [mean_interval(v)[0] for v in values.values()]
        (line,) = axis.plot(list(values), means, "o-", label=title(name_))
        shade(axis, line, list(map(min, values.values())), list(map(max, values.values())))
    for (name_, runs), style in zip(lines.items(), (":", "--"), strict=True):
        if runs:
            mean = mean_interval([score(r) for r in runs])[0]
            axis.axhline(mean, color="gray", ls=style, label=title(name_))
    axis.set_xscale("log", base=2)
    return _finished(name, caption, axis)


def _axis(xlabel: str, ylabel: str, **options: str) -> Axes:
    axis = Figure(figsize=(8, 4.5)).subplots()
    axis.set(xlabel=xlabel, ylabel=ylabel, **options)
    return axis


def shade(axis: Axes, line: Line2D, low: Sequence[float], high: Sequence[float]) -> None:
    """The range around a line."""
    axis.fill_between(line.get_xdata(), low, high, color=line.get_color(), alpha=0.15, lw=0)


def _finished(name: str, caption: str, axis: Axes) -> ReportFigure:
    axis.legend(frameon=False, fontsize=8)
    return ReportFigure(name, caption, axis.figure)


def _line(name: str) -> str:
    """Dotted: controls, and the Lite form of a method that is drawn, too."""
    return ":" if method(name).role == "control" or method(name).mlp == "lite" else "-"
