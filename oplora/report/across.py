"""Tables over all experiments: cost, sensitivity, the controls, half the rank."""

import pandas

from oplora.report.comparison import Comparison, good_rates
from oplora.report.methods import CONTROLS, cost_cells, label, name_of
from oplora.report.mf.study import METHODS, OPTIMIZERS, Study
from oplora.report.page import Section, Table
from oplora.report.rules import half_the_rank
from oplora.report.statistics import mean_interval, shown

Studies = dict[str, dict[str, Study]]


def section(comparisons: list[Comparison], studies: Studies) -> Section:
    """What the paper lacks, side by side."""
    tables = [
        Table(
            "controls",
            "Is it only the step size? LoRA (or MF) with OP-LoRA's step sizes, with its first A, "
            "and with both, each at its own best rate; the gain is OP-LoRA's over the best of "
            "them, positive where OP-LoRA is ahead. MF: median error over seeds.",
            controls(comparisons, studies),
        ),
        Table(
            "sensitivity_all",
            "Learning-rate sensitivity: neighbouring rates whose validation loss (MF: error) is "
            "within 5% of the method's own best, and within 5% of the best method's; ≥: the range "
            "reaches an edge of the grid.",
            sensitivity(one_per_scale(comparisons), studies),
        ),
        Table(
            "costs",
            "Cost at the chosen rate: the shortest of the runs' training times (the runs shared "
            "the machine, and of some methods there are more: speed is compared in the benchmark), "
            "the least of their peak memories, parameters trained (with the MLPs') and shipped.",
            costs(one_per_scale(comparisons)),
        ),
        Table(
            "half_rank",
            "OP-LoRA at half of LoRA's rank, at the rates chosen for the full one.",
            half_rank(one_per_scale(comparisons)),
            text=True,
        ),
    ]
    return Section("Across the experiments", [t for t in tables if not t.rows.empty])


def one_per_scale(comparisons: list[Comparison]) -> list[Comparison]:
    """Where runs have several scores, or share a sweep, the first."""
    return list({c.name: c for c in reversed(comparisons)}.values())[::-1]


def controls(comparisons: list[Comparison], studies: Studies) -> pandas.DataFrame:
    rows = []
    for optimizer, methods in studies.items():
        best = {m: float(methods[m].median.min()) for m in METHODS if m in methods}
        row = {"scope": f"matrix factorization, {OPTIMIZERS[optimizer]}", "metric": "MSE"}
        row |= {_column(m): f"{error:.4f}" for m, error in best.items()}
        rival = min(best.keys() - {"opmf"}, key=lambda m: (best[m], m), default=None)
        if rival and "opmf" in best:
            row |= {"gain": f"{best[rival] - best['opmf']:+.4f}", "over": METHODS[rival]}
        rows.append(row)
    for c in comparisons:
        names = [m for m in ("lora", "oplora", *CONTROLS) if c.scores(m)]
        if names:
            row = {"scope": c.scope, "metric": c.metric}
            row |= {_column(m): shown(list(c.scores(m).values()), c.digits) for m in names}
            rows.append(row | _gain(c, [m for m in names if m != "oplora"]))
    methods = [_column(m) for m in ("lora", "oplora", *CONTROLS)]
    return pandas.DataFrame(rows, columns=["scope", "metric", *methods, "gain", "over"])


def _gain(c: Comparison, rivals: list[str]) -> dict[str, str]:
    means = {m: mean_interval(list(c.scores(m).values()))[0] for m in rivals}
    best = (max if c.higher else min)(means, key=means.get, default=None)
    gains = c.advantage("oplora", best) if best else []
    return {"gain": shown(gains, c.digits), "over": name_of(best)} if gains else {}


def _column(method: str) -> str:
    """MF's methods stand in the columns of the adapters that they model."""
    return name_of(method.replace("opmf", "oplora").replace("mf", "lora"))


def sensitivity(comparisons: list[Comparison], studies: Studies) -> pandas.DataFrame:
    groups: dict[str, dict[str, dict[float, float]]] = {}
    for optimizer, methods in studies.items():
        losses = {METHODS[m]: _median_by_rate(methods[m]) for m in METHODS if m in methods}
        groups[f"matrix factorization, {OPTIMIZERS[optimizer]}"] = losses
    for c in comparisons:
        if c.own_sweep:
            groups[c.scope] = {label(m, c.records_of(m)): c.losses(m) for m in c.sweep}
    rows = []
    for scope, methods in groups.items():
        best = min(min(losses.values()) for losses in methods.values())
        for method, losses in methods.items():
            rows.append(
                {
                    "scope": scope,
                    "method": method,
                    "best rate": f"{min(losses, key=losses.get):g}",
                    "good for the method": str(good_rates(losses)),
                    "good for the best method": str(good_rates(losses, best)),
                }
            )
    return pandas.DataFrame(rows)


def _median_by_rate(study: Study) -> dict[float, float]:
    return dict(zip(study.rates, study.median.tolist(), strict=True))


def costs(comparisons: list[Comparison]) -> pandas.DataFrame:
    rows = [
        {"scope": c.scope, "method": label(method, runs), **cost_cells(runs)}
        for c in comparisons
        for method, runs in c.at_best.items()
    ]
    return pandas.DataFrame(rows)


def half_rank(comparisons: list[Comparison]) -> pandas.DataFrame:
    rows = []
    for c in comparisons:
        found = half_the_rank(c)
        rows.append(
            {
                "scope": c.scope,
                "measured": found.evidence,
                "is it as good?": found.verdict,
                "to be run": found.command,
            }
        )
    return pandas.DataFrame(rows)
