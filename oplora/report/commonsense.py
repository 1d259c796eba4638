"""Table 2: commonsense reasoning, with the learning-rate sweep and the controls."""

import json
from pathlib import Path

import numpy
import pandas
import yaml

from oplora.report.methods import (
    NAMES,
    by_method,
    chosen_rates,
    cost_cells,
    curves,
    rate_table,
    rates_of,
    sensitivity,
)
from oplora.report.page import Section, Table
from oplora.report.statistics import mean_interval, paired_bootstrap, shown
from oplora.runs import Record

CITED = Path(__file__).resolve().parents[2] / "results" / "paper" / "table2.yaml"
SCALES = {
    "small": "SmolLM2-135M (small preset)",
    "paper": "LLaMA-7B (paper preset)",
}


def section(records: list[Record]) -> Section | None:
    """One part per preset; scales are never mixed. None where nothing was run."""
    mine = [r for r in records if r.config["experiment"] == "commonsense"]
    if not mine:
        return None
    result = Section("Commonsense reasoning (Table 2)")
    result.parts.append(cited())
    for scale in sorted({_scale(r) for r in mine}):
        result.parts += _parts(scale, [r for r in mine if _scale(r) == scale])
    return result


def _scale(record: Record) -> tuple[str, str]:
    """What may share a table: runs of one preset and one type of the base weights."""
    return record.config["preset"], record.config["model"]["dtype"]


def cited() -> Table:
    """The paper's own numbers."""
    table = yaml.safe_load(CITED.read_text(encoding="utf-8"))
    rows = [{"method": name, **dict(zip(table["columns"], values, strict=True))}
            for name, values in table["rows"].items()]  # fmt: skip
    return Table("commonsense_paper", f"Cited: {table['source']}.", pandas.DataFrame(rows))


def _parts(key: tuple[str, str], records: list[Record]) -> list:
    preset, dtype = key
    name = f"commonsense_{preset}_{dtype}"
    scale = f"{SCALES[preset]}, base weights in {dtype}"
    sweep = rates_of(records, lambda r: r.metrics.get("validation_nll"))
    chosen = chosen_rates(sweep)
    final = [
        r for r in records
        if "accuracy" in r.metrics and r.config["lr"] == chosen[r.config["method"]["name"]]
    ]  # fmt: skip
    parts: list = [
        f"{scale}. The learning rate of every method is the one with the lowest validation NLL of "
        "the same grid (mean over seeds); the test set is scored at that rate only.",
        sensitivity(
            f"{name}_rates",
            f"Validation loss after training against the learning rate; {scale}.",
            sweep,
            "validation NLL, nats per token",
            margin=(0.05, 0.8),
        ),
        Table(f"{name}_rates", f"Validation NLL by learning rate; {scale}.",
              rate_table(sweep, chosen)),
    ]  # fmt: skip
    if final:
        parts += [
            Table(name, f"{scale}: test set, mean ± 95% interval (seeds). "
                  "Accuracy in percent; NLL in nats per token of the correct answer.",
                  results(final)),
            Table(f"{name}_paired", f"{scale}: difference to LoRA on the same test "
                  "items (all shared seeds), mean [95% bootstrap interval over items].",
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
        statement = beyond(final, chosen)
        if statement:
            parts.append(statement)
    return parts


def results(final: list[Record]) -> pandas.DataFrame:
    rows = []
    tasks = [k for k in final[0].metrics if k.startswith("accuracy_")]
    for method, runs in by_method(final).items():
        row = {"method": NAMES[method], "rate": f"{runs[0].config['lr']:g}"}
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


def paired(final: list[Record]) -> pandas.DataFrame:
    """NLL and accuracy minus LoRA's, item by item and seed by seed."""
    methods = by_method(final)
    base = {r.config["seed"]: predictions(r) for r in methods.get("lora", [])}
    rows = []
    for method, runs in methods.items():
        nll, weights, correct = [], [], []
        for r in runs if method != "lora" else []:
            mine, theirs = predictions(r), base.get(r.config["seed"], {})
            for key in mine.keys() & theirs.keys():
                a, b = mine[key], theirs[key]
                correct.append(a["correct"] - b["correct"])
                if "logprobs" in a:
                    answer, tokens = a["answer"], a["tokens"][a["answer"]]
                    nll.append((b["logprobs"][answer] - a["logprobs"][answer]) / tokens)
                    weights.append(tokens)
        if correct:
            row = {"method": NAMES[method], "items × seeds": len(correct)}
            row["NLL"] = (
                "{:+.3f} [{:+.3f}, {:+.3f}]".format(*paired_bootstrap(nll, weights))
                if nll
                else None
            )
            accuracy = paired_bootstrap(numpy.array(correct) * 100)
            row["accuracy"] = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*accuracy)
            rows.append(row)
    return pandas.DataFrame(rows, columns=["method", "items × seeds", "NLL", "accuracy"])


def beyond(final: list[Record], chosen: dict) -> str | None:
    """What OP-LoRA gives beyond a better learning rate and a larger first A, in one sentence."""
    nll = {
        method: [r.metrics["held_out_nll"] for r in runs]
        for method, runs in by_method(final).items()
    }
    if not {"lora", "oplora"} <= set(nll):
        return None
    texts = [f"{NAMES[m]} {shown(nll[m], 3)} at rate {chosen[m]:g}" for m in nll if "dora" not in m]
    best_control = min(
        (m for m in nll if m.startswith("lora")), key=lambda m: mean_interval(nll[m])[0]
    )
    gain = mean_interval(nll[best_control])[0] - mean_interval(nll["oplora"])[0]
    spread = max((mean_interval(nll[m])[1] or 0.0) for m in (best_control, "oplora"))
    verdict = (
        "beyond these, OP-LoRA gains" if gain > spread
        else "beyond these, OP-LoRA loses" if gain < -spread
        else "beyond these, OP-LoRA gains nothing that the seeds' spread would show:"
    )  # fmt: skip
    return (
        f"Beyond step size and start. Held-out NLL, each at its own best rate: {'; '.join(texts)}. "
        f"The best of LoRA, LoRA+ and the controls is {NAMES[best_control]}; {verdict} "
        f"{abs(gain):.3f} nats per token (larger of both half-widths: {spread:.3f})."
    )
