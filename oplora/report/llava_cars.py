"""Table 4: what a photo shows, named by LLaVA; ranks, and the MLP's width with its cost."""

import json

import pandas

from oplora.harness.runs import Record
from oplora.report.comparison import Comparison, usual
from oplora.report.methods import (
    CONTROLS,
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
from oplora.report.page import Section, Table
from oplora.report.statistics import paired_bootstrap, shown

CITED_RANKS = (16, 64)


def section(records: list[Record]) -> Section | None:
    """One part per preset; None where nothing was run."""
    mine = [r for r in records if r.config["experiment"] == "llava_cars"]
    if not mine:
        return None
    result = Section("Recognition through the projector (Table 4)", [cited()])
    for c in comparisons(records):
        base = [r for r in mine if _is_base(r) and r.config["preset"] == c.preset]
        result.parts += _parts(c, base)
    return result


def comparisons(records: list[Record]) -> list[Comparison]:
    """One per preset, at the rank at which most methods were run, by the search for the label."""
    mine = [r for r in records if r.config["experiment"] == "llava_cars" and not _is_base(r)]
    found = []
    for preset in sorted({r.config["preset"] for r in mine}):
        every = [r for r in mine if r.config["preset"] == preset]
        chosen = [r for r in every if usual(r, every)]
        rank = chosen[0].config["rank"]
        found.append(
            Comparison(
                experiment="llava_cars",
                preset=preset,
                name=f"llava_cars_{preset}",
                records=chosen,
                every=every,
                loss=final_loss,
                score=lambda r: 100 * r.metrics["accuracy"] if "accuracy" in r.metrics else None,
                metric="points of accuracy",
                cited=cited_scores("table4.yaml", f"rank {rank}") if rank in CITED_RANKS else {},
            )
        )
    return found


def cited() -> Table:
    """The paper's own numbers."""
    return cited_table("llava_cars_paper", "table4.yaml")


def _parts(c: Comparison, base: list[Record]) -> list:
    name, scale = c.name, c.scope
    final = [r for runs in c.at_best.values() for r in runs if _is_scored(r)]
    every = [
        r for r in trained(c.every)
        if _is_scored(r)
        and c.chosen.get(r.config["method"]["name"], r.config["lr"]) == r.config["lr"]
        and r.config["method"]["name"] not in CONTROLS
    ]  # fmt: skip
    caption = f"Validation loss after training, by learning rate; {scale}, rank {c.rank}."
    parts: list = [
        f"{scale}. Only the projector is adapted; full fine-tuning trains the whole projector. "
        "The learning rate of every method is the one with the lowest validation loss; the test "
        "set is scored at that rate only. An answer counts if the label is the longest one found "
        "in it, or (exact) if it is the label and nothing else."
    ]
    if c.sweep:
        parts += rate_parts(f"{name}_rates", caption, c.sweep, "validation loss")
    if final:
        parts += [
            Table(name, f"{scale}, rank {c.rank}: test set, mean ± 95% interval (seeds). "
                  "Accuracies in percent, NLL in nats per token of the label.",
                  results(base, final)),
            Table(f"{name}_paired", f"{scale}, rank {c.rank}: difference to LoRA on the same test "
                  "images (mean over shared seeds) [95% bootstrap interval over images].",
                  paired(final)),
        ]  # fmt: skip
    if any(r.metrics["validation_loss"] for r in final):
        loss = "validation loss"
        parts.append(curves(f"{name}_curves", f"{loss.capitalize()} during training; {scale}.",
                            c.at_best, lambda r: r.metrics["validation_loss"], loss))  # fmt: skip
    if len({r.config["rank"] for r in every}) > 1:
        usual_width = c.records[0].config["mlp_width"]
        adapters = [r for r in every if r.metrics["adapter_parameters"]]
        ranks = [r for r in adapters if r.config["mlp_width"] == usual_width]
        parts.append(Table(f"{name}_ranks", f"{scale}: ranks, at the rates chosen for rank "
                           f"{c.rank}; test set.", grouped(ranks, "rank", "rank")))  # fmt: skip
    widths = [r for r in every if r.metrics["mlp_parameters"] and r.config["rank"] == c.rank]
    if len({r.config["mlp_width"] for r in widths}) > 1:
        parts.append(Table(f"{name}_width", f"{scale}, rank {c.rank}: the MLP's width, at the rate "
                           "chosen for the usual one; test set.",
                           grouped(widths, "mlp_width", "width")))  # fmt: skip
    return parts


def results(base: list[Record], final: list[Record]) -> pandas.DataFrame:
    """First what needs no training, then the methods."""
    any_run = final[0].metrics
    rows = [
        {"method": "chance", "top-1": f"{100 * any_run['chance']:.1f}"},
        {"method": "always the most frequent class", "top-1": f"{100 * any_run['majority']:.1f}"},
    ]
    if base:
        rows.append({"method": "zero-shot (no fine-tuning)", **metric_cells(base[:1])})
    for method, runs in by_method(final).items():
        rows.append(
            {
                "method": label(method, runs),
                "rate": f"{runs[0].config['lr']:g}",
                **metric_cells(runs),
                **cost_cells(runs),
            }
        )
    frame = pandas.DataFrame(rows, dtype=object)  # whole numbers beside missing ones
    first = ["method", "rate"]
    return frame[first + [column for column in frame if column not in first]]


def metric_cells(runs: list[Record]) -> dict[str, str | None]:
    return {
        "top-1": shown([r.metrics["accuracy"] for r in runs], 1, 100),
        "top-1, exact": shown([r.metrics["exact_accuracy"] for r in runs], 1, 100),
        "test NLL": shown([r.metrics["test_nll"] for r in runs], 3),
    }


def paired(final: list[Record]) -> pandas.DataFrame:
    """Accuracy and NLL minus LoRA's, image by image."""
    methods, rows = by_method(final), []
    base = {r.config["seed"]: image_scores(r) for r in methods.get("lora", [])}
    for method, runs in methods.items():
        shared = [r for r in runs if method != "lora" and r.config["seed"] in base]
        if shared:
            each = [image_scores(r) - base[r.config["seed"]] for r in shared]
            images = pandas.concat(each).groupby(level=0).mean()
            rows.append(
                {
                    "method": name_of(method),
                    "images": len(images),
                    "seeds": len(shared),
                    "top-1": "{:+.1f} [{:+.1f}, {:+.1f}]".format(
                        *paired_bootstrap(100 * images["correct"])
                    ),
                    "NLL": "{:+.3f} [{:+.3f}, {:+.3f}]".format(*paired_bootstrap(images["nll"])),
                }
            )
    return pandas.DataFrame(rows, columns=["method", "images", "seeds", "top-1", "NLL"])


def image_scores(record: Record) -> pandas.DataFrame:
    """correct (0 or 1) and nll of every test image by its id."""
    lines = (record.path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = pandas.DataFrame(map(json.loads, lines)).set_index("id")
    correct = (rows["found"] == rows["label"]).astype(float)
    return pandas.DataFrame({"correct": correct, "nll": rows["nll"]})


def grouped(records: list[Record], key: str, column: str) -> pandas.DataFrame:
    """Every method's results and costs by a number of the config."""
    rows = []
    for method, runs in by_method(records).items():
        for number in sorted({r.config[key] for r in runs}):
            same = [r for r in runs if r.config[key] == number]
            rows.append(
                {
                    "method": label(method, same),
                    "rate": f"{same[0].config['lr']:g}",
                    column: number,
                    **metric_cells(same),
                    **cost_cells(same),
                }
            )
    return pandas.DataFrame(rows)


def _is_base(record: Record) -> bool:
    return not record.config["fine_tune"]


def _is_scored(record: Record) -> bool:
    return "accuracy" in record.metrics
