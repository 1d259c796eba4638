"""Loss over rates with bands, trajectories on the loss surface, and |vᵀg| over training."""

import numpy
from matplotlib.figure import Figure

from oplora.report.figures import over_rates, shade
from oplora.report.page import ReportFigure
from oplora.report.style import style
from oplora.report.titles import title
from oplora.studies.rotated_mnist.report.members import Batch, curves


def loss_over_rates(batch: Batch) -> ReportFigure:
    """Figure 2a."""
    c = batch.comparison
    caption = f"Figure 2a. Final loss on all training digits by learning rate; {c.scope}."
    return over_rates(c.rates_figure, caption, c.sweep, c.chosen, "final training loss")


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
        for path, name, rate in zip(
            arrays[f"{which}_paths"], ("oplora", "lora"), of_both, strict=True
        ):
            axis.plot(*path.T, label=f"{title(name)}, rate {rate:g}", **style(name).line)
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
            look = {"label": f"{title(name)}, rate {rate:g}", **style(name).line}
            (line,) = axis.plot(arrays["curvature_steps"], values.mean(0), **look)
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
