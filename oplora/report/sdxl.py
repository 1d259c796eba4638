"""Table 1 and Figure 5: how near generated images come to a style; the gate; half the rank."""

from dataclasses import replace

import matplotlib.image
import pandas
from matplotlib.figure import Figure

from oplora.harness.runs import Record
from oplora.report.comparison import PLACES, Comparison, usual
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
    rates_of,
    shipped,
    trained,
)
from oplora.report.page import Picture, Section, Table
from oplora.report.statistics import mean_interval, shown

SCALES = (
    "At the paper's scale q, k, v and the output of the attention layers are adapted at a constant "
    "learning rate. The small preset adapts all linear layers of the U-Net's transformers, with a "
    "cosine schedule, and its learning rates are chosen on one of the styles."
)


def section(records: list[Record]) -> Section | None:
    """One part per preset and dataset; None where nothing was run."""
    mine = [r for r in records if r.config["experiment"] == "sdxl"]
    if not mine:
        return None
    result = Section("Text-to-image (Table 1)", [SCALES, cited()])
    compared = comparisons(records)
    for preset in sorted({r.config["preset"] for r in mine}):
        runs = [r for r in mine if r.config["preset"] == preset]
        swept = [r for r in runs if _is_swept(r)]
        if swept:
            where = f"{', '.join(sorted({_dataset(r) for r in swept}))}; {PLACES['sdxl'][preset]}"
            caption = f"Held-out denoising loss after training, by learning rate; {where}."
            sweep, loss = rates_of(swept, final_loss), "held-out denoising loss"
            result.parts += rate_parts(f"sdxl_{preset}_rates", caption, sweep, loss)
        for dataset in sorted({_dataset(r) for r in runs if "images" in r.metrics}):
            measured = [r for r in runs if "images" in r.metrics and _dataset(r) == dataset]
            own = [c for c in compared if (c.preset, c.variant) == (preset, dataset)]
            result.parts += _parts(f"{dataset}, {PLACES['sdxl'][preset]}", measured, *own)
    return result


def comparisons(records: list[Record]) -> list[Comparison]:
    """One per preset and dataset; the rates were chosen on one dataset for all of them."""
    tuned = [r for r in records if r.config["experiment"] == "sdxl" and r.config["fine_tune"]]
    found = []
    for preset, dataset in sorted({(r.config["preset"], _dataset(r)) for r in tuned}):
        runs = [r for r in tuned if r.config["preset"] == preset]
        swept = [r for r in runs if _is_swept(r)]
        every = [r for r in runs if _dataset(r) == dataset and not _is_control(r)]
        measured = [r for r in every if "images" in r.metrics] or every
        base = [
            r for r in records
            if r.config["experiment"] == "sdxl" and not r.config["fine_tune"]
            and (r.config["preset"], _dataset(r)) == (preset, dataset)
        ]  # fmt: skip
        found.append(
            _gated(
                base,
                experiment="sdxl",
                preset=preset,
                name=f"sdxl_{preset}_{dataset}",
                records=[r for r in measured if usual(r, measured)],
                every=measured,
                swept=swept,
                sweep_name=f"sdxl_{preset}_rates",
                swept_elsewhere=dataset not in {_dataset(r) for r in swept},
                loss=final_loss,
                score=lambda r: r.metrics["images"][_metric(r)] if "images" in r.metrics else None,
                metric=_metric(every[0]),
                digits=2,
                higher=False,
                variant=dataset,
                cited=cited_scores("table1.yaml"),  # the mean of both sets
            )
        )
    return found


def _gated(base: list[Record], **options) -> Comparison:
    """unfit where the base model was measured and its gate does not hold."""
    c = Comparison(**options)
    if base and "no" in gate(base[0], c.at_best).get("holds", pandas.Series()).tolist():
        return replace(c, unfit="the gate does not hold")
    return c


def cited() -> Table:
    """The paper's own numbers."""
    return cited_table("sdxl_paper", "table1.yaml")


def _parts(scale: str, measured: list[Record], c: Comparison | None = None) -> list:
    """measured: with the base model's and the control's runs, which are not compared."""
    r = measured[0]
    name = f"sdxl_{r.config['preset']}_{_dataset(r)}"
    base = [r for r in measured if not r.config["fine_tune"]]
    controls = [r for r in measured if _is_control(r) and r.config["fine_tune"]]
    groups = c.at_best if c else {}
    parts: list = [
        Table(name, f"{scale}: distance of generated images to real ones of the style (lower is "
              "nearer), each method at its chosen rate: mean ± 95% interval (seeds). Brackets: 95% "
              "bootstrap interval over images. Held-out loss: on the new style.",
              results(base, groups, by_method(controls))),
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
                            groups, distance_by_step, c.metric))  # fmt: skip
    if c and len({r.config["rank"] for r in trained(c.every)}) > 1:
        parts.append(Table(f"{name}_ranks", f"{scale}: OP-LoRA at half of LoRA's rank.",
                           by_rank(c)))  # fmt: skip
    return parts


def results(
    base: list[Record], groups: dict[str, list[Record]], controls: dict[str, list[Record]]
) -> pandas.DataFrame:
    """Yardsticks first (nothing is trained), then the methods, then the control."""
    rows = []
    for r in base:
        metric = _metric(r)
        if sticks := r.metrics.get("yardsticks"):
            floor, gap = f"{sticks['floor']:.2f}", _with_interval(sticks["gap"], metric)
            rows.append({"method": "real images of the style, half to half", metric: floor})
            rows.append({"method": "real images of the base's style", metric: gap})
        rows.append({"method": "base model", metric: _with_interval(r.metrics["images"], metric)})
    for note, methods in (("", groups), (", trained on the base's style", controls)):
        for method, runs in methods.items():
            metric = _metric(runs[0])
            rows.append(
                {
                    "method": label(method, runs) + note,
                    "rate": f"{runs[0].config['lr']:g}",
                    metric: shown([r.metrics["images"][metric] for r in runs], 2),
                    "held-out loss": None  # the control's held-out images are of the other style
                    if note
                    else shown([x for r in runs if (x := final_loss(r))], 4),
                    **cost_cells(runs),
                }
            )
    return pandas.DataFrame(rows, dtype=object)  # whole numbers beside missing ones


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
        row = {"condition": f"(b) {name_of(method)} comes clearly nearer to the new style"}
        if runs:
            mean = mean_interval([r.metrics["images"][metric] for r in runs])[0]
            worst = max(r.metrics["images"][f"{metric}_high"] for r in runs)
            row["measured"] = (
                f"{mean:.2f} (worst seed's interval to {worst:.2f}) against {value:.2f} (from "
                f"{low:.2f}) without fine-tuning"
            )
            row["holds"] = "yes" if worst < low else "no"
        rows.append(row)
    return pandas.DataFrame(rows)


def by_rank(c: Comparison) -> pandas.DataFrame:
    """LoRA and OP-LoRA at every rank that was run, at the rates chosen for the usual one."""
    rows = []
    for method in ("lora", "oplora"):
        runs = [
            r for r in trained(c.every)
            if r.config["method"]["name"] == method
            and c.chosen.get(method, r.config["lr"]) == r.config["lr"]
        ]  # fmt: skip
        for rank in sorted({r.config["rank"] for r in runs}):
            same = [r for r in runs if r.config["rank"] == rank]
            rows.append(
                {
                    "method": label(method, same),
                    "rank": rank,
                    c.metric: shown([c.score(r) for r in same], 2),
                    "held-out loss": shown([x for r in same if (x := final_loss(r))], 4),
                    "shipped parameters": shipped(same[0]),
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
    for title, record, file in (
        ("real", next(iter(groups.values()))[0], "reference.png"),
        *(("base model", r, "samples.png") for r in base[:1]),
        *((name_of(method), runs[0], "samples.png") for method, runs in groups.items()),
    ):
        if (path := record.path / file).exists():
            strips.append((title, matplotlib.image.imread(path)))
    figure = Figure(figsize=(9, 0.95 * len(strips)))
    for axis, (title, image) in zip(
        figure.subplots(len(strips), squeeze=False)[:, 0], strips, strict=True
    ):
        axis.imshow(image, interpolation="nearest", aspect="equal")
        axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
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


def _is_swept(record: Record) -> bool:
    """Trained for the choice of a learning rate only."""
    return record.config["fine_tune"] and not record.config["measure"]
