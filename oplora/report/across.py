"""Tables over all experiments: cost, sensitivity, the controls, half the rank."""

from collections.abc import Collection, Iterable, Sequence

from oplora.harness.runs import Record
from oplora.report.comparison import Comparison, good_rates, one_per_scale
from oplora.report.page import Row, Section, Table
from oplora.report.rules import half_the_rank
from oplora.report.statistics import mean_interval, shown
from oplora.report.tables import cost_cells
from oplora.report.titles import label, method_of, methods, title

CONTROLS = (
    "Is it only the step size? LoRA (or MF) with OP-LoRA's step sizes, with its first A, and with "
    "both, each at its own best rate; the gain is OP-LoRA's over the best of them, positive where "
    "OP-LoRA is ahead. MF: median error over seeds."
)
SENSITIVITY = (
    "Learning-rate sensitivity: neighbouring rates whose validation loss (MF: error) is within 5% "
    "of the method's own best, and within 5% of the best method's; ≥: the range reaches an edge of "
    "the grid."
)
COSTS = (
    "Cost at the chosen rate: the shortest of the runs' training times (the runs shared the "
    "machine, and of some methods there are more: speed is compared in the benchmark), the least "
    "of their peak memories, parameters trained (with the MLPs') and shipped."
)
HALF_RANK = "OP-LoRA at half of LoRA's rank, at the rates chosen for the full one."


def standing(c: Comparison) -> list[Row]:
    """The row of a comparison in the table of controls; none where none of them was scored."""
    names = [m for m in ("lora", "oplora", *control_methods()) if c.scores(m)]
    means = {m: mean_interval(list(c.scores(m).values()))[0] for m in names if m != "oplora"}
    best = (max if c.score.higher else min)(means, key=means.get, default=None)
    gains = c.advantage("oplora", best) if best else []
    cells = {"scope": str(c.scope), "metric": c.score.unit}
    cells |= {title(m): shown(list(c.scores(m).values()), c.score.digits) for m in names}
    cells |= {"gain": shown(gains, c.score.digits), "over": title(best)} if gains else {}
    return [Row(cells, [r for m in names for r in c.at_best[m]])] if names else []


def sensitivity_of(c: Comparison) -> list[Row]:
    """Every method's sweep, if it was made on this data."""
    runs = {m: [r for r in c.sweep_runs if method_of(r) == m] for m in c.sweep}
    sweeps = [(label(m, c.records_of(m)), c.losses(m), runs[m]) for m in c.sweep]
    return sensitivity(str(c.scope), sweeps) if c.own_sweep else []


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
    comparisons = one_per_scale(comparisons)
    compared = [m for m in ("lora", "oplora", *control_methods()) if m not in stand_ins]
    columns = ["scope", "metric", *map(title, compared), "gain", "over"]
    tables = [
        Table("controls", CONTROLS, standings, columns),
        Table("sensitivity_all", SENSITIVITY, sensitivities),
        Table("costs", COSTS, costs(comparisons)),
        Table("half_rank", HALF_RANK, half_rank(comparisons), text=True),
    ]
    return Section("Across the experiments", [table for table in tables if table.rows])


def sensitivity(
    scope: str, sweeps: Sequence[tuple[str, dict[float, float], list[Record]]]
) -> list[Row]:
    """sweeps: method as the tables show it, loss by rate (infinite: it diverged), and the runs."""
    best = min(min(by_rate.values()) for _, by_rate, _ in sweeps)
    return [
        Row(
            {
                "scope": scope,
                "method": method,
                "best rate": f"{min(by_rate, key=by_rate.get):g}",
                "good for the method": str(good_rates(by_rate)),
                "good for the best method": str(good_rates(by_rate, best)),
            },
            runs,
        )
        for method, by_rate, runs in sweeps
    ]


def costs(comparisons: Iterable[Comparison]) -> list[Row]:
    return [
        Row({"scope": str(c.scope), "method": label(method, runs), **cost_cells(runs)}, runs)
        for c in comparisons
        for method, runs in c.at_best.items()
    ]


def half_rank(comparisons: Iterable[Comparison]) -> list[Row]:
    findings = [(c, half_the_rank(c, "oplora", "lora")) for c in comparisons]
    return [
        Row(
            {
                "scope": str(c.scope),
                "measured": found.evidence,
                "is it as good?": found.verdict,
                "to be run": found.command,
            },
            c.runs_of("lora", "oplora"),
        )
        for c, found in findings
    ]
