"""Tables of methods beside one another: rates, results, differences to LoRA, ranks and widths."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import yaml

from oplora.harness.runs import Record
from oplora.report.metrics import Column
from oplora.report.page import Row, Table
from oplora.report.rates import BySeed, chosen_rates, deciding, on_shared_seeds
from oplora.report.statistics import mean_interval, paired_bootstrap
from oplora.report.titles import by_method, by_number, label, method_of, title

PAPER = Path(__file__).resolve().parents[2] / "results" / "paper"
COSTS = ("trained parameters", "shipped parameters", "train seconds", "peak memory, GB")
Groups = Mapping[str, Sequence[Record]]  # method → its runs


@dataclass(frozen=True)
class Items:
    """How methods are compared item by item of the test set."""

    scores: Callable[[Record], pandas.DataFrame]  # of a run, with the item as index
    differences: Callable[[pandas.DataFrame], dict[str, str | None]]  # to the table's cells
    columns: tuple[str, ...]  # of the table; the second counts the items, and is their name
    unit: str = ""


def method_row(
    method: str, runs: Sequence[Record], columns: Iterable[Column], **numbers: int
) -> Row:
    """A method, the learning rate that its runs share, numbers of theirs, results and costs."""
    cells = {"method": label(method, runs), "rate": f"{runs[0].config['lr']:g}", **numbers}
    cells |= {column.title: column.cell(runs) for column in columns}
    return Row(cells | cost_cells(runs), runs)


def results_table(
    name: str, caption: str, groups: Groups, columns: Sequence[Column], first: Sequence[Row] = ()
) -> Table:
    """Results and costs of every method; `first`: rows of what is not trained."""
    rows = [method_row(method, runs, columns) for method, runs in groups.items()]
    details = [column.title for column in columns if column.detail]
    higher = {column.title: column.higher for column in columns if column.higher is not None}
    return Table(name, caption, [*first, *rows], details=[*details, *COSTS], higher=higher)


def zero_shot(base: Sequence[Record], columns: Sequence[Column]) -> list[Row]:
    """The model as it is, where it was scored."""
    scored = [r for r in base if any(column(r) is not None for column in columns)]
    name = {"method": "zero-shot (no fine-tuning)", "rate": None}
    return [Row(name | {c.title: c.cell([r]) for c in columns}, [r]) for r in scored[:1]]


def grouped_rows(records: Iterable[Record], key: str, columns: Sequence[Column]) -> list[Row]:
    """Results and costs of every method by a number of the config (rank, mlp_width)."""
    return [
        method_row(method, same, columns, **{key.removeprefix("mlp_"): number})
        for method, runs in by_method(records).items()
        for number, same in by_number(runs, key).items()
    ]


def shipped(record: Record) -> int:
    """Parameters of what training leaves behind: all that was trained, adapters for their MLPs."""
    m = record.metrics
    return (
        m["trained_parameters"]
        - m["mlp_parameters"]
        + bool(m["mlp_parameters"]) * m["adapter_parameters"]
    )


def cost_cells(runs: Sequence[Record]) -> dict[str, str | int]:
    """The columns COSTS, which say what a method costs.

    Of times and memory the least of the runs: what else the machine or an earlier run in the same
    process does can only add to them; a resumed run's time is of its last part only.
    """
    timed = [r for r in runs if "resumed" not in r.metrics] or runs
    costs = (
        runs[0].metrics["trained_parameters"],
        shipped(runs[0]),
        round(min(r.metrics["train_seconds"] for r in timed)),
        f"{min(r.metrics['peak_memory_bytes'] for r in runs) / 1e9:.2f}",
    )
    return dict(zip(COSTS, costs, strict=True))


def rate_table(name: str, caption: str, found: BySeed, records: Sequence[Record]) -> Table:
    """Methods by rates; the chosen rate is marked with a star, an edge of the grid with (edge).

    Rates that were compared on more seeds than the others: on these, with their number.
    """
    rates, chosen = sorted({rate for row in found.values() for rate in row}), chosen_rates(found)
    rows = []
    for method, by_rate in found.items():
        row, every, decided = {"method": title(method)}, on_shared_seeds(by_rate), deciding(by_rate)
        shown_values = every | decided if len(decided) > 1 else every
        for rate in rates:
            values = shown_values.get(rate)
            mean = mean_interval(values)[0] if values else None
            text = "diverged" if mean == math.inf else None if mean is None else f"{mean:.3f}"
            if text and len(values) > len(every[rate]):
                text += f" ({len(values)} seeds)"
            if text and rate == chosen[method]:
                at_edge = rate in (min(by_rate), max(by_rate)) and len(by_rate) > 1
                text += "*" + (" (edge)" if at_edge else "")
            row[f"{rate:g}"] = text
        rows.append(Row(row, [r for r in records if method_of(r) == method]))
    told = f"{caption} The chosen rate has a star."
    if any(" seeds)" in (cell or "") for row in rows for cell in row.cells.values()):
        told += " Rates with a number of seeds of their own were compared on these."
    return Table(name, told, rows)


def predictions(record: Record) -> list[dict[str, Any]]:
    """What was predicted for every test item."""
    lines = (record.path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return list(map(json.loads, lines))


def paired_items(
    runs: Iterable[Record], base: Iterable[Record], scores: Callable[[Record], pandas.DataFrame]
) -> pandas.DataFrame:
    """Scores minus the base's by test item, mean over the shared seeds; empty without any."""
    theirs = {r.config["seed"]: scores(r) for r in base}
    each = [scores(r) - theirs[r.config["seed"]] for r in runs if r.config["seed"] in theirs]
    items = pandas.concat(each) if each else pandas.DataFrame()
    return items.groupby(level=list(range(items.index.nlevels))).mean().dropna(how="all")


def paired_table(name: str, caption: str, groups: Groups, items: Items) -> Table:
    """Every method's difference to LoRA."""
    rows, theirs = [], groups.get("lora", [])
    seeds = {r.config["seed"] for r in theirs}
    shared = {m: [r for r in runs if r.config["seed"] in seeds] for m, runs in groups.items()}
    scores = {r.path: items.scores(r) for runs in shared.values() for r in runs}
    for method, runs in shared.items():
        found = paired_items(runs, theirs, lambda r: scores[r.path])
        if method != "lora" and len(found):
            row = {"method": title(method), items.columns[1]: len(found), "seeds": len(runs)}
            rows.append(Row(row | items.differences(found), [*runs, *theirs]))
    return Table(name, caption, rows, items.columns)


def signed(
    differences: Iterable[float], digits: int, weights: Iterable[float] | None = None
) -> str:
    """ "+0.3 [-0.1, +0.7]": (weighted) mean and 95% bootstrap interval over items."""
    value, low, high = (f"{x:+.{digits}f}" for x in paired_bootstrap(differences, weights))
    return f"{value} [{low}, {high}]"


def cited(file: str) -> dict[str, Any]:
    """The paper's own numbers, a file in results/paper: source, columns, and rows by method.

    With the rows that a later text adds to the same table, where the file has them.
    """
    table = yaml.safe_load((PAPER / file).read_text(encoding="utf-8"))
    if later := table.pop("later", None):
        table["source"] += f"; what {later['source']} adds"
        for key in ("rows", "methods"):
            table[key] = table.get(key, {}) | later[key]
    return table


def cited_table(name: str, file: str) -> Table:
    """The paper's table, with its methods as they are called there."""
    table = cited(file)
    rows = [Row({"method": method, **dict(zip(table["columns"], values, strict=True))})
            for method, values in table["rows"].items()]  # fmt: skip
    return Table(name, f"Cited: {table['source']}.", rows)


def cited_scores(file: str, column: str | None = None) -> dict[str, float]:
    """Method → the paper's number in a column (without one: the mean of all), mean over seeds.

    Nothing where the paper has no such column.
    """
    table = cited(file)
    columns, names = table["columns"], table.get("methods", {})
    at = [i for i, found in enumerate(columns) if column in (None, found)]
    return {
        names.get(row, row): sum(values[i] for i in at) / len(at)
        for row, values in table["rows"].items()
        if at
    }
