"""Figures 2-4, and two that the paper lacks: sensitivity and effective step size."""

from collections.abc import Sequence

import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oplora.report.figures import label_ends, shade
from oplora.report.page import ReportFigure
from oplora.report.style import DASHES, INK, style
from oplora.report.titles import title
from oplora.studies.matrix_factorization.report.study import (
    OPTIMIZERS,
    Studies,
    Study,
    longest_window,
    reached_only_by,
    span,
)

QUANTITIES = {  # of figure 3
    "mse": "MSE",
    "gradient_cosine": "cosine, gradients 10 steps apart",
    "gradient_norm": "gradient norm of A and B",
    "effective_rank": "effective rank of BA",
}


def panels(
    titles: Sequence[str], xlabel: str, ylabel: str, size: tuple[float, float], sharey: bool = True
) -> tuple[Figure, Sequence[Axes]]:
    """Axes beside one another."""
    figure = Figure(figsize=size)
    axes = figure.subplots(1, len(titles), sharey=sharey, squeeze=False)[0]
    for axis, text in zip(axes, titles, strict=True):
        axis.set_title(text)
        axis.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    return figure, axes


def figure2(methods: dict[str, Study]) -> ReportFigure:
    """Loss curves over learning rates: as the paper draws them, and the whole range."""
    mf, op = methods["mf"], methods["opmf"]
    everything = list(range(len(mf.rates)))
    if inside := longest_window(op, mf, reached_only_by(op, mf)):
        low, high = mf.rates[inside[0]], mf.rates[inside[-1]]
        first = f"rates {low:g} to {high:g}: OP-MF reaches SVD, MF does not"
    else:
        inside = [i for i in op.stable if not mf.reaches[i]]
        first = f"rates at which MF does not reach SVD: {span(mf.rates, inside)}"
    titles = (first, "every rate, each method up to its own limit")
    figure, axes = panels(titles, "step", "MSE", (11, 4))
    for axis, chosen in zip(axes, (inside, everything), strict=True):
        _loss_curves(axis, methods, chosen)
    caption = (
        "Figure 2. Error over 1000 steps of SGD (median over seeds); faint to strong: "
        "low to high learning rate; line: rank-8 SVD. What it shows depends on the rates."
    )
    return ReportFigure("figure2", caption, figure)


def _loss_curves(axis: Axes, methods: dict[str, Study], chosen: list[int]) -> None:
    """Faint to strong: low to high rates."""
    for name in ("mf", "opmf"):
        study = methods[name]
        shown = [i for i in chosen if i in study.stable]
        for i in shown:
            options = _line(name) | {"lw": 1.2}
            options["alpha"] = 0.25 + 0.75 * (chosen.index(i) + 1) / len(chosen)
            label = title(name) if i == shown[-1] else None
            axis.plot(study.steps, study.curve("mse", i), label=label, **options)
    _error_axis(axis, methods["mf"])
    axis.legend(frameon=False)


def _line(name: str) -> dict[str, str]:
    """Without markers: there are many steps."""
    return {"color": style(name).color, "ls": DASHES[style(name).kind]}


def _error_axis(axis: Axes, study: Study) -> None:
    axis.axhline(numpy.median(study.svd), color=INK, lw=0.8, label="SVD")
    axis.set_yscale("log")
    axis.set_ylim(0.058, 0.4)
    axis.set_yticks([0.06, 0.08, 0.1, 0.2, 0.3], ["0.06", "0.08", "0.10", "0.20", "0.30"])
    axis.minorticks_off()


def figure3(methods: dict[str, Study]) -> ReportFigure:
    """Loss, gradient consistency, gradient norm and effective rank at one rate and at each best."""
    mf, op = methods["mf"], methods["opmf"]
    figure = Figure(figsize=(15, 6.5))
    axes = figure.subplots(2, len(QUANTITIES))
    rows = (("OP-MF's best rate", (op.best, op.best)), ("own best rate", (mf.best, op.best)))
    for line, (where, chosen) in zip(axes, rows, strict=True):
        for axis, (key, label) in zip(line, QUANTITIES.items(), strict=True):
            for name, rate in zip(("mf", "opmf"), chosen, strict=True):
                study = methods[name]
                text = f"{title(name)}, rate {study.rates[rate]:g}"
                axis.plot(study.steps, study.curve(key, rate), label=text, **_line(name))
            axis.set_title(f"{label} ({where})", fontsize=10)
            if key in ("mse", "gradient_norm"):
                axis.set_yscale("log")
        line[0].axhline(numpy.median(mf.svd), color=INK, lw=1)
        line[3].axhline(numpy.median(mf.record.metrics["svd_effective_rank"]), color=INK, lw=1)
        line[0].legend(frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    caption = (
        "Figure 3. Gradient analysis with SGD (medians over seeds). Top: both at OP-MF's best "
        "rate; bottom: each method at its own best rate. Black: the SVD solution."
    )
    return ReportFigure("figure3", caption, figure)


def figure4(complete: Studies) -> ReportFigure:
    figure, axes = panels([OPTIMIZERS[name] for name in complete], "step", "MSE", (15, 4))
    for axis, methods in zip(axes, complete.values(), strict=True):
        _loss_curves(axis, methods, list(range(len(methods["mf"].rates))))
    caption = "Figure 4. The same three times: every rate of the grid that does not diverge."
    return ReportFigure("figure4", caption, figure)


def sensitivity(found: Studies) -> ReportFigure:
    titles = [OPTIMIZERS[name] for name in found]
    figure, axes = panels(titles, "learning rate", "final MSE", (15, 4))
    for axis, methods in zip(axes, found.values(), strict=True):
        for method, study in methods.items():
            rates = [study.rates[i] for i in study.stable]
            final = pandas.DataFrame(study.final[study.stable]).replace(numpy.inf, numpy.nan).T
            name, middle = title(method), final.median()
            (line,) = axis.plot(rates, middle, label=name, **style(method).line)
            shade(axis, line, final.min(), final.max())
        axis.set_xscale("log")
        _error_axis(axis, study)
    label_ends(axes[-1])
    caption = (
        "Sensitivity. Final error against the learning rate: median and range over seeds; a line "
        "ends where most seeds diverge. The controls share OP-MF's step sizes, first A, or both."
    )
    return ReportFigure("sensitivity", caption, figure)


def step_sizes(complete: Studies) -> ReportFigure:
    norms = {name: "1 + |h|₁" if name == "adam" else "1 + |h|₂²" for name in complete}
    titles = [f"{OPTIMIZERS[name]}: {norm}" for name, norm in norms.items()]
    ylabel = "step of A and B over that of MF"
    figure, axes = panels(titles, "step", ylabel, (15, 3.5), sharey=False)
    for axis, methods in zip(axes, complete.values(), strict=True):
        study, shown = methods["opmf"], methods["opmf"].stable
        for n, i in enumerate(shown):
            label = f"rate {study.rates[i]:g}" if i in (shown[0], shown[-1]) else None
            look = _line("opmf") | {"alpha": 0.25 + 0.75 * (n + 1) / len(shown)}
            axis.plot(study.steps, study.curve("step_multiplier", i), label=label, **look)
        axis.set_yscale("log")
        axis.legend(frameon=False)
    caption = (
        "Effective step size of OP-MF over training (mean of both MLPs, median over seeds): how "
        "much further a step of the same learning rate moves A and B while h stands still."
    )
    return ReportFigure("step_size", caption, figure)
