"""Table 2: commonsense reasoning, with the learning-rate sweep and the controls."""

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
    label,
    name_of,
    rate_parts,
)
from oplora.report.page import Section, Statement, Table
from oplora.report.statistics import mean_interval, paired_bootstrap, shown

NLL = "held-out nats per token"


def section(records: list[Record]) -> Section | None:
    """One part per preset; scales are never mixed. None where nothing was run."""
    compared = [c for c in comparisons(records) if c.metric == NLL]
    if not compared:
        return None
    parts = [part for c in compared for part in _parts(c)]
    return Section("Commonsense reasoning (Table 2)", [cited(), *parts])


def comparisons(records: list[Record]) -> list[Comparison]:
    """For each preset and type of the base weights: the paper's accuracy, and the finer NLL."""
    mine = [r for r in records if r.config["experiment"] == "commonsense"]
    found = []
    scales = sorted({_scale(r) for r in mine})
    for preset, dtype in scales:
        every = [r for r in mine if _scale(r) == (preset, dtype)]
        shared = dict(
            experiment="commonsense",
            preset=preset,
            name=f"commonsense_{preset}_{dtype}",
            records=[r for r in every if usual(r, every)],
            every=every,
            loss=lambda r: r.metrics.get("validation_nll"),
            variant=f"{dtype} weights" if len([s for s in scales if s[0] == preset]) > 1 else "",
        )
        found += [
            Comparison(
                **shared,
                score=lambda r: 100 * r.metrics["accuracy"] if "accuracy" in r.metrics else None,
                metric="points of accuracy",
                cited=cited_scores("table2.yaml", "average"),
            ),
            Comparison(
                **shared,
                score=lambda r: r.metrics.get("held_out_nll"),
                metric=NLL,
                higher=False,
                digits=3,
            ),
        ]
    return found


def _scale(record: Record) -> tuple[str, str]:
    """What may share a table: runs of one preset and one type of the base weights."""
    return record.config["preset"], record.config["model"]["dtype"]


def cited() -> Table:
    """The paper's own numbers."""
    return cited_table("commonsense_paper", "table2.yaml")


def _parts(c: Comparison) -> list:
    name, scale = c.name, c.scope
    final = [r for runs in c.at_best.values() for r in runs if "accuracy" in r.metrics]
    caption = f"Validation NLL after training, nats per token, by learning rate; {scale}."
    parts: list = [
        f"{scale}. The learning rate of every method is the one with the lowest validation NLL of "
        "its grid (of the same length for all); the test set is scored at that rate only.",
        *rate_parts(f"{name}_rates", caption, c.sweep, "validation NLL", margin=(0.05, 0.8)),
    ]
    if final:
        parts += [
            Table(name, f"{scale}: test set, mean ± 95% interval (seeds). "
                  "Accuracy in percent; NLL in nats per token of the correct answer.",
                  results(final)),
            Table(f"{name}_paired", f"{scale}: difference to LoRA on the same test "
                  "items (mean over shared seeds) [95% bootstrap interval over items].",
                  paired(final)),
            curves(
                f"{name}_curves",
                "Held-out loss during training, each method at its best rate (mean and range "
                f"over seeds); {scale}.",
                by_method(final),
                lambda r: r.metrics["validation_loss"],
                "validation loss",
            ),
        ]  # fmt: skip
        statement = beyond(final, c.chosen)
        if statement:
            parts.append(Statement(f"{name}_beyond", statement))
    return parts


def results(final: list[Record]) -> pandas.DataFrame:
    rows = []
    tasks = [k for k in final[0].metrics if k.startswith("accuracy_")]
    for method, runs in by_method(final).items():
        row = {"method": label(method, runs), "rate": f"{runs[0].config['lr']:g}"}
        row["held-out NLL"] = shown([r.metrics["held_out_nll"] for r in runs], 3)
        row["average"] = shown([r.metrics["accuracy"] for r in runs], 1, 100)
        for task in tasks:
            row[task.removeprefix("accuracy_")] = shown([r.metrics[task] for r in runs], 1, 100)
        row |= cost_cells(runs)
        rows.append(row)
    return pandas.DataFrame(rows)


def predictions(record: Record) -> dict[str, dict]:
    """Rows of the run's predictions by item."""
    lines = (record.path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def differences(runs: list[Record], base: list[Record]) -> pandas.DataFrame:
    """NLL and accuracy minus the base's for every test item, mean over the shared seeds."""
    theirs = {r.config["seed"]: predictions(r) for r in base}
    rows = []
    for r in runs:
        mine = predictions(r)
        for key, b in theirs.get(r.config["seed"], {}).items():
            if a := mine.get(key):
                row = {"item": key, "accuracy": a["correct"] - b["correct"]}
                if "logprobs" in a:
                    answer, tokens = a["answer"], a["tokens"][a["answer"]]
                    row["tokens"] = tokens
                    row["nll"] = (b["logprobs"][answer] - a["logprobs"][answer]) / tokens
                rows.append(row)
    return pandas.DataFrame(rows).groupby("item").mean() if rows else pandas.DataFrame()


def paired(final: list[Record]) -> pandas.DataFrame:
    """Every method's difference to LoRA, with 95% bootstrap intervals over items."""
    methods, rows = by_method(final), []
    for method, runs in methods.items():
        items = differences(runs, methods.get("lora", []))
        if method != "lora" and len(items):
            row = {"method": name_of(method), "items": len(items), "NLL": None}
            if "nll" in items:
                row["NLL"] = _signed(paired_bootstrap(items["nll"], items["tokens"]), 3)
            row["accuracy"] = _signed(paired_bootstrap(items["accuracy"] * 100), 1)
            rows.append(row)
    return pandas.DataFrame(rows, columns=["method", "items", "NLL", "accuracy"])


def beyond(final: list[Record], chosen: dict) -> str | None:
    """What OP-LoRA gives beyond a better learning rate and a larger first A.

    Against the best of LoRA and its controls, and against the control that shares its step sizes
    and its first A: there the difference is what the MLP's movement of h does.
    """
    methods = by_method(final)
    if not {"lora", "oplora"} <= set(methods):
        return None
    shown_methods = [m for m in ("lora", "oplora", *CONTROLS) if m in methods]
    nll = {m: [r.metrics["held_out_nll"] for r in methods[m]] for m in shown_methods}
    texts = [f"{name_of(m)} {shown(nll[m], 3)} at rate {chosen[m]:g}" for m in nll]
    best = min((m for m in nll if m != "oplora"), key=lambda m: mean_interval(nll[m])[0])
    sentences = [f"Held-out NLL, each at its own best rate: {'; '.join(texts)}."]
    rivals = {best: "The best of LoRA and its controls is"}
    rivals |= {"lora_matched_mlp_start": "The control with OP-LoRA's step sizes and first A is"}
    for method, which in rivals.items():
        if method in methods:
            items = differences(methods["oplora"], methods[method])
            value, low, high = paired_bootstrap(items["nll"], items["tokens"])
            verdict = "better" if high < 0 else "worse" if low > 0 else "neither better nor worse"
            sentences.append(
                f"{which} {name_of(method)}: OP-LoRA is {verdict}, "
                f"{_signed((value, low, high), 3)} nats per token (paired over items)."
            )
    return "Beyond step size and start. " + " ".join(sentences)


def _signed(triple: tuple[float, float, float], digits: int) -> str:
    value, low, high = (f"{x:+.{digits}f}" for x in triple)
    return f"{value} [{low}, {high}]"
