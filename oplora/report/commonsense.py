"""Table 2: commonsense reasoning, with the learning-rate sweep and the controls."""

import json
from collections import defaultdict
from pathlib import Path

import numpy
import pandas
import yaml
from matplotlib.figure import Figure

from oplora.report.page import Picture, Section, Table
from oplora.report.statistics import mean_interval, paired_bootstrap, shown
from oplora.runs import Record

NAMES = {
    "lora": "LoRA",
    "oplora": "OP-LoRA",
    "dora": "DoRA",
    "opdora": "OP-DoRA",
    "loraplus": "LoRA+",
    "pissa": "PiSSA",
    "lora_matched": "LoRA, OP's step sizes",
    "lora_mlp_start": "LoRA, OP's first A",
    "lora_matched_mlp_start": "LoRA, both",
}
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
    sweep = rates_of(records)
    chosen = {method: min(rates, key=lambda r: mean_interval(rates[r])[0])
              for method, rates in sweep.items()}  # fmt: skip
    final = [
        r for r in records
        if "accuracy" in r.metrics and r.config["lr"] == chosen[r.config["method"]["name"]]
    ]  # fmt: skip
    parts: list = [
        f"{scale}. The learning rate of every method is the one with the lowest validation NLL of "
        "the same grid (mean over seeds); the test set is scored at that rate only.",
        sensitivity(name, scale, sweep),
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
            curves(name, scale, final),
        ]  # fmt: skip
        statement = beyond(final, chosen)
        if statement:
            parts.append(statement)
    return parts


def rates_of(records: list[Record]) -> dict[str, dict[float, list[float]]]:
    """method → learning rate → validation NLL of every seed (one value per seed)."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for r in records:
        nll = r.metrics.get("validation_nll")
        if nll is not None:
            found[r.config["method"]["name"]][r.config["lr"]][r.config["seed"]] = nll
    return {m: {lr: list(found[m][lr].values()) for lr in sorted(found[m])}
            for m in NAMES if m in found}  # fmt: skip


def rate_table(sweep: dict, chosen: dict) -> pandas.DataFrame:
    """Methods by rates; the chosen rate is marked with a star, an edge of the grid with (edge)."""
    rates = sorted({rate for by_rate in sweep.values() for rate in by_rate})
    rows = []
    for method, by_rate in sweep.items():
        row = {"method": NAMES[method]}
        for rate in rates:
            text = f"{mean_interval(by_rate[rate])[0]:.3f}" if rate in by_rate else None
            if text and rate == chosen[method]:
                at_edge = rate in (min(by_rate), max(by_rate)) and len(by_rate) > 1
                text += "*" + (" (edge)" if at_edge else "")
            row[f"{rate:g}"] = text
        rows.append(row)
    return pandas.DataFrame(rows)


def results(final: list[Record]) -> pandas.DataFrame:
    rows = []
    tasks = [k for k in final[0].metrics if k.startswith("accuracy_")]
    for method, runs in _by_method(final).items():
        row = {"method": NAMES[method], "rate": f"{runs[0].config['lr']:g}"}
        row["held-out NLL"] = shown([r.metrics["held_out_nll"] for r in runs], 3)
        row["average"] = shown([r.metrics["accuracy"] for r in runs], 1, 100)
        for task in tasks:
            row[task.removeprefix("accuracy_")] = shown([r.metrics[task] for r in runs], 1, 100)
        row["trained parameters"] = runs[0].metrics["trained_parameters"]
        row["shipped parameters"] = runs[0].metrics["adapter_parameters"]
        row["train seconds"] = shown([r.metrics["train_seconds"] for r in runs], 0)
        row["peak memory, GB"] = shown([r.metrics["peak_memory_bytes"] for r in runs], 2, 1e-9)
        rows.append(row)
    return pandas.DataFrame(rows)


def predictions(record: Record) -> dict[str, dict]:
    """Rows of the run's predictions by item."""
    lines = (record.path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def paired(final: list[Record]) -> pandas.DataFrame:
    """NLL and accuracy minus LoRA's, item by item and seed by seed."""
    methods = _by_method(final)
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
        for method, runs in _by_method(final).items()
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


def sensitivity(name: str, scale: str, sweep: dict) -> Picture:
    figure = Figure(figsize=(8, 4.5))
    axis = figure.subplots()
    for method, by_rate in sweep.items():
        rates = list(by_rate)
        means = [mean_interval(values)[0] for values in by_rate.values()]
        style = ":" if "_" in method else "-"
        axis.plot(rates, means, "o" + style, ms=4, label=NAMES[method])
    best = min(min(map(min, by_rate.values())) for by_rate in sweep.values())
    axis.set_ylim(best - 0.05, best + 0.8)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("validation NLL, nats per token")
    axis.legend(frameon=False, fontsize=8)
    caption = f"Validation loss after training against the learning rate; {scale}."
    return Picture(f"{name}_rates", caption, figure)


def curves(name: str, scale: str, final: list[Record]) -> Picture:
    figure = Figure(figsize=(8, 4.5))
    axis = figure.subplots()
    for method, runs in _by_method(final).items():
        lines = [r.metrics["validation_loss"] for r in runs if r.metrics["validation_loss"]]
        if lines:
            steps = [step for step, _ in lines[0]]
            values = numpy.array([[loss for _, loss in line] for line in lines])
            (line,) = axis.plot(steps, values.mean(0), ":" if "_" in method else "-",
                                label=NAMES[method])  # fmt: skip
            axis.fill_between(
                steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, lw=0
            )
    axis.set_xlabel("step")
    axis.set_ylabel("validation loss")
    axis.legend(frameon=False, fontsize=8)
    caption = (
        f"Held-out loss during training, each method at its best rate (mean and range over "
        f"seeds); {scale}."
    )
    return Picture(f"{name}_curves", caption, figure)


def _by_method(records: list[Record]) -> dict[str, list[Record]]:
    return {
        method: runs
        for method in NAMES
        if (runs := [r for r in records if r.config["method"]["name"] == method])
    }
