"""Table 1 and Figure 5: how near generated images come to a style; the gate; half the rank."""

from collections.abc import Mapping
from dataclasses import replace

from oplora.harness.runs import Record
from oplora.report import titles
from oplora.report.claims import better
from oplora.report.comparison import Comparison, final_loss, usual
from oplora.report.experiment import Experiment, FineTuning, is_tuned
from oplora.report.figures import Curves, over_training, rate_parts, strips
from oplora.report.metrics import Column, Score
from oplora.report.page import Part, ReportFigure, Row, Table
from oplora.report.rates import trained
from oplora.report.statistics import mean_interval
from oplora.report.tables import COSTS, Groups, cited_scores, grouped_rows, method_row
from oplora.report.titles import by_method, method_of, title

LOSS = "held-out denoising loss"
HELD_OUT = Column("held-out loss", final_loss, 4, 1)
SECOND = "second text, Table 1"
SCALES = (
    "At the paper's scale q, k, v and the output of the attention layers are adapted at a constant "
    "learning rate. The small preset adapts all linear layers of the U-Net's transformers, with a "
    "cosine schedule, and its learning rates are chosen on one of the styles. The style called "
    "blobs (Google's of 2017) is not new to the base model: 8% of its training images had it, "
    "under a word that the captions here lack."
)


def comparisons(records: list[Record]) -> list[Comparison]:
    """One per preset and dataset; the rates were chosen on one dataset for all of them."""
    tuned = [r for r in records if is_tuned(r)]
    found = []
    for preset, dataset in sorted({_scale(r) for r in tuned}):
        swept = [r for r in tuned if is_swept(r) and r.config["preset"] == preset]
        every = [r for r in tuned if _scale(r) == (preset, dataset) and not is_control(r)]
        measured = [r for r in every if "images" in r.metrics] or every
        comparison = Comparison(
            experiment="sdxl",
            preset=preset,
            name=f"sdxl_{preset}_{dataset}",
            records=usual(measured),
            every=measured,
            base=[r for r in records if not is_tuned(r) and _scale(r) == (preset, dataset)],
            swept=swept,
            sweep_name=f"sdxl_{preset}_rates",
            swept_elsewhere=dataset not in {dataset_of(r) for r in swept},
            loss=final_loss,
            score=Score(distance_of(every[0]), image_distance, 2, 1, higher=False),
            cited=cited_scores("table1.yaml"),  # the mean of both sets
            variant=dataset,
            override=f"dataset={dataset}",
        )
        base = comparison.base
        rows = gate(base[0], comparison.at_best) if base else []
        fails = any(row.cells.get("holds") == "no" for row in rows)
        found.append(replace(comparison, gate="the gate does not hold" if fails else ""))
    return found


def body(results: FineTuning) -> list[Part]:
    """For each preset its sweep, then the parts of each dataset."""
    parts: list[Part] = []
    for preset in sorted({r.config["preset"] for r in results.records}):
        scope = titles.preset("sdxl", preset)
        runs = [r for r in results.records if r.config["preset"] == preset]
        compared = {c.variant: c for c in results.comparisons if c.preset == preset}
        if swept := [r for r in runs if is_swept(r)]:
            styles = ", ".join(sorted({dataset_of(r) for r in swept}))
            caption = "Held-out denoising loss after training, by learning rate"
            any_comparison = next(iter(compared.values()))  # all share the sweep
            parts += rate_parts(any_comparison, f"{caption}; {styles}; {scope}.", LOSS)
        for dataset in sorted({dataset_of(r) for r in runs if "images" in r.metrics}):
            measured = [r for r in runs if "images" in r.metrics and dataset_of(r) == dataset]
            parts += dataset_parts(f"{dataset}, {scope}", measured, compared.get(dataset))
    return parts


def dataset_parts(scope: str, measured: list[Record], c: Comparison | None) -> list[Part]:
    """measured: with the base model's and the control's runs, which are not compared."""
    name = "_".join(("sdxl", *_scale(measured[0])))
    base = [r for r in measured if not is_tuned(r)]
    controls = [r for r in measured if is_control(r) and is_tuned(r)]
    groups = c.at_best if c else {}
    rows = [row for r in base for row in yardsticks(r)]
    rows += [method_row(m, runs, (c.score, HELD_OUT)) for m, runs in groups.items()]
    for method, runs in by_method(controls).items():  # held-out images of the other style: no loss
        row = method_row(method, runs, [c.score])
        row.cells["method"] += ", trained on the base's style"
        rows.append(row)
    caption = (
        f"{scope}: distance of generated images to real ones of the style (lower is nearer), "
        "each method at its chosen rate: mean ± 95% interval (seeds). Brackets: 95% bootstrap "
        "interval over images. Held-out loss: on the new style."
    )
    higher = {distance_of(measured[0]): False, HELD_OUT.title: False}
    parts: list[Part] = [Table(name, caption, rows, details=COSTS, higher=higher)]
    if base:
        caption = f"{scope}: can this base model measure style at all? Fixed before the comparison."
        parts.append(Table(f"{name}_gate", caption, gate(base[0], groups)))
    if groups:
        losses = Curves("Held-out denoising loss during training", ylabel=LOSS)
        distances = Curves("Distance to the style during training", distance_by_step, c.score.unit)
        parts += [
            grid(f"{name}_grid", scope, base, groups),
            over_training(f"{name}_curves", groups, losses, scope),
            over_training(f"{name}_steps", groups, distances, scope),
        ]
    if c and len({r.config["rank"] for r in trained(c.every)}) > 1:
        runs = [r for r in c.at_chosen_rate(c.every) if method_of(r) in ("lora", "oplora")]
        columns = ("method", "rank", c.score.unit, HELD_OUT.title, "shipped parameters")
        rows = grouped_rows(runs, "rank", (c.score, HELD_OUT))
        caption = f"{scope}: OP-LoRA at half of LoRA's rank."
        parts.append(Table(f"{name}_ranks", caption, rows, columns))
    return parts


def yardsticks(base: Record) -> list[Row]:
    """Distances without any training."""
    metric, sticks = distance_of(base), base.metrics.get("yardsticks")
    rows = [("base model", _with_interval(base.metrics["images"], metric))]
    if sticks:
        rows = [
            ("real images of the style, half to half", f"{sticks['floor']:.2f}"),
            ("real images of the base's style", _with_interval(sticks["gap"], metric)),
            *rows,
        ]
    return [Row({"method": what, metric: cell}, [base]) for what, cell in rows]


def gate(base: Record, groups: Groups) -> list[Row]:
    """(a) the base draws its own style; (b) full fine-tuning and LoRA move it to the new one.

    (b) asks for an interval over images (of the method's worst seed) wholly below the base's.
    """
    metric, sticks = distance_of(base), base.metrics.get("yardsticks")
    rows = []
    if sticks:
        own, gap = sticks["base"][metric], sticks["gap"][metric]
        cells = {
            "condition": "(a) the base's images are nearer to real ones of its own style than "
            "real ones of the new style are",
            "measured": f"{own:.2f} against {gap:.2f}",
            "holds": "yes" if own < gap else "no",
        }
        rows.append(Row(cells, [base]))
    low, value = base.metrics["images"][f"{metric}_low"], base.metrics["images"][metric]
    for method in ("full", "lora"):
        cells = {"condition": f"(b) {title(method)} comes clearly nearer to the new style"}
        runs = groups.get(method, [])
        if runs:
            mean = mean_interval([r.metrics["images"][metric] for r in runs])[0]
            worst = max(r.metrics["images"][f"{metric}_high"] for r in runs)
            cells["measured"] = (
                f"{mean:.2f} (worst seed's interval to {worst:.2f}) against {value:.2f} (from "
                f"{low:.2f}) without fine-tuning"
            )
            cells["holds"] = "yes" if worst < low else "no"
        rows.append(Row(cells, [base, *runs]))
    return rows


def image_distance(record: Record) -> float | None:
    images = record.metrics.get("images")
    return images and images[distance_of(record)]


def distance_by_step(record: Record) -> list[tuple[int, float]]:
    metric = distance_of(record)
    snapshots = record.metrics["snapshots"].items()
    return sorted((int(step), distances[metric]) for step, distances in snapshots)


def grid(name: str, scope: str, base: list[Record], groups: Groups) -> ReportFigure:
    """Real images, the base model's and every method's for the same captions and noise."""
    any_run = next(iter(groups.values()))[0]
    files = {"real": any_run.path / "reference.png"}
    if base:
        files["base model"] = base[0].path / "samples.png"
    files |= {title(method): runs[0].path / "samples.png" for method, runs in groups.items()}
    captions = ", ".join(any_run.metrics["captions"])
    told = f"The same captions and noise for all; {scope}: {captions}."
    return strips(name, told, files)


def _with_interval(distances: Mapping[str, float], metric: str) -> str:
    low, high = distances[f"{metric}_low"], distances[f"{metric}_high"]
    return f"{distances[metric]:.2f} [{low:.2f}, {high:.2f}]"


def _scale(record: Record) -> tuple[str, str]:
    return record.config["preset"], dataset_of(record)


def dataset_of(record: Record) -> str:
    """The style that is to be learned: a control belongs to it."""
    return record.config["dataset"]["name"].removesuffix("_control")


def is_control(record: Record) -> bool:
    """Trained on the base's own style."""
    return record.config["dataset"]["name"].endswith("_control")


def distance_of(record: Record) -> str:
    return record.config["distance"]["name"]


def is_swept(record: Record) -> bool:
    """Trained for the choice of a learning rate only."""
    return is_tuned(record) and not record.config["measure"]


EXPERIMENT = Experiment(
    name="sdxl",
    order=2,
    title="Text-to-image (Table 1)",
    paper="table1.yaml",
    loss=final_loss,
    intro=(SCALES,),
    compare=comparisons,
    body=body,
    theses=(
        better("OP-LoRA is better than LoRA", "5.1, Table 1", "oplora", "lora"),
        better("OP-DoRA is better than DoRA", "5.1, Table 1", "opdora", "dora"),
        better("OP-LoRA is better than LoRA-GA", SECOND, "oplora", "lora_ga"),
        better("OP-LoRA is better than LoRA-Pro", SECOND, "oplora", "lora_pro"),
        better("OP-LoRA is better than ScaledAdamW", SECOND, "oplora", "riemannian"),
        better("LoRA is better than DoRA", "5.1 (not Table 1)", "lora", "dora"),
        better("LoRA is better than PiSSA", "5.1 (not Table 1)", "lora", "pissa"),
    ),
    readme=("sdxl_small_twemoji", "sdxl_small_blobs"),
)
