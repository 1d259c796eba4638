"""The claims page: every claim of the paper with its scope, the evidence here and a verdict.

A thesis is a sentence, where it stands, and a rule (of report.rules, or of an experiment's own).
Judged at one scope it becomes a claim. The evidence is computed from the runs; nothing is typed in.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas

from oplora.harness.runs import Record
from oplora.report import rules, titles
from oplora.report.comparison import Comparison, one_per_scale, rates_command
from oplora.report.page import Link, Part, Row, Statement, Table
from oplora.report.rules import (
    EQUAL_RATES,
    FAILS,
    HOLDS,
    NOT_RUN,
    PAIRS,
    RANGE_SEEDS,
    UNTESTABLE,
    VERDICTS,
    Finding,
)
from oplora.report.statistics import holm
from oplora.report.titles import Scope

SYMBOLS = dict(zip(VERDICTS, "●◐○?·", strict=True))
CHANCE = 0.025  # of an interval above zero where there is no difference
RULES = (
    "Rules. Every method stands at its own best learning rate, chosen on validation data. A gain "
    "is the mean over seeds of the difference on the same seed, positive where the claim's method "
    "is ahead, with a 95% t-interval. “Is better” holds if the interval lies above zero and does "
    "not hold if it lies below. In between it holds only at equal rates if the validation loss is "
    f"lower at two or more neighbouring shared learning rates, with {RANGE_SEEDS} seeds at each: "
    "that is what the paper compares, and says nothing to someone who tunes the rate. Else it is "
    "not testable at this scale if the interval holds both zero and the paper's own difference "
    "(or there is none), else does not hold. Fewer than two shared seeds: not run yet. Where the "
    "gate of Table 1 (can this base model tell methods apart at all? fixed beforehand) does not "
    "hold, no distance is judged. p: of a two-sided t-test of the gain; in brackets after Holm's "
    "correction for all gains judged here. All other rules stand in oplora/report/rules.py and "
    "oplora/studies/matrix_factorization/report/claims.py, one function each."
)


@dataclass(frozen=True, kw_only=True)
class Claim(Finding):
    """A sentence judged at one scope: a row of the claims page."""

    text: str
    section: str  # of the paper, or who says so
    scope: Scope
    constructed: bool = False  # holds by construction: not counted
    order: int = 0  # on the page; of the same order: by experiment
    runs: Sequence[Record] = ()

    @classmethod
    def of(cls, finding: Finding, **fields: Any) -> "Claim":
        return cls(**vars(finding) | fields)

    def row(self, corrected: float | None = None) -> Row:
        where = f"; where: {self.where}" if self.where else ""
        cells = {
            "verdict": self.verdict,
            "claim": self.text,
            "scope": str(self.scope),
            "evidence here": self.evidence + where,
            "p": None if corrected is None else f"{self.p:.3f} ({corrected:.3f})",
            "source": self.section,
            "figure": Link(self.figure) if self.figure else None,
            "to be run": self.command,
        }
        return Row(cells, self.runs)


@dataclass(frozen=True)
class Thesis:
    """A sentence and the rule that judges it for any comparison."""

    text: str
    section: str
    rule: Callable[..., Finding]  # of a comparison and the methods
    methods: tuple[str, ...]  # whose runs it needs, the one that it praises first
    every_score: bool = False  # judged for every score of the same runs, else for the first
    needs_own_sweep: bool = False  # judged only where the rates were swept on the same data
    constructed: bool = False
    order: int = 0

    def claims(self, comparisons: Iterable[Comparison]) -> list[Claim]:
        found = comparisons if self.every_score else one_per_scale(comparisons)
        return [
            Claim.of(
                self.rule(c, *self.methods),
                text=self.text,
                section=self.section,
                scope=replace(c.scope, unit=c.score.unit if self.every_score else ""),
                constructed=self.constructed,
                order=self.order,
                runs=c.runs_of(*self.methods),
            )
            for c in found
            if c.own_sweep or not self.needs_own_sweep
        ]

    def waiting(self, scope: Scope, experiment: str, preset: str) -> Claim:
        missing = Finding(NOT_RUN, command=rates_command(experiment, preset, self.methods[::-1]))
        return Claim.of(
            missing, text=self.text, section=self.section, scope=scope, order=self.order
        )


def better(text: str, section: str, method: str, base: str) -> Thesis:
    """Judged for every score."""
    return Thesis(text, section, rules.better, (method, base), every_score=True)


GENERAL = (  # judged wherever there are runs
    Thesis("OP-LoRA converges faster than LoRA", "1, Figure 1d", rules.faster, ("oplora", "lora")),
    Thesis("OP-LoRA is less sensitive to the learning rate", "v2", rules.less_sensitive,
           ("oplora", "lora"), needs_own_sweep=True),
    Thesis("OP-DoRA is less sensitive to the learning rate", "v2", rules.less_sensitive,
           ("opdora", "dora"), needs_own_sweep=True),
    Thesis("OP-LoRA at half of LoRA's rank is as good", "v2", rules.half_the_rank,
           ("oplora", "lora")),
    Thesis("OP-ScaledAdamW at half of ScaledAdamW's rank is as good", "second text, Table 3",
           rules.half_the_rank, ("op_scaled", "riemannian")),
    Thesis("No cost at inference: the MLP is discarded", "1, v2", rules.ships_the_same,
           ("oplora", "lora"), constructed=True),
    Thesis("The MLP has about as many times the adapter's parameters as its width", "4",
           rules.width_times, ("oplora",), constructed=True),
    Thesis("Less wall time than custom optimizers", "v2", rules.quicker,
           ("oplora", "lora_pro", "lora_rite")),
    better("Control: OP-LoRA is better than LoRA with its step sizes and first A",
           "not the paper's", "oplora", "lora_matched_mlp_start"),
    Thesis("LoRA+ is better than LoRA", "LoRA+", rules.better, ("loraplus", "lora")),
    Thesis("LoRA+ converges faster than LoRA", "LoRA+", rules.faster, ("loraplus", "lora")),
)  # fmt: skip


def of_experiment(
    theses: Iterable[Thesis], experiment: str, comparisons: Sequence[Comparison]
) -> list[Claim]:
    """The claims about one experiment, at each of its presets, run or not."""
    presets = dict.fromkeys([*titles.presets(experiment), *(c.preset for c in comparisons)])
    return [
        claim
        for thesis in theses
        for preset in presets
        for claim in thesis.claims([c for c in comparisons if c.preset == preset])
        or [thesis.waiting(titles.preset(experiment, preset), experiment, preset)]
    ]


def general(comparisons: Sequence[Comparison], experiment: str) -> list[Claim]:
    """The claims about all experiments; those without any run can be judged by `experiment`."""
    return [
        claim
        for thesis in GENERAL
        for claim in thesis.claims(comparisons)
        or [thesis.waiting(Scope("any"), experiment, "small")]
    ]


def consistent(comparisons: Sequence[Comparison]) -> Claim:
    """The paper's main claim: OP is better than its counterpart in every experiment.

    Holds if all comparisons that were run do (two experiments at least; of several scores of the
    same runs the first), only at equal rates if the others do; does not hold if any does not.
    """
    judged = [
        (c, method, verdict)
        for c in one_per_scale(comparisons)
        for method, base in PAIRS.items()
        if (verdict := rules.better(c, method, base).verdict) != NOT_RUN
    ]
    verdicts = [verdict for *_, verdict in judged]
    if len({c.experiment for c, *_ in judged}) < 2:
        finding = Finding(NOT_RUN, f"{len(judged)} comparisons", command="make reproduce")
    else:
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in VERDICTS if v in verdicts)
        verdict = next(v for v in (FAILS, UNTESTABLE, EQUAL_RATES, HOLDS) if v in verdicts)
        pairs = ", ".join(f"{titles.title(m)} over {titles.title(b)}" for m, b in PAIRS.items())
        finding = Finding(verdict, f"{pairs}: {counts}")
    runs = [r for c, method, _ in judged for r in c.runs_of(method, PAIRS[method])]
    text = "OP's gains are consistent across domains"
    return Claim.of(finding, text=text, section="abstract, 1", scope=Scope("all"), runs=runs)


def parts(claims: Sequence[Claim]) -> list[Part]:
    """Claims by settings, the judged ones with their evidence, and those that wait for runs."""
    judged = [claim for claim in claims if claim.verdict != NOT_RUN]
    waiting = [claim for claim in claims if claim.verdict == NOT_RUN]
    found: list[Part] = []
    if judged:
        tested = [claim for claim in judged if claim.p is not None]
        corrected = dict(zip(map(id, tested), holm([c.p for c in tested]), strict=True))
        rows = [claim.row(corrected.get(id(claim))) for claim in judged]
        caption = (
            "Claims of sections 1, 4 and 5, of v2's abstract and of LoRA+'s as far as compared."
        )
        columns = ("verdict", "claim", "scope", "evidence here", "p", "source", "figure")
        found += [
            matrix(judged, waiting),
            Statement("claims_counts", counts(judged)),
            chance(tested, list(corrected.values())),
            Table("claims", caption, rows, columns, text=True, cards=3),
            RULES,
        ]
    if waiting:
        caption = "Claims that wait for runs, with the command that makes them."
        columns = ("claim", "scope", "evidence here", "source", "to be run")
        rows = [claim.row() for claim in waiting]
        found.append(Table("claims_open", caption, rows, columns, text=True, cards=2))
    return found


def matrix(judged: Sequence[Claim], waiting: Sequence[Claim]) -> Table:
    """A symbol per claim and setting in which anything was judged; it leads to the evidence."""
    settings = dict.fromkeys(claim.scope.column for claim in judged)
    cells: dict[str, dict[str, list[Link]]] = {}
    for name, claims in (("claims", judged), ("claims_open", waiting)):
        for n, claim in enumerate(claims):
            if claim.scope.column in settings:
                name_ = f"{claim.scope}: {claim.verdict}"
                kind = claim.verdict.replace(" ", "-")
                link = Link(SYMBOLS[claim.verdict], f"{name}-{n}", kind, name_)
                by_setting = cells.setdefault(claim.text, {})
                by_setting.setdefault(claim.scope.column, []).append(link)
    legend = ", ".join(f"{symbol} {verdict}" for verdict, symbol in SYMBOLS.items())
    caption = (
        f"Claims of the paper by settings: {legend}; several symbols: one a score. A symbol leads "
        "to its evidence, runs and command."
    )
    told = {claim.text for claim in judged}
    widest = sorted(cells.items(), key=lambda item: -len(item[1]))
    empty = dict.fromkeys(settings, "")  # not a claim about it
    rows = [Row({"claim": text} | empty | found) for text, found in widest if text in told]
    return Table("matrix", caption, rows, ["claim", *settings])


def counts(judged: Iterable[Claim]) -> str:
    verdicts = [claim.verdict for claim in judged if not claim.constructed]
    shown = ", ".join(f"{verdicts.count(v)} × {v}" for v in VERDICTS if v in verdicts)
    return (
        f"Claims judged here, scale by scale: {shown or 'none yet'} (two that hold by "
        "construction, the counts of parameters, are left out)."
    )


def chance(tested: Sequence[Claim], corrected: Sequence[float]) -> str:
    """How many claims would hold if there were no differences at all."""
    holds = [p for claim, p in zip(tested, corrected, strict=True) if claim.verdict == HOLDS]
    return (
        f"{len(tested)} claims are judged by the interval of a gain. Without any difference "
        f"{CHANCE * len(tested):.1f} of them would hold by chance; {len(holds)} do, and "
        f"{sum(p < 2 * CHANCE for p in holds)} still do after Holm's correction."
    )


def short(claims: Iterable[Claim]) -> pandas.DataFrame:
    """For the README: claims by verdicts, with the scopes in the cells."""
    judged = [(c.text, c.verdict, c.scope.short) for c in claims if c.verdict != NOT_RUN]
    found = pandas.DataFrame(judged, columns=["claim", "verdict", "scope"]).drop_duplicates()
    scopes = found.pivot_table("scope", "claim", "verdict", aggfunc=", ".join, sort=False)
    verdicts = [verdict for verdict in VERDICTS if verdict in scopes]
    return scopes[verdicts].rename_axis(columns=None).reset_index()
