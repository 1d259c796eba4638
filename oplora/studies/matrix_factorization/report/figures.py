"""Figures 2-4, and two that the paper lacks: sensitivity and effective step size."""

import numpy
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oplora.report.page import ReportFigure
from oplora.report.titles import title
from oplora.studies.matrix_factorization.report.study import (
    COLORS,
    OPTIMIZERS,
    Studies,
    Study,
    longest_window,
    span,
)


def figure2(methods: dict[str, Study]) -> ReportFigure:
    """Loss curves over learning rates: as the paper draws them, and the whole range."""
    mf, op = methods["mf"], methods["opmf"]
    figure = Figure(figsize=(11, 4))
    axes = figure.subplots(1, 2, sharey=True)
    everything = list(range(len(mf.rates)))
    window = longest_window(mf, op, lambda i: op.reaches[i].sum() >= 4 and not mf.reaches[i].any())
    inside = window or everything
    low, high = mf.rates[inside[0]], mf.rates[inside[-1]]
    if window:
        axes[0].set_title(f"rates {low:g} to {high:g}: OP-MF reaches SVD, MF does not")
    else:
        inside = [i for i in everything if not mf.reaches[i] and not op.diverges[i]]
        axes[0].set_title(f"rates at which MF does not reach SVD: {span(mf.rates, inside)}")
    axes[1].set_title("every rate, each method up to its own limit")
    for axis, chosen in zip(axes, (inside, everything), strict=True):
        _loss_curves(axis, methods, chosen)
    axes[0].set_ylabel("MSE")
    caption = (
        "Figure 2. Reconstruction error over 1000 steps of SGD (median over seeds); light to dark: "
        "low to high learning rate; red: rank-8 SVD. The picture depends on which rates are shown."
    )
    return ReportFigure("figure2", caption, figure)


def _loss_curves(axis: Axes, methods: dict[str, Study], chosen: list[int]) -> None:
    for name, shades in (("mf", "Oranges"), ("opmf", "Blues")):
        study = methods[name]
        colors = colormaps[shades](numpy.linspace(0.3, 0.95, len(chosen)))
        shown = [i for i in chosen if not study.diverges[i]]
        for i, color in zip(chosen, colors, strict=True):
            if i in shown:
                label = title(name) if i == shown[-1] else None
                axis.plot(study.steps, study.curve("mse", i), color=color, lw=1.2, label=label)
    axis.axhline(numpy.median(methods["mf"].svd), color="red", lw=1, label="SVD")
    _error_scale(axis)
    axis.set_xlabel("step")
    axis.legend(frameon=False)


def _error_scale(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.set_ylim(0.058, 0.4)
    axis.set_yticks([0.06, 0.08, 0.1, 0.2, 0.3], ["0.06", "0.08", "0.10", "0.20", "0.30"])
    axis.minorticks_off()


def figure3(methods: dict[str, Study]) -> ReportFigure:
    """Loss, gradient consistency, gradient norm and effective rank at one rate and at each best."""
    quantities = {
        "mse": "MSE",
        "gradient_cosine": "cosine, gradients 10 steps apart",
        "gradient_norm": "gradient norm of A and B",
        "effective_rank": "effective rank of BA",
    }
    figure = Figure(figsize=(15, 6.5))
    axes = figure.subplots(2, 4)
    same = methods["opmf"].best
    rows = [
        ("OP-MF's best rate", {name: same for name in ("mf", "opmf")}),
        ("own best rate", {name: methods[name].best for name in ("mf", "opmf")}),
    ]
    for line, (where, chosen) in zip(axes, rows, strict=True):
        for axis, (key, label) in zip(line, quantities.items(), strict=True):
            for name, rate in chosen.items():
                study = methods[name]
                text = f"{title(name)}, rate {study.rates[rate]:g}"
                axis.plot(study.steps, study.curve(key, rate), color=COLORS[name], label=text)
            axis.set_title(f"{label} ({where})", fontsize=10)
            if key in ("mse", "gradient_norm"):
                axis.set_yscale("log")
        reference = methods["mf"].record.metrics
        line[0].axhline(numpy.median(methods["mf"].svd), color="red", lw=1)
        line[3].axhline(numpy.median(reference["svd_effective_rank"]), color="red", lw=1)
        line[0].legend(frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    caption = (
        "Figure 3. Gradient analysis with SGD (medians over seeds). Top: both at OP-MF's best "
        "rate; bottom: each method at its own best rate. Red: the SVD solution."
    )
    return ReportFigure("figure3", caption, figure)


def figure4(complete: Studies) -> ReportFigure:
    figure = Figure(figsize=(15, 4))
    axes = figure.subplots(1, len(complete), sharey=True, squeeze=False)[0]
    for axis, (name, methods) in zip(axes, complete.items(), strict=True):
        _loss_curves(axis, methods, list(range(len(methods["mf"].rates))))
        axis.set_title(OPTIMIZERS[name])
    axes[0].set_ylabel("MSE")
    caption = "Figure 4. The same three times: every rate of the grid that does not diverge."
    return ReportFigure("figure4", caption, figure)


def sensitivity(found: Studies) -> ReportFigure:
    figure = Figure(figsize=(15, 4))
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axis, (optimizer, methods) in zip(axes, found.items(), strict=True):
        for method, study in methods.items():
            color = COLORS.get(method)  # None: the next of matplotlib's
            shown = [i for i in range(len(study.rates)) if not study.diverges[i]]
            final = numpy.where(numpy.isinf(study.final), numpy.nan, study.final)[shown]
            rates = numpy.array(study.rates)[shown]
            middle, name = numpy.nanmedian(final, 1), title(method)
            (line,) = axis.plot(rates, middle, "o-", ms=3, color=color, label=name)
            low, high = numpy.nanmin(final, 1), numpy.nanmax(final, 1)
            axis.fill_between(rates, low, high, color=line.get_color(), alpha=0.15, lw=0)
        axis.axhline(numpy.median(study.svd), color="red", lw=1, label="SVD")
        axis.set_xscale("log")
        _error_scale(axis)
        axis.set_title(OPTIMIZERS[optimizer])
        axis.set_xlabel("learning rate")
    axes[0].set_ylabel("final MSE")
    axes[-1].legend(frameon=False, fontsize=8)
    caption = (
        "Sensitivity. Final error against the learning rate: median and range over seeds; a line "
        "ends where most seeds diverge. The controls share OP-MF's step sizes, first A, or both."
    )
    return ReportFigure("sensitivity", caption, figure)


def step_sizes(complete: Studies) -> ReportFigure:
    figure = Figure(figsize=(15, 3.5))
    axes = figure.subplots(1, len(complete), squeeze=False)[0]
    for axis, (name, methods) in zip(axes, complete.items(), strict=True):
        study = methods["opmf"]
        shown = [i for i in range(len(study.rates)) if not study.diverges[i]]
        for i, color in zip(
            shown, colormaps["Blues"](numpy.linspace(0.3, 1, len(shown))), strict=True
        ):
            label = f"rate {study.rates[i]:g}" if i in (shown[0], shown[-1]) else None
            axis.plot(study.steps, study.curve("step_multiplier", i), color=color, label=label)
        axis.set_yscale("log")
        axis.set_title(f"{OPTIMIZERS[name]}: {'1 + |h|₁' if name == 'adam' else '1 + |h|₂²'}")
        axis.set_xlabel("step")
        axis.legend(frameon=False)
    axes[0].set_ylabel("step of A and B over that of MF")
    caption = (
        "Effective step size of OP-MF over training (mean of both MLPs, median over seeds): how "
        "much further a step of the same learning rate moves A and B while h stands still."
    )
    return ReportFigure("step_size", caption, figure)
