"""Tables over all experiments: the controls, power, sensitivity."""

from collections.abc import Collection, Mapping, Sequence
from math import sqrt
from statistics import stdev

from oplora.harness.runs import Record
from oplora.report.comparison import Comparison
from oplora.report.page import Missing, Row, Section, Table
from oplora.report.rates import SHARES, TOLERANCE, good_rates, loss_at
from oplora.report.rules import PAIRS, cited_gain
from oplora.report.statistics import (
    MOST_SEEDS,
    mean_interval,
    seeds_needed,
    shown,
    smallest_effect,
)
from oplora.report.titles import label, method_of, methods, title

CONTROLS = (
    "Is it only the step size? LoRA (or MF) with OP-LoRA's step sizes, with its first A, and with "
    "both, each at its own best rate; the gain is OP-LoRA's over the best of them, positive where "
    "OP-LoRA is ahead. MF: median error over seeds."
)
SENSITIVITY = (
    "Learning-rate sensitivity: neighbouring rates that reach a share of the gain from the base "
    "model's validation loss (MF: error) to that of the best tuned adapter. Where no run has the "
    "base model's loss, the rates within 5% of the best loss stand instead, which can be nearly "
    "all of the gain. ≥: the range reaches an edge of the grid; seeds: at least, of each rate. A "
    "best rate that one seed chose, though another is as good within the spread of the seeds, asks "
    "for more."
)
POWER = (
    "How many seeds would show the paper's effect (t-test at 5%, power 80%), from the spread of "
    "the published seeds: on the same seeds, and on independent ones; and the smallest gain that "
    "the seeds run here show. The paper's gain: in points, or of distances the same fraction."
)


def standing(c: Comparison) -> list[Row]:
    """The row of a comparison in the table of controls; none where none of them was scored."""
    wanted = ["lora", "oplora", *control_methods()]
    names = [m for m in wanted if c.scores(m)]
    means = {m: mean_interval(list(c.scores(m).values()))[0] for m in names if m != "oplora"}
    best = (max if c.score.higher else min)(means, key=means.get, default=None)
    gains = c.advantage("oplora", best) if best else []
    cells = {"scope": str(c.scope), "metric": c.score.unit}
    cells |= {title(m): Missing(c.command(m)) for m in wanted}
    cells |= {title(m): shown(list(c.scores(m).values()), c.score.digits) for m in names}
    cells |= {"gain": shown(gains, c.score.digits, "+"), "over": title(best)} if gains else {}
    return [Row(cells, [r for m in names for r in c.at_best[m]])] if names else []


def sensitivity_of(c: Comparison) -> list[Row]:
    """Every method's sweep, if it was made on this data."""
    if not (c.own_sweep and c.learns):
        return []
    runs = {m: [r for r in c.sweep_runs if method_of(r) == m] for m in c.sweep}
    sweeps = [(label(m, c.records_of(m)), c.losses(m), runs[m]) for m in c.sweep]
    seeds = {title(m): c.sweep_seeds(c.sweep[m], m) for m in c.sweep}
    rows = sensitivity(str(c.scope), sweeps, c.base_loss, c.best_loss, seeds, c.base_command)
    for m, row in zip(c.sweep, rows, strict=True):
        if near := c.rivals(m):
            row.cells["as good within the seeds' spread"] = ", ".join(f"{rate:g}" for rate in near)
            if row.cells["seeds"] < 2:
                row.cells["to be run"] = f"{c.rates_command(m)} seed=0,1,2"
    return rows


def power_of(c: Comparison) -> list[Row]:
    """Of each pair that was scored with the same seeds, where the paper has a gain."""
    rows = []
    for method, base in PAIRS.items():
        gains = c.advantage(method, base)
        expected = cited_gain(c, method, base) if len(gains) > 1 else None
        if expected is None or expected <= 0:
            continue
        spread = stdev(gains)
        both = (stdev(c.scores(m).values()) ** 2 for m in (method, base))
        unpaired = sqrt(sum(both) / 2)
        needed = (seeds_needed(expected, spread), seeds_needed(expected, unpaired, paired=False))
        on_same, on_others = (str(n) if n else f"over {MOST_SEEDS:,}" for n in needed)
        digits = c.score.digits
        cells = {
            "scope": str(c.scope),
            "metric": c.score.unit,
            "gain of": f"{title(method)} over {title(base)}",
            "the paper's": f"{expected:.{digits}f}",
            "spread": f"{spread:.{digits + 1}f}",
            "seeds": len(gains),
            "seeds needed, the same": on_same,
            "seeds needed, independent": on_others,
            "smallest gain shown here": f"{smallest_effect(spread, len(gains)):.{digits}f}",
        }
        rows.append(Row(cells, [*c.at_best[base], *c.at_best[method]]))
    return rows


def control_methods() -> list[str]:
    return [name for name, method in methods().items() if method.role == "control"]


def section(
    comparisons: Sequence[Comparison],
    standings: list[Row],
    sensitivities: list[Row],
    stand_ins: Collection[str],
) -> Section:
    """What the paper lacks, side by side.

    stand_ins: methods that stand in the columns of others, and have none of their own.
    """
    compared = [m for m in ("lora", "oplora", *control_methods()) if m not in stand_ins]
    columns = ["scope", "metric", *map(title, compared), "gain", "over"]
    tables = [
        Table("controls", CONTROLS, standings, columns),
        Table("power", POWER, [row for c in comparisons for row in power_of(c)]),
        Table("sensitivity_all", SENSITIVITY, sensitivities),
    ]
    return Section("Across the experiments", [table for table in tables if table.rows])


def sensitivity(
    scope: str,
    sweeps: Sequence[tuple[str, dict[float, float], list[Record]]],
    base: float | None,
    best: float,
    seeds: Mapping[str, int],
    command: str,
) -> list[Row]:
    """sweeps: method as the tables show it, loss by rate (infinite: it diverged), and the runs.

    base: the loss without training, which `command` measures where it is None.
    """
    columns = {f"{share:.0%} of the gain": share for share in SHARES}
    rows = []
    for method, by_rate, runs in sweeps:
        best_rate = f"{min(by_rate, key=by_rate.get):g}"
        cells = {"scope": scope, "method": method, "best rate": best_rate}
        if base is None:
            cells |= dict.fromkeys(columns, Missing(command))
            cells["within 5% of the best loss"] = str(good_rates(by_rate, TOLERANCE * best))
        else:
            cells |= {
                column: str(good_rates(by_rate, loss_at(share, base, best)))
                for column, share in columns.items()
            }
        cells["seeds"] = seeds[method.removesuffix("†")]
        rows.append(Row(cells, runs))
    return rows
