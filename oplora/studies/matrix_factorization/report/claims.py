"""The claims of section 4.1, each judged by a rule from the runs alone.

A claim holds on the whole grid of rates, in a range of neighbouring rates, which is named, or not.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy

from oplora.report.claims import Claim
from oplora.report.rules import FAILS, HOLDS, IN_A_RANGE, NOT_RUN, Finding
from oplora.report.titles import Scope
from oplora.studies.matrix_factorization.report.study import (
    OPTIMIZERS,
    Studies,
    Study,
    first_optimizer,
    longest_window,
    span,
)

SCOPE = Scope("matrix factorization", "the paper's scale")
OURS = "not the paper's"


def claims(complete: Studies) -> list[Claim]:
    """complete: optimizers with runs of both MF and OP-MF."""
    if not complete:
        missing = Finding(NOT_RUN, command="make reproduce")
        return [Claim.of("All claims of section 4.1", "4.1", SCOPE, missing)]
    first = first_optimizer(complete)
    pair = complete[first]["mf"], complete[first]["opmf"]
    found: list[Claim] = []

    def add(
        text: str, section: str, figure: str, finding: Finding, studies: Sequence[Study] = pair
    ) -> None:
        runs = [study.record for study in studies]
        claim = Claim(text, section, SCOPE, finding.verdict, finding.evidence, figure,
                      where=finding.where, runs=runs)  # fmt: skip
        found.append(claim)

    add("OP-MF reaches the error of the SVD with SGD", "4.1", "figure2", reaches(*pair))
    add("Four rates reach it with OP-MF, none with MF (Figure 2; how many depends on the grid)",
        "4.1", "figure2", four_and_none(*pair))  # fmt: skip
    add("Across learning rates OP-MF ends lower than MF", "4.1", "figure2", lower_loss(*pair))
    add("OP-MF is less sensitive to the learning rate", "4.1", "sensitivity", less_sensitive(*pair))
    add("OP-MF converges faster", "4.1", "figure2", faster(*pair))
    for optimizer, studies in complete.items():
        if optimizer != first:
            both = studies["mf"], studies["opmf"]
            add(f"OP-MF keeps its advantage with {OPTIMIZERS[optimizer]} (Figure 4)",
                "4.1", "figure4", persists(*both), both)  # fmt: skip
    for optimizer, studies in complete.items():
        add(f"OP-MF's step size rises and falls in training ({OPTIMIZERS[optimizer]}; v2)",
            "v2", "step_size", adapts(studies["opmf"]), [studies["opmf"]])  # fmt: skip
    add("After the lower bound OP-MF's effective rank rises to about the SVD's, MF's does not",
        "4.1", "figure3", rank_rises(*pair))  # fmt: skip
    add("OP-MF's effective rank reaches its lower bound sooner", "4.1", "figure3",
        rank_falls_sooner(*pair))  # fmt: skip
    add("OP-MF's gradient norm spikes and collapses, MF's does not", "4.1", "figure3", spike(*pair))
    add("OP-MF's gradients turn sharply, MF's stay aligned", "4.1", "figure3", turn(*pair))
    for optimizer, studies in complete.items():
        if control := studies.get("mf_matched_mlp_start"):
            add(f"Control: OP-MF does more than larger steps and first A ({OPTIMIZERS[optimizer]})",
                OURS, "step_size", beyond_step_size(studies["opmf"], control),
                [studies["opmf"], control])  # fmt: skip
    return found


def _on_rates(
    evidence: str, mf: Study, op: Study, whole: bool, holds: Callable[[list[int]], bool]
) -> Finding:
    """A claim about a set of rates: on all of them, or on the longest window."""
    if whole:
        return Finding(HOLDS, evidence, where="the whole grid")
    window = longest_window(mf, op, holds)
    if not window:
        return Finding(FAILS, evidence)
    where = f"rates {span(mf.rates, window)} ({len(window)} of {len(mf.rates)})"
    return Finding(IN_A_RANGE, evidence, where=where)


def _at_best_rate(evidence: str, op: Study, holds: bool) -> Finding:
    """A claim that was looked at where OP-MF is best."""
    if not holds:
        return Finding(FAILS, evidence)
    return Finding(IN_A_RANGE, evidence, where=f"rate {op.rates[op.best]:g}")


def reaches(mf: Study, op: Study) -> Finding:
    evidence = (
        f"at {op.reaches.sum()} of {len(op.rates)} rates; best median {op.median.min():.4f}, SVD "
        f"{numpy.median(op.svd):.4f}"
    )
    verdict = HOLDS if op.reaches.any() else FAILS
    return Finding(verdict, evidence, where=_rates(op, op.reaches))


def four_and_none(mf: Study, op: Study) -> Finding:
    ahead = op.reaches & ~mf.reaches
    return _on_rates(
        f"OP-MF {op.reaches.sum()}, MF {mf.reaches.sum()} of {len(mf.rates)} rates; MF's: "
        f"{_rates(mf, mf.reaches) or 'none'}; only OP-MF's: {_rates(mf, ahead) or 'none'}",
        mf,
        op,
        op.reaches.sum() >= 4 and not mf.reaches.any(),
        lambda i: op.reaches[i].sum() >= 4 and not mf.reaches[i].any(),
    )


def lower_loss(mf: Study, op: Study) -> Finding:
    lower = op.median < mf.median
    both = ~op.diverges & ~mf.diverges
    return _on_rates(
        f"at {(lower & both).sum()} of {both.sum()} rates at which neither diverges; best of each: "
        f"OP-MF {op.median.min():.4f}, MF {mf.median.min():.4f}",
        mf,
        op,
        bool(lower[both].all()),
        lambda i: lower[i].all(),
    )


def less_sensitive(mf: Study, op: Study) -> Finding:
    share = [s.reaches.sum() / (~s.diverges).sum() for s in (mf, op)]
    return _on_rates(
        f"rates reaching SVD: OP-MF {op.reaches.sum()}, MF {mf.reaches.sum()}; share of the rates "
        f"at which each is stable: OP-MF {share[1]:.0%}, MF {share[0]:.0%}",
        mf,
        op,
        op.reaches.sum() > mf.reaches.sum() and share[1] > share[0],
        lambda i: (
            op.reaches[i[0]] and op.reaches[i[-1]] and op.reaches[i].sum() > mf.reaches[i].sum()
        ),
    )


def faster(mf: Study, op: Study) -> Finding:
    best = [s.steps_to_svd(s.best) for s in (mf, op)]
    sooner = [op.steps_to_svd(i) < mf.steps_to_svd(i) for i in range(len(mf.rates))]
    return _on_rates(
        f"steps to the SVD error, each at its best rate: OP-MF {best[1]:g}, MF {best[0]:g}; at the "
        f"same rate OP-MF is first at {sum(sooner)} of {len(sooner)}",
        mf,
        op,
        best[1] < best[0],
        lambda i: all(sooner[k] for k in i),
    )


def persists(mf: Study, op: Study) -> Finding:
    """With another optimizer."""
    lower = op.median < mf.median
    return _on_rates(
        f"best median: OP-MF {op.median.min():.5f}, MF {mf.median.min():.5f}; rates reaching SVD: "
        f"OP-MF {op.reaches.sum()}, MF {mf.reaches.sum()} of {len(mf.rates)}; lower at the same "
        f"rate at {lower.sum()}",
        mf,
        op,
        op.median.min() < mf.median.min() and op.reaches.sum() > mf.reaches.sum(),
        lambda i: lower[i].all(),
    )


def rank_rises(mf: Study, op: Study) -> Finding:
    """Holds in a range where MF's rank rises as well, at its own best rate."""
    i = op.best
    target = numpy.median(op.record.metrics["svd_effective_rank"])
    cases = ((op, i), (mf, i), (mf, mf.best))
    op_rank, mf_rank, mf_best = (s.curve("effective_rank", k) for s, k in cases)
    op_rises = op_rank[-1] > 0.9 * target and op_rank[-1] > op_rank[1:].min() + 1
    holds = op_rises and mf_rank[-1] < 0.9 * target
    finding = _at_best_rate(
        f"final effective rank (SVD {target:.2f}): OP-MF {op_rank[-1]:.2f} and MF "
        f"{mf_rank[-1]:.2f} at rate {op.rates[i]:g}; MF at its best rate {mf_best[-1]:.2f}",
        op,
        holds,
    )
    only_op = holds and mf_best[-1] <= 0.9 * target
    return replace(finding, verdict=HOLDS) if only_op else finding


def rank_falls_sooner(mf: Study, op: Study) -> Finding:
    first = [
        [int(s.steps[1 + s.curve("effective_rank", i)[1:].argmin()]) for i in range(len(s.rates))]
        for s in (mf, op)
    ]
    i = op.best
    sooner = [ours < theirs for theirs, ours in zip(*first, strict=True)]
    return _on_rates(
        f"step of the minimum at rate {op.rates[i]:g}: OP-MF {first[1][i]}, MF "
        f"{first[0][i]}; sooner at {sum(sooner)} of {len(sooner)} rates",
        mf,
        op,
        all(sooner),
        lambda window: all(sooner[k] for k in window),
    )


def spike(mf: Study, op: Study) -> Finding:
    """Twice as high as MF's, and twice what follows."""
    i = op.best
    heights, falls = [], []
    for norm in (op.curve("gradient_norm", i), mf.curve("gradient_norm", i)):
        peak = int(norm.argmax())
        heights.append(norm[peak] / norm[0])
        falls.append(norm[peak] / norm[peak:].min())
    return _at_best_rate(
        f"peak over first step, and peak over later minimum, at rate {op.rates[i]:g}: OP-MF "
        f"{heights[0]:.1f} and {falls[0]:.0f}, MF {heights[1]:.1f} and {falls[1]:.0f}",
        op,
        heights[0] > 2 * heights[1] and falls[0] > 2,
    )


def turn(mf: Study, op: Study) -> Finding:
    i = op.best
    ours, theirs = (float(numpy.nanmin(s.curve("gradient_cosine", i))) for s in (op, mf))
    return _at_best_rate(
        f"lowest cosine of gradients 10 steps apart at rate {op.rates[i]:g}: OP-MF "
        f"{ours:.2f}, MF {theirs:.2f}",
        op,
        ours < 0.5 and theirs > 0.9,
    )


def adapts(op: Study) -> Finding:
    """Does the step size rise and fall (10% counts)? In a range: one of them only."""
    every = op.curves["step_multiplier"][op.best]
    every = every[~numpy.isnan(every[:, -1])]
    dead = every[:, -1] == 1  # every hidden unit is off: the step size fell with the MLP
    note = f"; in {dead.sum()} of {len(every)} seeds, not counted, every hidden unit ends off"
    note = note if dead.any() else ""
    if dead.all():
        return Finding(FAILS, "every hidden unit ends off, in all seeds")
    multiplier = numpy.nanmedian(every[~dead], 0)
    multiplier = multiplier[numpy.isfinite(multiplier)]
    peak = multiplier.max()
    rises, falls = peak > 1.1 * multiplier[0], multiplier[-1] < 0.9 * peak
    evidence = (
        f"steps of A and B over MF's at rate {op.rates[op.best]:g}: {multiplier[0]:.1f} first, "
        f"{peak:.1f} at most, {multiplier[-1]:.1f} last (10% counts){note}"
    )
    if rises and falls:
        return Finding(HOLDS, evidence)
    if rises or falls:
        return Finding(IN_A_RANGE, evidence, where=f"it only {'rises' if rises else 'falls'}")
    return Finding(FAILS, evidence)


def beyond_step_size(op: Study, control: Study) -> Finding:
    more = op.reaches.sum() > control.reaches.sum() and op.median.min() <= control.median.min()
    evidence = (
        f"rates reaching SVD: OP-MF {op.reaches.sum()}, control {control.reaches.sum()}; best "
        f"median: OP-MF {op.median.min():.5f}, control {control.median.min():.5f}"
    )
    return Finding(HOLDS if more else FAILS, evidence)


def _rates(study: Study, mask: numpy.ndarray) -> str | None:
    return ", ".join(f"{r:g}" for r, m in zip(study.rates, mask, strict=True) if m) or None
