"""Table 3, Figures 1d and 6: VL-BART on four tasks at once, and the MLP's width."""

import json

import numpy
import pandas
from matplotlib.figure import Figure

from oplora.harness.runs import Record
from oplora.report.comparison import Comparison, usual
from oplora.report.methods import (
    by_method,
    cited_scores,
    cited_table,
    cost_cells,
    curves,
    final_loss,
    label,
    name_of,
    rate_parts,
    trained,
)
from oplora.report.page import Picture, Section, Table
from oplora.report.statistics import mean_interval, paired_bootstrap, shown

COLUMNS = {  # metric → column; all are shown × 100, as the paper does
    "vqa_accuracy": "vqa",
    "gqa_accuracy": "gqa",
    "nlvr_accuracy": "nlvr",
    "cider": "cider",
    "average": "average",
    "average_without_captions": "average without captions",
}
MAIN = "average_without_captions"  # CIDEr has another unit, which would rule the average of four


def section(records: list[Record]) -> Section | None:
    """One part per preset; None where nothing was run."""
    parts = [part for c in comparisons(records) for part in _parts(c)]
    if not parts:
        return None
    return Section("Vision and language, four tasks at once (Table 3)", [cited(), *parts])


def comparisons(records: list[Record]) -> list[Comparison]:
    """One per preset, by the mean of the three accuracies."""
    mine = [r for r in records if r.config["experiment"] == "vl_bart"]
    found = []
    for preset in sorted({r.config["preset"] for r in mine}):
        every = [r for r in mine if r.config["preset"] == preset]
        found.append(
            Comparison(
                experiment="vl_bart",
                preset=preset,
                name=f"vl_bart_{preset}",
                records=[r for r in every if usual(r, every)],
                every=every,
                loss=final_loss,
                score=lambda r: 100 * r.metrics[MAIN] if MAIN in r.metrics else None,
                metric="points of accuracy",
                cited=cited_scores("table3.yaml", "average without captions"),
            )
        )
    return found


def cited() -> Table:
    """The paper's own numbers."""
    return cited_table("vl_bart_paper", "table3.yaml")


def _parts(c: Comparison) -> list:
    name, scale = c.name, c.scope
    final = [r for runs in c.at_best.values() for r in runs if "average" in r.metrics]
    caption = f"Validation loss after training, by learning rate; {scale}."
    parts: list = [
        f"{scale}. The learning rate of every method is the one with the "
        "lowest validation loss (mean over all four tasks' items); the test set is "
        "scored at that rate only.",
        *rate_parts(f"{name}_rates", caption, c.sweep, "validation loss"),
    ]
    if final:
        parts += [
            Table(name, f"{scale}: test set, mean ± 95% interval (seeds). Accuracies in percent, "
                  "CIDEr × 100.", results(final)),
            Table(f"{name}_paired", f"{scale}: difference to LoRA in points on the same test items "
                  "(mean over shared seeds) [95% bootstrap interval over items].", paired(final)),
        ]  # fmt: skip
    if any(r.metrics["epochs"] for r in trained(c.records)):
        parts.append(
            curves(
                f"{name}_curves",
                "Validation accuracy (mean of VQA, GQA, NLVR) by epoch, each method at its chosen "
                f"rate (mean and range over seeds; epoch 0 is the base model); {scale}.",
                c.at_best,
                accuracy_by_epoch,
                "accuracy, %",
                "epoch",
            )
        )
    widths = [
        r for r in trained(c.every)
        if _has_mlp(r) and "average" in r.metrics
        and c.chosen.get(r.config["method"]["name"]) == r.config["lr"]
    ]  # fmt: skip
    if len({r.config["mlp_width"] for r in widths}) > 2:
        parts += [
            width_figure(name, scale, widths, final),
            Table(f"{name}_width", f"{scale}: the MLP's width, at the rate chosen for the usual "
                  "one; test set, mean ± 95% interval (seeds).", width_table(widths)),
        ]  # fmt: skip
    return parts


def accuracy_by_epoch(record: Record) -> list:
    return [(epoch, 100 * metrics[MAIN]) for epoch, metrics in record.metrics["epochs"]]


def results(final: list[Record]) -> pandas.DataFrame:
    return pandas.DataFrame(
        [
            {
                "method": label(method, runs),
                "rate": f"{runs[0].config['lr']:g}",
                **metric_cells(runs),
                **cost_cells(runs),
            }
            for method, runs in by_method(final).items()
        ]
    )


def metric_cells(runs: list[Record]) -> dict[str, str | None]:
    return {c: shown([r.metrics[m] for r in runs], 1, 100) for m, c in COLUMNS.items()}


def paired(final: list[Record]) -> pandas.DataFrame:
    """Accuracies minus LoRA's item by item, mean over the shared seeds; intervals over items."""
    methods, rows = by_method(final), []
    base = {r.config["seed"]: item_scores(r) for r in methods.get("lora", [])}
    for method, runs in methods.items():
        shared = [r for r in runs if method != "lora" and r.config["seed"] in base]
        if shared:
            each = [item_scores(r) - base[r.config["seed"]] for r in shared]
            items = 100 * pandas.concat(each, axis=1).mean(axis=1).dropna()
            parts = {task: items[task] for task in ("vqa", "gqa", "nlvr")} | {"all three": items}
            rows.append(
                {"method": name_of(method), "items": len(items), "seeds": len(shared)}
                | {
                    task: "{:+.1f} [{:+.1f}, {:+.1f}]".format(*paired_bootstrap(differences))
                    for task, differences in parts.items()
                }
            )
    columns = ["method", "items", "seeds", "vqa", "gqa", "nlvr", "all three"]
    return pandas.DataFrame(rows, columns=columns)


def item_scores(record: Record) -> pandas.Series:
    """Score of every item of the run's predictions by (task, id); captions have none."""
    lines = (record.path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = pandas.DataFrame(map(json.loads, lines)).dropna(subset="score")
    return rows.set_index(["task", "id"])["score"].sort_index()


def width_table(records: list[Record]) -> pandas.DataFrame:
    rows = []
    for method, runs in by_method(records).items():
        for width in sorted({r.config["mlp_width"] for r in runs}):
            same = [r for r in runs if r.config["mlp_width"] == width]
            rows.append(
                {
                    "method": label(method, same),
                    "rate": f"{same[0].config['lr']:g}",
                    "width": width,
                    **metric_cells(same),
                    "trained parameters": same[0].metrics["trained_parameters"],
                }
            )
    return pandas.DataFrame(rows)


def width_figure(name: str, scale: str, records: list[Record], final: list[Record]) -> Picture:
    """Figure 6: mean and range over seeds by width; the adapters without an MLP as lines."""
    figure = Figure(figsize=(8, 4.5))
    axis = figure.subplots()
    for method, runs in by_method(records).items():
        widths = sorted({r.config["mlp_width"] for r in runs})
        values = [
            [100 * r.metrics[MAIN] for r in runs if r.config["mlp_width"] == w] for w in widths
        ]
        (line,) = axis.plot(widths, [numpy.mean(v) for v in values], "o-", label=name_of(method))
        low, high = zip(*((min(v), max(v)) for v in values), strict=True)
        axis.fill_between(widths, low, high, color=line.get_color(), alpha=0.15, lw=0)
    groups = by_method(final)
    for method, style in (("lora", ":"), ("dora", "--")):
        if method in groups:
            mean = mean_interval([100 * r.metrics[MAIN] for r in groups[method]])[0]
            axis.axhline(mean, color="gray", ls=style, label=name_of(method))
    axis.set_xscale("log", base=2)
    axis.set_xlabel("width of the MLP")
    axis.set_ylabel("test accuracy, %")
    axis.legend(frameon=False, fontsize=8)
    caption = (
        f"Test accuracy (mean of VQA, GQA, NLVR) by the MLP's width, mean and range over seeds; "
        f"{scale} (compare Figure 6)."
    )
    return Picture(f"{name}_width", caption, figure)


def _has_mlp(record: Record) -> bool:
    return record.metrics["mlp_parameters"] > 0
