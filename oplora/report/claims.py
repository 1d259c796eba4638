"""The claims page: every claim of the paper with its scope, the evidence here and a verdict.

A claim is a sentence, where it stands, and a rule of report.rules (matrix factorization: of
report.mf.claims). The evidence is computed from the runs; nothing is typed in.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas

from oplora.report import rules
from oplora.report.across import one_per_scale
from oplora.report.comparison import PLACES, Comparison, command
from oplora.report.mf.claims import claims as mf_claims
from oplora.report.mf.study import Study
from oplora.report.page import Link, Section, Statement, Table
from oplora.report.rules import (
    FAILS,
    HOLDS,
    IN_A_RANGE,
    NOT_RUN,
    UNTESTABLE,
    VERDICTS,
    Finding,
)

COLUMNS = ["claim", "scope", "verdict", "evidence here", "source", "figure", "to be run"]
PAIRS = {"oplora": "lora", "opdora": "dora"}
RULES = (
    "Rules. Every method stands at its own best learning rate, chosen on validation data. A gain "
    "is the mean over seeds of the difference on the same seed, positive where the claim's method "
    "is ahead, with a 95% t-interval. “Is better” holds if the interval lies above zero and does "
    "not hold if it lies below; in between it holds in a range if the validation loss is lower at "
    "two or more neighbouring shared learning rates, else is not testable at this scale if the "
    "interval holds both zero and the paper's own difference, else does not hold. Fewer than two "
    "shared seeds: not run yet. Where the gate of Table 1 does not hold, no distance is judged. "
    "All other rules stand in oplora/report/rules.py and oplora/report/mf/claims.py, one function "
    "each."
)


@dataclass(frozen=True)
class Claim:
    """experiment None: judged wherever there are runs (of a sweep, if it is about rates).

    scores: judged for every score of these runs.
    """

    text: str
    source: str
    rule: Callable[[Comparison], Finding]
    methods: tuple[str, ...]
    experiment: str | None = None
    scores: bool = False


def _better(text: str, source: str, experiment: str, method: str, base: str) -> Claim:
    rule = partial(rules.better, method=method, base=base)
    return Claim(text, source, rule, (base, method), experiment, scores=True)


def _general(text: str, source: str, rule: Callable, *methods: str, **options: str) -> Claim:
    return Claim(text, source, partial(rule, **options), methods)


CLAIMS = [
    _better("OP-LoRA is better than LoRA", "5.1, Table 1", "sdxl", "oplora", "lora"),
    _better("OP-DoRA is better than DoRA", "5.1, Table 1", "sdxl", "opdora", "dora"),
    _better("LoRA is better than DoRA", "5.1 (not Table 1)", "sdxl", "lora", "dora"),
    _better("LoRA is better than PiSSA", "5.1 (not Table 1)", "sdxl", "lora", "pissa"),
    _better("OP-LoRA is better than LoRA", "5.2, Table 3", "vl_bart", "oplora", "lora"),
    _better("OP-DoRA is better than DoRA", "5.2, Table 3", "vl_bart", "opdora", "dora"),
    Claim(
        "OP-LoRA gains over LoRA as much as DoRA does", "5.2",
        partial(rules.not_worse, method="oplora", base="dora"), ("dora", "oplora"), "vl_bart",
    ),
    _better("OP-LoRA is better than LoRA", "5.3, Table 4", "llava_cars", "oplora", "lora"),
    _better("OP-LoRA is better than LoRA", "5.4, Table 2", "commonsense", "oplora", "lora"),
    _better("OP-DoRA is better than DoRA", "5.4, Table 2", "commonsense", "opdora", "dora"),
    Claim(
        "OP-DoRA's best seed is better than DoRA's", "5.4, Table 2",
        partial(rules.best_seed, method="opdora", base="dora"), ("dora", "opdora"), "commonsense",
    ),
    Claim(
        "Performance is an inverted U over the MLP's width", "5.5, Figure 6",
        partial(rules.inverted_u, method="opdora"), ("opdora",), "vl_bart",
    ),
    Claim(
        "Width 1 is too little, else the trend is flat", "5.5, Figure 6",
        partial(rules.flat_beyond_one, method="opdora"), ("opdora",), "commonsense",
    ),
    _general("OP-LoRA converges faster than LoRA", "1, Figure 1d", rules.sooner,
             "lora", "oplora", method="oplora", base="lora"),
    _general("OP-LoRA is less sensitive to the learning rate", "v2", rules.less_sensitive,
             "lora", "oplora", method="oplora", base="lora"),
    _general("OP-DoRA is less sensitive to the learning rate", "v2", rules.less_sensitive,
             "dora", "opdora", method="opdora", base="dora"),
    _general("OP-LoRA at half of LoRA's rank is as good", "v2", rules.half_the_rank,
             "lora", "oplora"),
    _general("No cost at inference: the MLP is discarded", "1, v2", rules.ships_the_same,
             "lora", "oplora", method="oplora", base="lora"),
    _general("The MLP has about as many times the adapter's parameters as its width", "4",
             rules.width_times,
             "oplora", method="oplora"),
    _general("Less wall time than custom optimizers", "v2", rules.quicker,
             "oplora", "lora_pro", "lora_rite", method="oplora", others=("lora_pro", "lora_rite")),
    Claim(
        "Control: OP-LoRA is better than LoRA with its step sizes and first A", "not the paper's",
        partial(rules.better, method="oplora", base="lora_matched_mlp_start"),
        ("lora_matched_mlp_start", "oplora"), scores=True,
    ),
    _general("LoRA+ is better than LoRA", "LoRA+", rules.better,
             "lora", "loraplus", method="loraplus", base="lora"),
    _general("LoRA+ converges faster than LoRA", "LoRA+", rules.sooner,
             "lora", "loraplus", method="loraplus", base="lora"),
]  # fmt: skip


CONSTRUCTED = {c.text for c in CLAIMS if c.rule.func in (rules.ships_the_same, rules.width_times)}


def section(comparisons: list[Comparison], complete: dict[str, dict[str, Study]]) -> Section:
    """The whole page; `complete`: optimizers with runs of both MF and OP-MF."""
    rows = table(comparisons, complete)
    judged = rows["verdict"] != NOT_RUN
    counts = rows.loc[judged & ~rows["claim"].isin(CONSTRUCTED), "verdict"].value_counts()
    shown = ", ".join(f"{counts[v]} × {v}" for v in VERDICTS if v in counts)
    statement = (
        f"Claims judged here, one by one and scale by scale: {shown or 'none yet'}; two that hold "
        "by construction are not counted (the parameters of the adapter and of the MLP)."
    )
    done = Table(
        "claims",
        "Claims of sections 1, 4 and 5, of v2's abstract and of LoRA+'s as far as compared.",
        rows.loc[judged, COLUMNS[:-1]],
        text=True,
    )
    todo = Table(
        "claims_open",
        "Claims that wait for runs, with the command that makes them.",
        rows.loc[~judged].drop(columns=["verdict", "figure"]),
        text=True,
    )
    tables = [[done, RULES] if judged.any() else [], [todo] if not judged.all() else []]
    parts = [Statement("claims_counts", statement), *tables[0], *tables[1]]
    return Section("What holds of the paper", parts)


def table(comparisons: list[Comparison], complete: dict[str, dict[str, Study]]) -> pandas.DataFrame:
    rows = [consistent(comparisons), *_matrix_factorization(complete)]
    for claim in CLAIMS:
        rows += _rows(claim, comparisons)
    rows += [_row(text, "v2", "—", Finding(NOT_RUN, "no experiment of it here"))
             for text in ("OP-LoRA is better on GLUE", "DreamBench: DINO 0.69")]  # fmt: skip
    return pandas.DataFrame(rows, columns=COLUMNS, dtype=object)  # keeps links


def short(rows: pandas.DataFrame) -> pandas.DataFrame:
    """For the README: claims by verdicts, with the scopes in the cells."""
    found: dict[str, dict[str, list[str]]] = {}
    for claim, scope, verdict in rows[["claim", "scope", "verdict"]].itertuples(index=False):
        name = re.sub(r",[^(]*", " ", scope).strip()  # without what the models are trained on
        found.setdefault(claim, {}).setdefault(verdict, []).append(name)
    columns = [verdict for verdict in VERDICTS if verdict in set(rows["verdict"])]
    table = [
        {"claim": claim} | {v: ", ".join(dict.fromkeys(names)) for v, names in by_verdict.items()}
        for claim, by_verdict in found.items()
    ]
    return pandas.DataFrame(table, columns=["claim", *columns])


def consistent(comparisons: list[Comparison]) -> list:
    """The paper's main claim: OP is better than its counterpart in every experiment.

    Holds if all comparisons that were run do (two experiments at least; of several scores of the
    same runs the first), in a range if the others hold in one; does not hold if any does not.
    """
    found = [
        (c.experiment, rules.better(c, method, base).verdict)
        for c in one_per_scale(comparisons)
        for method, base in PAIRS.items()
    ]
    judged = [(experiment, verdict) for experiment, verdict in found if verdict != NOT_RUN]
    verdicts = [verdict for _, verdict in judged]
    if len({experiment for experiment, _ in judged}) < 2:
        finding = Finding(NOT_RUN, f"{len(judged)} comparisons", command="make reproduce")
    else:
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in VERDICTS if v in verdicts)
        verdict = next(v for v in (FAILS, UNTESTABLE, IN_A_RANGE, HOLDS) if v in verdicts)
        finding = Finding(verdict, f"OP-LoRA over LoRA and OP-DoRA over DoRA: {counts}")
    return _row("OP's gains are consistent across domains", "abstract, 1", "all", finding)


def _rows(claim: Claim, comparisons: list[Comparison]) -> list[list]:
    found = comparisons if claim.scores else one_per_scale(comparisons)
    if claim.experiment is None:
        if claim.rule.func is rules.less_sensitive:
            found = [c for c in found if c.own_sweep]
        judged = [_judged(claim, c) for c in found]
        todo = Finding(NOT_RUN, command=command("commonsense", "small", claim.methods))
        return judged or [_row(claim.text, claim.source, "any", todo)]
    rows = []
    for preset, scope in PLACES[claim.experiment].items():
        here = [c for c in found if (c.experiment, c.preset) == (claim.experiment, preset)]
        rows += [_judged(claim, c) for c in here]
        if not here:
            todo = Finding(NOT_RUN, command=command(claim.experiment, preset, claim.methods))
            rows.append(_row(claim.text, claim.source, scope, todo))
    return rows


def _judged(claim: Claim, c: Comparison) -> list:
    scope = f"{c.scope} ({c.metric})" if claim.scores else c.scope
    return _row(claim.text, claim.source, scope, claim.rule(c))


def _matrix_factorization(complete: dict[str, dict[str, Study]]) -> list[list]:
    scope = "matrix factorization, the paper's scale"
    if not complete:
        finding = Finding(NOT_RUN, command="make reproduce")
        return [_row("All claims of section 4.1", "4.1", scope, finding)]
    rows = []
    for found in mf_claims(complete).to_dict("records"):
        text, measured = found["claim"], found["measured"]
        if isinstance(found["range"], str):
            measured += f"; where: {found['range']}"
        source = "not the paper's" if text.startswith("Control") else "4.1"
        source = "v2" if "v2" in text else source
        finding = Finding(found["verdict"], measured, _mf_figure(text))
        rows.append(_row(text, source, scope, finding))
    return rows


def _mf_figure(text: str) -> str:
    figures = {
        "gradient": "figure3",
        "effective rank": "figure3",
        "Figure 4": "figure4",
        "step": "step_size",
        "sensitive": "sensitivity",
    }
    return next((name for word, name in figures.items() if word in text), "figure2")


def _row(text: str, source: str, scope: str, finding: Finding) -> list:
    figure = Link(finding.figure) if finding.figure else None
    return [text, scope, finding.verdict, finding.evidence, source, figure, finding.command]
