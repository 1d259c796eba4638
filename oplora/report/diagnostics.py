"""What diagnosed runs tell of their steps: the multiplier and the line search, by type of layer."""

import json
from collections.abc import Iterable
from itertools import product

import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from oplora.harness.runs import DIAGNOSTICS, Record
from oplora.report.comparison import Comparison, one_per_scale
from oplora.report.figures import shade
from oplora.report.page import ReportFigure
from oplora.report.style import style
from oplora.report.titles import by_method, title

LABELS = {"multiplier": "multiplier", "line_search_share": "line search's share"}


def diagnosed(comparisons: Iterable[Comparison]) -> list[ReportFigure]:
    """A figure for each scale at which methods' runs at their chosen rates were diagnosed."""
    return [figure for c in one_per_scale(comparisons) if (figure := over_steps(c))]


def over_steps(c: Comparison) -> ReportFigure | None:
    """Mean and range over blocks and seeds for every method, a column for every type of layer."""
    runs = [r for r in c.at_chosen_rate(c.records) if (r.path / DIAGNOSTICS).exists()]
    if not runs:
        return None
    methods = {method: pandas.concat(map(blocks, same)) for method, same in by_method(runs).items()}
    every = pandas.concat(methods.values())
    layers, numbers = every["layer"].unique(), [n for n in LABELS if every[n].notna().any()]
    size = (1 + 2.4 * len(layers), 0.5 + 2.2 * len(numbers))
    figure, lines = Figure(figsize=size, layout="constrained"), {}
    axes = figure.subplots(len(numbers), len(layers), squeeze=False, sharex=True, sharey="row")
    for (number, layer), axis in zip(product(numbers, layers), axes.flat, strict=True):
        for method, frame in methods.items():
            by_step = frame[frame["layer"] == layer].groupby("step")[number]
            found = by_step.agg(["mean", "min", "max"]).dropna()
            if len(found):
                (line,) = axis.plot(found.index, found["mean"], **style(method).line)
                shade(axis, line, found["min"], found["max"])
                lines[title(method)] = line
        if number == "multiplier":
            axis.set_yscale("log")
            for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                ticks(StrMethodFormatter("{x:g}"))
        axis.set(title=layer if number == numbers[0] else "")
        axis.set(ylabel=LABELS[number] if layer == layers[0] else "")
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=4, frameon=False)
    rates = dict.fromkeys(f"{title(m)} at {r.config['lr']:g}" for m, rs in by_method(runs).items()
                          for r in rs)  # fmt: skip
    caption = (
        f"By type of layer, mean and range over layers; {c.scope}; {', '.join(rates)}. "
        "Multiplier: how many times as far as an ordinary step the MLP's last layer goes, 1 + |h|₁ "
        "(a learned scale: s). The line search's share of a step is what the MLP's trunk adds."
    )
    return ReportFigure(f"{c.name}_diagnostics", caption, figure)


def blocks(record: Record) -> pandas.DataFrame:
    """A row for every diagnosed step and block: step, layer, and numbers, NaN where unknown."""
    lines = (record.path / DIAGNOSTICS).read_text(encoding="utf-8").splitlines()
    frame = pandas.json_normalize(list(map(json.loads, lines)), "blocks", "step")
    frame["layer"] = frame["name"].map(layer_type)
    return frame.reindex(columns=["step", "layer", *LABELS]).astype(dict.fromkeys(LABELS, float))


def layer_type(name: str) -> str:
    """q_proj of …layers.3.self_attn.q_proj.lora_A.default.weight: the layer's last word."""
    path = name.removesuffix(".weight").split(".")[:-2]  # without the adapter's kind and name
    return next((part for part in reversed(path) if not part.isdigit()), name)
