"""Table 4: what a photo shows, named by LLaVA; ranks, and the MLP's width with its cost."""

import json

import pandas

from oplora.report.claims import better
from oplora.report.comparison import Comparison, final_loss
from oplora.report.experiment import Experiment, Score
from oplora.report.figures import loss_curves, rate_parts
from oplora.report.page import Part, Row
from oplora.report.tables import (
    Column,
    cells,
    grouped_table,
    paired_table,
    results_table,
    signed,
)
from oplora.report.titles import by_method, method
from oplora.runs import Record

ACCURACY = Score("accuracy", "points of accuracy", cited="rank {rank}")
COLUMNS = (
    Column("top-1", "accuracy"),
    Column("top-1, exact", "exact_accuracy"),
    Column("test NLL", "test_nll", 3, 1),
)


def parts(c: Comparison, base: list[Record]) -> list[Part]:
    name, scope, at_rank = c.name, c.scope, f"{c.scope}, rank {c.rank}"
    final = by_method(r for runs in c.at_best.values() for r in runs if is_scored(r))
    found: list[Part] = [
        f"{scope}. Only the projector is adapted; full fine-tuning trains the whole projector. "
        "The learning rate of every method is the one with the lowest validation loss; the test "
        "set is scored at that rate only. An answer counts if the label is the longest one found "
        "in it, or (exact) if it is the label and nothing else."
    ]
    if c.sweep:
        caption = f"Validation loss after training, by learning rate; {at_rank}."
        found += rate_parts(c, caption, "validation loss")
    if final:
        found += [
            results_table(
                name,
                f"{at_rank}: test set, mean ± 95% interval (seeds). Accuracies in percent, NLL in "
                "nats per token of the label.",
                final,
                COLUMNS,
                first=untrained(next(iter(final.values()))[0], base),
            ),
            paired_table(
                f"{name}_paired",
                f"{at_rank}: difference to LoRA on the same test images (mean over shared seeds) "
                "[95% bootstrap interval over images].",
                final,
                image_scores,
                differences,
                ["method", "images", "seeds", "top-1", "NLL"],
            ),
        ]
    if any(r.metrics["validation_loss"] for runs in final.values() for r in runs):
        caption = f"Validation loss during training; {scope}."
        found.append(loss_curves(f"{name}_curves", caption, c.at_best, "validation loss"))
    return found + rank_and_width_parts(c)


def rank_and_width_parts(c: Comparison) -> list[Part]:
    every = [
        r for r in c.at_chosen_rate(c.every)
        if is_scored(r) and method(r.config["method"]["name"]).role != "control"
    ]  # fmt: skip
    found: list[Part] = []
    if len({r.config["rank"] for r in every}) > 1:
        usual_width = c.records[0].config["mlp_width"]
        adapters = [r for r in every if r.metrics["adapter_parameters"]]
        ranks = [r for r in adapters if r.config["mlp_width"] == usual_width]
        caption = f"{c.scope}: ranks, at the rates chosen for rank {c.rank}; test set."
        found.append(grouped_table(f"{c.name}_ranks", caption, ranks, "rank", COLUMNS))
    widths = [r for r in every if r.metrics["mlp_parameters"] and r.config["rank"] == c.rank]
    if len({r.config["mlp_width"] for r in widths}) > 1:
        caption = (
            f"{c.scope}, rank {c.rank}: the MLP's width, at the rate chosen for the usual one; "
            "test set."
        )
        found.append(grouped_table(f"{c.name}_width", caption, widths, "mlp_width", COLUMNS))
    return found


def untrained(any_run: Record, base: list[Record]) -> list[Row]:
    """What needs no training."""
    metrics = any_run.metrics
    chance, majority = (f"{100 * metrics[key]:.1f}" for key in ("chance", "majority"))
    rows = [
        Row({"method": "chance", "rate": None, "top-1": chance}, [any_run]),
        Row({"method": "always the most frequent class", "top-1": majority}, [any_run]),
    ]
    if base:
        zero_shot = {"method": "zero-shot (no fine-tuning)", **cells(COLUMNS, base[:1])}
        rows.append(Row(zero_shot, base[:1]))
    return rows


def image_scores(record: Record) -> pandas.DataFrame:
    """correct (0 or 1) and nll of every test image by its id."""
    lines = (record.path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = pandas.DataFrame(map(json.loads, lines)).set_index("id")
    correct = (rows["found"] == rows["label"]).astype(float)
    return pandas.DataFrame({"correct": correct, "nll": rows["nll"]})


def differences(images: pandas.DataFrame) -> dict[str, str]:
    return {"top-1": signed(100 * images["correct"], 1), "NLL": signed(images["nll"], 3)}


def is_scored(record: Record) -> bool:
    return "accuracy" in record.metrics


EXPERIMENT = Experiment(
    name="llava_cars",
    order=4,
    title="Recognition through the projector (Table 4)",
    paper="table4.yaml",
    loss=final_loss,
    scores=(ACCURACY,),
    parts=parts,
    theses=(better("OP-LoRA is better than LoRA", "5.3, Table 4", "oplora", "lora"),),
    readme=("llava_cars_small",),
)
