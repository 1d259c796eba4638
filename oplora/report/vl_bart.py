"""Table 3, Figures 1d and 6: VL-BART on four tasks at once, and the MLP's width."""

import json

import numpy
import pandas
from matplotlib.figure import Figure

from oplora.report.methods import (
    NAMES,
    by_method,
    chosen_rates,
    cited_table,
    cost_cells,
    curves,
    final_loss,
    rate_table,
    rates_of,
    sensitivity,
    trained,
)
from oplora.report.page import Picture, Section, Table
from oplora.report.statistics import mean_interval, paired_bootstrap, shown
from oplora.runs import Record

SCALES = {"small": "a tiny BART on easy-vqa (small preset)", "paper": "BART-base (paper preset)"}
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
    mine = [r for r in records if r.config["experiment"] == "vl_bart"]
    if not mine:
        return None
    result = Section("Vision and language, four tasks at once (Table 3)", [cited()])
    for preset in sorted({r.config["preset"] for r in mine}):
        result.parts += _parts(preset, [r for r in mine if r.config["preset"] == preset])
    return result


def cited() -> Table:
    """The paper's own numbers."""
    return cited_table("vl_bart_paper", "table3.yaml")


def _parts(preset: str, records: list[Record]) -> list:
    name, scale = f"vl_bart_{preset}", SCALES[preset]
    usual = [r for r in records if r.config["mlp_width"] == usual_width(r)]
    sweep = rates_of(usual, final_loss)
    chosen = chosen_rates(sweep)
    records, usual = trained(records), trained(usual)
    final = [r for r in usual if "average" in r.metrics and _at(chosen, r)]
    caption = f"Validation loss after training, by learning rate; {scale}."
    parts: list = [
        f"{scale[0].upper()}{scale[1:]}. The learning rate of every method is the one with the "
        "lowest validation loss (mean over seeds and all four tasks' items); the test set is "
        "scored at that rate only.",
        sensitivity(f"{name}_rates", caption, sweep, "validation loss"),
        Table(f"{name}_rates", f"{caption} The chosen rate has a star.", rate_table(sweep, chosen)),
    ]
    if final:
        parts += [
            Table(name, f"{scale}: test set, mean ± 95% interval (seeds). Accuracies in percent, "
                  "CIDEr × 100.", results(final)),
            Table(f"{name}_paired", f"{scale}: difference to LoRA in points on the same test items "
                  "(mean over shared seeds) [95% bootstrap interval over items].", paired(final)),
        ]  # fmt: skip
    if any(r.metrics["epochs"] for r in usual):
        parts.append(
            curves(
                f"{name}_epochs",
                "Validation accuracy (mean of VQA, GQA, NLVR) by epoch, each method at its chosen "
                f"rate (mean and range over seeds; epoch 0 is the base model); {scale}.",
                by_method([r for r in usual if _at(chosen, r)]),
                accuracy_by_epoch,
                "accuracy, %",
                "epoch",
            )
        )
    widths = [r for r in records if _has_mlp(r) and "average" in r.metrics and _at(chosen, r)]
    if len({r.config["mlp_width"] for r in widths}) > 2:
        parts += [
            width_figure(name, scale, widths, final),
            Table(f"{name}_width", f"{scale}: the MLP's width, at the rate chosen for the usual "
                  "one; test set, mean ± 95% interval (seeds).", width_table(widths)),
        ]  # fmt: skip
    return parts


def usual_width(record: Record) -> int:
    """The method's width in Table 6."""
    widths = record.config["widths"]
    return widths.get(record.config["method"]["name"], widths["default"])


def accuracy_by_epoch(record: Record) -> list:
    return [(epoch, 100 * metrics[MAIN]) for epoch, metrics in record.metrics["epochs"]]


def results(final: list[Record]) -> pandas.DataFrame:
    return pandas.DataFrame(
        [
            {
                "method": NAMES[method],
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
                {"method": NAMES[method], "items": len(items), "seeds": len(shared)}
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
                    "method": NAMES[method],
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
        (line,) = axis.plot(widths, [numpy.mean(v) for v in values], "o-", label=NAMES[method])
        low, high = zip(*((min(v), max(v)) for v in values), strict=True)
        axis.fill_between(widths, low, high, color=line.get_color(), alpha=0.15, lw=0)
    groups = by_method(final)
    for method, style in (("lora", ":"), ("dora", "--")):
        if method in groups:
            mean = mean_interval([100 * r.metrics[MAIN] for r in groups[method]])[0]
            axis.axhline(mean, color="gray", ls=style, label=NAMES[method])
    axis.set_xscale("log", base=2)
    axis.set_xlabel("width of the MLP")
    axis.set_ylabel("test accuracy, %")
    axis.legend(frameon=False, fontsize=8)
    caption = (
        f"Test accuracy (mean of VQA, GQA, NLVR) by the MLP's width, mean and range over seeds; "
        f"{scale} (compare Figure 6)."
    )
    return Picture(f"{name}_width", caption, figure)


def _at(chosen: dict[str, float], record: Record) -> bool:
    return chosen.get(record.config["method"]["name"]) == record.config["lr"]


def _has_mlp(record: Record) -> bool:
    return record.metrics["mlp_parameters"] > 0
