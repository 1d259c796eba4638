"""Loss over rates with bands, trajectories on the loss surface, and |vᵀg| over training."""

import numpy
from matplotlib.figure import Figure

from oplora.report.figures import shade
from oplora.report.page import ReportFigure
from oplora.report.titles import method, title
from oplora.studies.rotated_mnist.report.members import Batch, curves

PATHS = (("tab:orange", "o"), ("tab:blue", "s"))  # OP-LoRA's and LoRA's, as in the other figures


def over_rates(batch: Batch) -> ReportFigure:
    """Figure 2a: mean and range over seeds; a line has gaps where a seed diverges."""
    c = batch.comparison
    figure = Figure(figsize=(8, 4.5))
    axis = figure.subplots()
    for name, by_rate in c.sweep.items():
        values = numpy.array(list(by_rate.values()))
        values[~numpy.isfinite(values).all(1)] = numpy.nan
        style = ":" if method(name).role == "control" else "-"
        (line,) = axis.plot(
            list(by_rate), values.mean(1), style, marker="o", ms=3, label=title(name)
        )
        shade(axis, line, values.min(1), values.max(1))
    axis.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="final training loss")
    axis.set_yticks([0.6, 0.8, 1, 2, 4, 8], ["0.6", "0.8", "1", "2", "4", "8"])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)
    caption = (
        f"Figure 2a. Final loss on all training digits by learning rate; {c.scope} (mean and range "
        "over seeds; a gap where a seed diverges)."
    )
    return ReportFigure(c.rates_figure, caption, figure)


def surfaces(batch: Batch) -> list[ReportFigure]:
    """Figures 2b and 2c, of OP-LoRA with LoRA beside it."""
    if "oplora" not in batch.runs:
        return []
    run = batch.runs["oplora"]
    arrays, m = curves(run), run.metrics
    figure = Figure(figsize=(11, 4.5))
    rates = {
        "best": (m["best_rate"], m["direct_best_rate"]),
        "low": (m["low_rate"], m["low_rate"]),
    }
    for axis, (which, of_both) in zip(figure.subplots(1, 2), rates.items(), strict=True):
        x, y, loss = (arrays[f"{which}_{key}"] for key in ("x", "y", "loss"))
        levels = numpy.geomspace(loss.min(), loss.max(), 18)
        filled = axis.contourf(x, y, loss, levels=levels, norm="log", cmap="Greys")
        figure.colorbar(filled, ax=axis, format="%.2g", label="loss")
        for path, name, rate, (color, marker) in zip(
            arrays[f"{which}_paths"], ("oplora", "lora"), of_both, PATHS, strict=True
        ):
            label = f"{title(name)}, rate {rate:g}"
            axis.plot(*path.T, marker=marker, ms=3, lw=1.2, color=color, label=label)
        axis.set_title(f"{which} rate ({arrays[f'{which}_explained']:.0%} of the paths' variance)")
        axis.set(xlabel="first principal direction", ylabel="second")
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    c = batch.comparison
    caption = (
        f"Figures 2b and 2c. Trajectories of one seed on the loss surface, in the plane through "
        f"the frozen network that holds most of both (PCA of the change of the weights); "
        f"{c.scope}. Left: each at its best rate; right: both a hundred times below OP-LoRA's."
    )
    return [ReportFigure(f"{c.name}_surface", caption, figure)]


def projections(batch: Batch) -> list[ReportFigure]:
    """|vᵀg| over training, at the best and the low rate."""
    shown = [name for name in ("lora", "oplora") if name in batch.runs]
    if not shown:
        return []
    figure = Figure(figsize=(11, 3.5))
    axes = figure.subplots(1, 2, sharey=True)
    for i, (axis, which) in enumerate(zip(axes, ("best", "low"), strict=True)):
        for name in shown:
            run = batch.runs[name]
            arrays = curves(run)
            values, rate = arrays["projection"][i], run.metrics[f"{which}_rate"]
            label = f"{title(name)}, rate {rate:g}"
            (line,) = axis.plot(arrays["curvature_steps"], values.mean(0), label=label)
            shade(axis, line, values.min(0), values.max(0))
        axis.set(xlabel="step", title=f"{which} rate")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("|vᵀg|")
    c = batch.comparison
    caption = (
        f"|vᵀg| over training, v the Hessian's top direction by power iteration; {c.scope} (mean "
        "and range over seeds). Low: a hundred times below the method's best rate."
    )
    return [ReportFigure(f"{c.name}_projection", caption, figure)]
