"""Table 1 and Figure 5: how near generated images come to a style; the gate; half the rank."""

import matplotlib.image
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
)
from oplora.report.page import Picture, Section, Table
from oplora.report.statistics import mean_interval, shown
from oplora.runs import Record

SCALES = {"small": "tiny SDXL (small preset)", "paper": "SDXL 1.0 (paper preset)"}


def section(records: list[Record]) -> Section | None:
    """One part per preset and dataset; None where nothing was run."""
    mine = [r for r in records if r.config["experiment"] == "sdxl"]
    if not mine:
        return None
    result = Section("Text-to-image (Table 1)", [cited()])
    for preset in sorted({r.config["preset"] for r in mine}):
        runs = [r for r in mine if r.config["preset"] == preset]
        chosen, parts = rates(preset, [r for r in runs if r.config["fine_tune"]])
        result.parts += parts
        for dataset in sorted({_dataset(r) for r in runs if "images" in r.metrics}):
            result.parts += _parts(preset, dataset, runs, chosen)
    return result


def cited() -> Table:
    """The paper's own numbers."""
    return cited_table("sdxl_paper", "table1.yaml")


def rates(preset: str, runs: list[Record]) -> tuple[dict[str, float], list]:
    """The rates chosen by the held-out denoising loss (one dataset, the sweep's rank)."""
    swept = [r for r in runs if not r.config["measure"]]
    sweep = rates_of(swept, final_loss)
    if not sweep:
        return {}, []
    chosen, name = chosen_rates(sweep), f"sdxl_{preset}_rates"
    where = f"{', '.join(sorted({_dataset(r) for r in swept}))}; {SCALES[preset]}"
    caption = f"Held-out denoising loss after training, by learning rate; {where}."
    return chosen, [
        sensitivity(name, caption, sweep, "held-out denoising loss"),
        Table(name, f"{caption} The rate chosen for every dataset has a star.",
              rate_table(sweep, chosen)),
    ]  # fmt: skip


def _parts(preset: str, dataset: str, records: list[Record], chosen: dict[str, float]) -> list:
    scale, name = f"{dataset}, {SCALES[preset]}", f"sdxl_{preset}_{dataset}"
    measured = [
        r for r in records
        if "images" in r.metrics
        and (not r.config["fine_tune"] or _at(chosen, r))
        and _dataset(r) == dataset
    ]  # fmt: skip
    base = [r for r in measured if not r.config["fine_tune"]]
    tuned = [r for r in measured if r.config["fine_tune"]]
    ranks = sorted({r.config["rank"] for r in tuned})
    main = [r for r in tuned if r.config["rank"] == _main_rank(tuned)]
    whole = [r for r in main if not _is_control(r)]
    groups = by_method(whole)
    parts: list = [
        Table(name, f"{scale}: distance of generated images to real ones of the style (lower is "
              "nearer), mean ± 95% interval (seeds); each method at its chosen rate.",
              results(base, main)),
    ]  # fmt: skip
    if base:
        caption = f"{scale}: can this base model measure style at all? Fixed before the comparison."
        parts.append(Table(f"{name}_gate", caption, gate(base[0], groups)))
    if groups:
        parts.append(grid(f"{name}_grid", scale, base, groups))
        loss = "held-out denoising loss"
        parts.append(curves(f"{name}_curves", f"{loss.capitalize()} during training; {scale}.",
                            groups, lambda r: r.metrics["validation_loss"], loss))  # fmt: skip
        parts.append(curves(f"{name}_steps", f"Distance to the style during training; {scale}.",
                            groups, distance_by_step, _metric(whole[0])))  # fmt: skip
    if len(ranks) > 1:
        parts.append(Table(f"{name}_ranks", f"{scale}: OP-LoRA at half of LoRA's rank.",
                           by_rank([r for r in tuned if not _is_control(r)])))  # fmt: skip
    return parts


def results(base: list[Record], tuned: list[Record]) -> pandas.DataFrame:
    """Yardsticks first (nothing is trained), then the methods, then the control."""
    rows = []
    for r in base:
        metric = _metric(r)
        if sticks := r.metrics.get("yardsticks"):
            floor, gap = f"{sticks['floor']:.2f}", _with_interval(sticks["gap"], metric)
            rows.append({"method": "real images of the style, half to half", metric: floor})
            rows.append({"method": "real images of the base's style", metric: gap})
        rows.append({"method": "base model", metric: _with_interval(r.metrics["images"], metric)})
    for control in (False, True):
        for method, runs in by_method([r for r in tuned if _is_control(r) == control]).items():
            metric = _metric(runs[0])
            rows.append(
                {
                    "method": NAMES[method] + (", trained on the base's style" if control else ""),
                    "rate": f"{runs[0].config['lr']:g}",
                    metric: shown([r.metrics["images"][metric] for r in runs], 2),
                    "held-out loss": shown([x for r in runs if (x := final_loss(r))], 4),
                    **cost_cells(runs),
                }
            )
    return pandas.DataFrame(rows)


def gate(base: Record, groups: dict[str, list[Record]]) -> pandas.DataFrame:
    """(a) the base draws its own style; (b) full fine-tuning and LoRA move it to the new one.

    (b) asks for an interval over images (of the method's worst seed) wholly below the base's.
    """
    metric, sticks = _metric(base), base.metrics.get("yardsticks")
    rows = []
    if sticks:
        own, gap = sticks["base"][metric], sticks["gap"][metric]
        rows.append(
            {
                "condition": "(a) the base's images are nearer to real ones of its own style than "
                "real ones of the new style are",
                "measured": f"{own:.2f} against {gap:.2f}",
                "holds": "yes" if own < gap else "no",
            }
        )
    for method in ("full", "lora"):
        runs = groups.get(method)
        low, value = base.metrics["images"][f"{metric}_low"], base.metrics["images"][metric]
        row = {"condition": f"(b) {NAMES[method]} comes clearly nearer to the new style"}
        if runs:
            mean = mean_interval([r.metrics["images"][metric] for r in runs])[0]
            row["measured"] = f"{mean:.2f} against {value:.2f} without fine-tuning"
            worst = max(r.metrics["images"][f"{metric}_high"] for r in runs)
            row["holds"] = "yes" if worst < low else "no"
        rows.append(row)
    return pandas.DataFrame(rows)


def by_rank(tuned: list[Record]) -> pandas.DataFrame:
    """LoRA and OP-LoRA at every rank that was run."""
    rows = []
    for method in ("lora", "oplora"):
        runs = [r for r in tuned if r.config["method"]["name"] == method]
        for rank in sorted({r.config["rank"] for r in runs}):
            same = [r for r in runs if r.config["rank"] == rank]
            metric = _metric(same[0])
            rows.append(
                {
                    "method": NAMES[method],
                    "rank": rank,
                    metric: shown([r.metrics["images"][metric] for r in same], 2),
                    "held-out loss": shown([x for r in same if (x := final_loss(r))], 4),
                    "shipped parameters": same[0].metrics["adapter_parameters"],
                }
            )
    return pandas.DataFrame(rows)


def distance_by_step(record: Record) -> list:
    metric = _metric(record)
    snapshots = record.metrics["snapshots"].items()
    return sorted((int(step), figures[metric]) for step, figures in snapshots)


def grid(name: str, scale: str, base: list[Record], groups: dict[str, list[Record]]) -> Picture:
    """Real images, the base model's and every method's for the same captions and noise."""
    strips = []
    for label, record, file in (
        ("real", next(iter(groups.values()))[0], "reference.png"),
        *(("base model", r, "samples.png") for r in base[:1]),
        *((NAMES[method], runs[0], "samples.png") for method, runs in groups.items()),
    ):
        if (path := record.path / file).exists():
            strips.append((label, matplotlib.image.imread(path)))
    figure = Figure(figsize=(9, 0.95 * len(strips)))
    for axis, (label, image) in zip(
        figure.subplots(len(strips), squeeze=False)[:, 0], strips, strict=True
    ):
        axis.imshow(image, interpolation="nearest", aspect="equal")
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    captions = ", ".join(next(iter(groups.values()))[0].metrics["captions"])
    return Picture(name, f"The same captions and noise for all; {scale}: {captions}.", figure)


def _with_interval(figures: dict[str, float], metric: str) -> str:
    low, high = figures[f"{metric}_low"], figures[f"{metric}_high"]
    return f"{figures[metric]:.2f} [{low:.2f}, {high:.2f}]"


def _dataset(record: Record) -> str:
    """The style that is to be learned: a control belongs to it."""
    return record.config["dataset"]["name"].removesuffix("_control")


def _is_control(record: Record) -> bool:
    return record.config["dataset"]["name"].endswith("_control")


def _metric(record: Record) -> str:
    return record.config["distance"]["name"]


def _at(chosen: dict[str, float], record: Record) -> bool:
    """Run at the chosen rate; where there was no sweep every rate counts."""
    rate = record.config["lr"]
    return chosen.get(record.config["method"]["name"], rate) == rate


def _main_rank(tuned: list[Record]) -> int | None:
    """The rank at which most methods were run."""
    methods = {}
    for r in tuned:
        methods.setdefault(r.config["rank"], set()).add(r.config["method"]["name"])
    return max(methods, key=lambda rank: len(methods[rank]), default=None)
