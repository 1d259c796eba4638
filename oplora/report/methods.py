"""What the reports of the fine-tuning experiments share: methods beside one another."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas
import yaml
from matplotlib.figure import Figure

from oplora.harness.runs import Record
from oplora.report.page import Picture, Table
from oplora.report.statistics import at_shared_steps, mean_interval

NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "oplora": "OP-LoRA",
    "oplora_lite": "OP-LoRA Lite",
    "dora": "DoRA",
    "opdora": "OP-DoRA",
    "loraplus": "LoRA+",
    "pissa": "PiSSA",
    "lora_pro": "LoRA-Pro",
    "lora_rite": "LoRA-RITE",
    "lora_matched": "LoRA, OP's step sizes",
    "lora_mlp_start": "LoRA, OP's first A",
    "lora_matched_mlp_start": "LoRA, both",
}
CONTROLS = ("lora_matched", "lora_mlp_start", "lora_matched_mlp_start")
PAPER = Path(__file__).resolve().parents[2] / "results" / "paper"
Sweep = dict[str, dict[float, list[float]]]  # method → learning rate → one value per seed


def cited_scores(file: str, column: str | None = None) -> dict[str, float]:
    """Method → the paper's number in a column, or the mean of all columns; means of seeds."""
    table = yaml.safe_load((PAPER / file).read_text(encoding="utf-8"))
    at = [table["columns"].index(column)] if column else range(len(table["columns"]))
    rows = {name.removesuffix(" (mean of 3)"): values for name, values in table["rows"].items()}
    return {
        name.lower().replace("-", ""): sum(values[i] for i in at) / len(at)
        for name, values in rows.items()
    }


def cited_table(name: str, file: str) -> Table:
    """The paper's own numbers, from a file in results/paper."""
    table = yaml.safe_load((PAPER / file).read_text(encoding="utf-8"))
    rows = [{"method": name, **dict(zip(table["columns"], values, strict=True))}
            for name, values in table["rows"].items()]  # fmt: skip
    return Table(name, f"Cited: {table['source']}.", pandas.DataFrame(rows))


def name_of(method: str) -> str:
    """As the tables call it; a method that is new here by the name in its YAML."""
    return NAMES.get(method, method)


def label(method: str, runs: list[Record]) -> str:
    """The method's name, with † where a run is noted (see report.provenance)."""
    return name_of(method) + ("†" if any("note" in r.environment for r in runs) else "")


def in_order(methods: Iterable[str]) -> list[str]:
    """As the tables show them: the paper's first, then others by name."""
    order = {method: place for place, method in enumerate(NAMES)}
    return sorted(set(methods), key=lambda method: (order.get(method, len(order)), method))


def by_method(records: list[Record]) -> dict[str, list[Record]]:
    """Runs of every method, in the order in which the tables show them."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for r in records:
        groups[r.config["method"]["name"]].append(r)
    return {method: groups[method] for method in in_order(groups)}


def trained(records: list[Record]) -> list[Record]:
    """Those that did not diverge."""
    return [r for r in records if "diverged" not in r.metrics]


def rates_of(records: list[Record], value: Callable[[Record], float | None]) -> Sweep:
    """What the learning rates are chosen by, None where a run has none; a diverged run is infinite.

    Of every method only the seeds that all its rates have: a rate that was run with more seeds
    afterwards must not be judged by others than its rivals. A rate without the seed that most
    rates have is left out.
    """
    found: dict = defaultdict(lambda: defaultdict(dict))
    for r in records:
        number = value(r) if trained([r]) else math.inf
        if number is not None:
            found[r.config["method"]["name"]][r.config["lr"]][r.config["seed"]] = number
    sweep = {}
    for method in in_order(found):
        seeds = Counter(seed for by_seed in found[method].values() for seed in sorted(by_seed))
        usual = seeds.most_common(1)[0][0]
        rates = {lr: by_seed for lr, by_seed in found[method].items() if usual in by_seed}
        shared = set.intersection(*(set(by_seed) for by_seed in rates.values()))
        sweep[method] = {lr: [rates[lr][seed] for seed in sorted(shared)] for lr in sorted(rates)}
    return sweep


def chosen_rates(sweep: Sweep) -> dict[str, float]:
    """The learning rate of every method whose values are lowest on average."""
    return {
        method: min(rates, key=lambda rate: mean_interval(rates[rate])[0])
        for method, rates in sweep.items()
    }


def final_loss(record: Record) -> float | None:
    """The last validation loss of a run."""
    losses = record.metrics.get("validation_loss")
    return losses[-1][1] if losses else None


def rate_table(sweep: Sweep, chosen: dict[str, float]) -> pandas.DataFrame:
    """Methods by rates; the chosen rate is marked with a star, an edge of the grid with (edge)."""
    rates = sorted({rate for by_rate in sweep.values() for rate in by_rate})
    rows = []
    for method, by_rate in sweep.items():
        row = {"method": name_of(method)}
        for rate in rates:
            mean = mean_interval(by_rate[rate])[0] if rate in by_rate else None
            text = "diverged" if mean == math.inf else None if mean is None else f"{mean:.3f}"
            if text and rate == chosen[method]:
                at_edge = rate in (min(by_rate), max(by_rate)) and len(by_rate) > 1
                text += "*" + (" (edge)" if at_edge else "")
            row[f"{rate:g}"] = text
        rows.append(row)
    return pandas.DataFrame(rows)


def rate_parts(name: str, caption: str, sweep: Sweep, ylabel: str, **options) -> list:
    """A sweep as a picture and as a table."""
    return [
        sensitivity(name, caption, sweep, ylabel, **options),
        Table(name, f"{caption} The chosen rate has a star.",
              rate_table(sweep, chosen_rates(sweep))),
    ]  # fmt: skip


def shipped(record: Record) -> int:
    """Parameters of what training leaves behind: all that was trained, adapters for their MLPs."""
    m = record.metrics
    return (
        m["trained_parameters"]
        - m["mlp_parameters"]
        + bool(m["mlp_parameters"]) * m["adapter_parameters"]
    )


def cost_cells(runs: list[Record]) -> dict[str, str | int | None]:
    """The columns that say what a method costs.

    Of times and memory the least of the runs: what else the machine or an earlier run in the same
    process does can only add to them; a resumed run's time is of its last part only.
    """
    timed = [r for r in runs if "resumed" not in r.metrics] or runs
    return {
        "trained parameters": runs[0].metrics["trained_parameters"],
        "shipped parameters": shipped(runs[0]),
        "train seconds": round(min(r.metrics["train_seconds"] for r in timed)),
        "peak memory, GB": f"{min(r.metrics['peak_memory_bytes'] for r in runs) / 1e9:.2f}",
    }


def sensitivity(
    name: str, caption: str, sweep: Sweep, ylabel: str, margin: tuple[float, float] | None = None
) -> Picture:
    """Every method's result against its learning rate; margin: of the y axis around the best."""
    figure = Figure(figsize=(8, 4.5))
    axis = figure.subplots()
    for method, by_rate in sweep.items():
        means = [mean_interval(values)[0] for values in by_rate.values()]
        means = [mean if mean < math.inf else math.nan for mean in means]  # a gap in the line
        axis.plot(list(by_rate), means, "o" + _line(method), ms=4, label=name_of(method))
    if margin:
        best = min(min(map(min, by_rate.values())) for by_rate in sweep.values())
        axis.set_ylim(best - margin[0], best + margin[1])
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel(ylabel)
    axis.legend(frameon=False, fontsize=8)
    return Picture(name, caption, figure)


def curves(
    name: str,
    caption: str,
    runs: dict[str, list[Record]],
    points: Callable[[Record], list],
    ylabel: str,
    xlabel: str = "step",
) -> Picture:
    """Mean and range over seeds of `points(run)`, a list of (x, y), for every method."""
    figure = Figure(figsize=(8, 4.5))
    axis = figure.subplots()
    for method, records in runs.items():
        lines = [line for r in records if (line := points(r))]
        if lines:
            xs, values = at_shared_steps(lines)
            (drawn,) = axis.plot(xs, values.mean(0), _line(method), label=name_of(method))
            axis.fill_between(
                xs, values.min(0), values.max(0), color=drawn.get_color(), alpha=0.15, lw=0
            )
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.legend(frameon=False, fontsize=8)
    return Picture(name, caption, figure)


def _line(method: str) -> str:
    return ":" if "_" in method else "-"  # controls are dotted
