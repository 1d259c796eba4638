"""The claims of section 4.1, each judged by a rule from the runs alone.

A claim holds on the whole grid of rates, only at equal rates (which are named), or not.
A rule looks at OP-MF and at MF, or at a control instead.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy

from oplora.report.claims import Claim
from oplora.report.rules import EQUAL_RATES, FAILS, HOLDS, NOT_RUN, Finding
from oplora.report.titles import Scope
from oplora.studies.matrix_factorization.report.study import (
    OPTIMIZERS,
    Studies,
    Study,
    longest_window,
    reached_only_by,
    span,
)

SCOPE = Scope("matrix factorization", "the paper's scale")
FIRST, OTHERS, ALL = slice(1), slice(1, None), slice(None)  # SGD is first
PAIR = ("opmf", "mf")
AGAIN = "python experiments/matrix_factorization.py --multirun method=opmf,mf optimizer=sgd"


def on_rates(
    op: Study, mf: Study, evidence: str, whole: bool, holds: Callable[[list[int]], bool]
) -> Finding:
    """A claim about a set of rates: on all of them, or on the longest window."""
    if whole:
        return Finding(HOLDS, evidence, where="the whole grid")
    window = longest_window(op, mf, holds)
    if not window:
        return Finding(FAILS, evidence)
    where = f"rates {span(mf.rates, window)} ({len(window)} of {len(mf.rates)})"
    return Finding(EQUAL_RATES, evidence, where=where)


def at_best_rate(op: Study, evidence: str, holds: bool) -> Finding:
    """A claim that is looked at where OP-MF is best."""
    where = f"rate {op.best_rate:g}"
    return Finding(EQUAL_RATES, evidence, where=where) if holds else Finding(FAILS, evidence)


def each(mine: float, theirs: float, digits: str = "", rival: str = "MF") -> str:
    return f"OP-MF {mine:{digits}}, {rival} {theirs:{digits}}"


def reaches(op: Study, mf: Study) -> Finding:
    evidence = (
        f"at {op.reaches.sum()} of {len(op.rates)} rates; best median {op.median.min():.4f}, SVD "
        f"{numpy.median(op.svd):.4f}"
    )
    return Finding(HOLDS if op.reaches.any() else FAILS, evidence, where=_rates(op, op.reaches))


def four_and_none(op: Study, mf: Study) -> Finding:
    evidence = (
        f"{each(op.reaches.sum(), mf.reaches.sum())} of {len(mf.rates)} rates; MF's: "
        f"{_rates(mf, mf.reaches) or 'none'}; only OP-MF's: "
        f"{_rates(mf, op.reaches & ~mf.reaches) or 'none'}"
    )
    holds = reached_only_by(op, mf)
    return on_rates(op, mf, evidence, holds(list(range(len(mf.rates)))), holds)


def lower_loss(op: Study, mf: Study) -> Finding:
    lower, both = op.median < mf.median, ~op.diverges & ~mf.diverges
    evidence = (
        f"at {(lower & both).sum()} of {both.sum()} rates at which neither diverges; best of each: "
        f"{each(op.median.min(), mf.median.min(), '.4f')}"
    )
    return on_rates(op, mf, evidence, lower[both].all(), lambda i: lower[i].all())


def less_sensitive(op: Study, mf: Study) -> Finding:
    mine, theirs = op.reaches, mf.reaches
    share, their_share = (s.reaches.sum() / len(s.stable) for s in (op, mf))
    evidence = (
        f"rates reaching SVD: {each(mine.sum(), theirs.sum())}; share of the rates "
        f"at which each is stable: {each(share, their_share, '.0%')}"
    )

    def wider(i: list[int]) -> bool:
        return mine[i[0]] and mine[i[-1]] and mine[i].sum() > theirs[i].sum()

    whole = mine.sum() > theirs.sum() and share > their_share
    return on_rates(op, mf, evidence, whole, wider)


def faster(op: Study, mf: Study) -> Finding:
    mine, theirs = op.steps_to_svd[op.best], mf.steps_to_svd[mf.best]
    sooner = op.steps_to_svd < mf.steps_to_svd
    evidence = (
        f"steps to the SVD error, each at its best rate: {each(mine, theirs, 'g')}; at the "
        f"same rate OP-MF is first at {sooner.sum()} of {len(sooner)}"
    )
    return on_rates(op, mf, evidence, mine < theirs, lambda i: sooner[i].all())


def persists(op: Study, mf: Study) -> Finding:
    """With another optimizer."""
    lower = op.median < mf.median
    evidence = (
        f"best median: {each(op.median.min(), mf.median.min(), '.5f')}; rates reaching SVD: "
        f"{each(op.reaches.sum(), mf.reaches.sum())} of {len(mf.rates)}; lower at the same "
        f"rate at {lower.sum()}"
    )
    whole = op.median.min() < mf.median.min() and op.reaches.sum() > mf.reaches.sum()
    return on_rates(op, mf, evidence, whole, lambda i: lower[i].all())


def rank_rises(op: Study, mf: Study) -> Finding:
    """Only at equal rates where MF's rank rises as well, at its own best rate."""
    target = numpy.median(op.record.metrics["svd_effective_rank"])
    op_rank, mf_rank = (study.curve("effective_rank", op.best) for study in (op, mf))
    mf_best = mf.curve("effective_rank", mf.best)[-1]
    op_rises = op_rank[-1] > 0.9 * target and op_rank[-1] > op_rank[1:].min() + 1
    evidence = (
        f"final effective rank (SVD {target:.2f}): OP-MF {op_rank[-1]:.2f} and MF "
        f"{mf_rank[-1]:.2f} at rate {op.best_rate:g}; MF at its best rate {mf_best:.2f}"
    )
    holds = op_rises and mf_rank[-1] < 0.9 * target
    finding = at_best_rate(op, evidence, holds)
    return replace(finding, verdict=HOLDS) if holds and mf_best <= 0.9 * target else finding


def rank_falls_sooner(op: Study, mf: Study) -> Finding:
    rates = range(len(op.rates))
    mine, theirs = (
        numpy.array([s.steps[1 + s.curve("effective_rank", i)[1:].argmin()] for i in rates])
        for s in (op, mf)
    )
    sooner = mine < theirs
    evidence = (
        f"step of the minimum at rate {op.best_rate:g}: {each(mine[op.best], theirs[op.best])}; "
        f"sooner at {sooner.sum()} of {len(sooner)} rates"
    )
    return on_rates(op, mf, evidence, sooner.all(), lambda i: sooner[i].all())


def spike(op: Study, mf: Study) -> Finding:
    """Twice as high as MF's, and twice what follows: judged of A and B, which both have."""
    asked = ((op, "adapter"), (op, "trained"), (mf, "adapter"))
    peaks = [study.peak(whose, op.best) for study, whose in asked]
    if None in peaks:
        return Finding(NOT_RUN, "runs of an earlier version log every fifth step", command=AGAIN)
    (height, fall), (of_mlps, _), (mf_height, mf_fall) = peaks
    evidence = (
        f"peak over first step, and peak over later minimum, of all steps at rate "
        f"{op.best_rate:g}: OP-MF {height:.1f} and {fall:.0f} (of the MLPs' parameters "
        f"{of_mlps:.1f}), MF {mf_height:.1f} and {mf_fall:.0f}"
    )
    return at_best_rate(op, evidence, height > 2 * mf_height and fall > 2)


def turn(op: Study, mf: Study) -> Finding:
    mine, theirs = (numpy.nanmin(s.curve("gradient_cosine", op.best)) for s in (op, mf))
    evidence = (
        f"lowest cosine of gradients 10 steps apart at rate {op.best_rate:g}: "
        f"{each(mine, theirs, '.2f')}"
    )
    return at_best_rate(op, evidence, mine < 0.5 and theirs > 0.9)


def adapts(op: Study) -> Finding:
    """Does the step size rise and fall (10% counts)?"""
    every = op.curves["step_multiplier"][op.best]
    every = every[~numpy.isnan(every[:, -1])]
    dead = every[:, -1] == 1  # every hidden unit is off: the step size fell with the MLP
    if dead.all():
        return Finding(FAILS, "every hidden unit ends off, in all seeds")
    multiplier = numpy.nanmedian(every[~dead], 0)
    multiplier = multiplier[numpy.isfinite(multiplier)]
    peak = multiplier.max()
    rises, falls = peak > 1.1 * multiplier[0], multiplier[-1] < 0.9 * peak
    evidence = (
        f"steps of A and B over MF's at rate {op.best_rate:g}: {multiplier[0]:.1f} first, "
        f"{peak:.1f} at most, {multiplier[-1]:.1f} last (10% counts)"
    )
    if dead.any():
        off = f"in {dead.sum()} of {len(every)} seeds, not counted, every hidden unit ends off"
        evidence += f"; {off}"
    if rises and falls:
        return Finding(HOLDS, evidence)
    if rises or falls:
        evidence += f"; it only {'rises' if rises else 'falls'}"
    return Finding(FAILS, evidence)


def beyond_step_size(op: Study, control: Study) -> Finding:
    reached, their_reached = op.reaches.sum(), control.reaches.sum()
    best, their_best = op.median.min(), control.median.min()
    evidence = (
        f"rates reaching SVD: {each(reached, their_reached, rival='control')}; best "
        f"median: {each(best, their_best, '.5f', 'control')}"
    )
    more = reached > their_reached and best <= their_best
    return Finding(HOLDS if more else FAILS, evidence)


def _rates(study: Study, mask: numpy.ndarray) -> str | None:
    return ", ".join(f"{r:g}" for r, m in zip(study.rates, mask, strict=True) if m) or None


THESES = (  # sentence, section, figure, optimizers, rule, and the methods whose studies it takes
    ("OP-MF reaches the error of the SVD", "4.1", "figure2", FIRST, reaches, PAIR),
    ("Four rates reach it with OP-MF, none with MF (Figure 2; how many depends on the grid)",
     "4.1", "figure2", FIRST, four_and_none, PAIR),
    ("Across learning rates OP-MF ends lower than MF", "4.1", "figure2", FIRST, lower_loss, PAIR),
    ("OP-MF is less sensitive to the learning rate", "4.1", "sensitivity", FIRST, less_sensitive,
     PAIR),
    ("OP-MF converges faster", "4.1", "figure2", FIRST, faster, PAIR),
    ("OP-MF keeps its advantage with another optimizer (Figure 4)", "4.1", "figure4", OTHERS,
     persists, PAIR),
    ("OP-MF's step size rises and falls in training", "v2", "step_size", ALL, adapts,
     ("opmf",)),
    ("After the lower bound OP-MF's effective rank rises to about the SVD's, MF's does not",
     "4.1", "figure3", FIRST, rank_rises, PAIR),
    ("OP-MF's effective rank reaches its lower bound sooner", "4.1", "figure3", FIRST,
     rank_falls_sooner, PAIR),
    ("OP-MF's gradient norm spikes and collapses, MF's does not", "4.1", "figure3", FIRST, spike,
     PAIR),
    ("OP-MF's gradients turn sharply, MF's stay aligned", "4.1", "figure3", FIRST, turn, PAIR),
    ("Control: OP-MF does more than larger steps and first A", "not the paper's",
     "step_size", ALL, beyond_step_size, ("opmf", "mf_matched_mlp_start")),
)  # fmt: skip


def claims(complete: Studies) -> list[Claim]:
    """complete: optimizers with runs of both MF and OP-MF."""
    if not complete:
        missing = Finding(NOT_RUN, command="make reproduce")
        return [Claim.of(missing, text="All claims of section 4.1", section="4.1", scope=SCOPE)]
    return [
        Claim.of(
            replace(rule(*map(studies.get, methods)), figure=figure),
            text=text,
            section=section,
            scope=replace(SCOPE, variant=OPTIMIZERS[optimizer]),
            runs=[study.record for study in studies.values()],
        )
        for text, section, figure, optimizers, rule, methods in THESES
        for optimizer, studies in list(complete.items())[optimizers]
        if set(methods) <= set(studies)
    ]
