"""The claims of section 4.1, each judged by a rule from the runs alone.

A claim holds on the whole grid of rates, in a range of neighbouring rates, which is named, or not.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy

from oplora.report.claims import Claim
from oplora.report.rules import FAILS, HOLDS, IN_A_RANGE, NOT_RUN, Finding
from oplora.report.titles import Scope
from oplora.studies.matrix_factorization.report.study import (
    OPTIMIZERS,
    Studies,
    Study,
    longest_window,
    span,
)

SCOPE = Scope("matrix factorization", "the paper's scale")


def claims(complete: Studies) -> list[Claim]:
    """complete: optimizers with runs of both MF and OP-MF."""
    if not complete:
        missing = Finding(NOT_RUN, command="make reproduce")
        return [Claim.of("All claims of section 4.1", "4.1", SCOPE, missing)]
    pairs = {name: Pair(studies["mf"], studies["opmf"]) for name, studies in complete.items()}
    first, *others = pairs  # SGD, which the paper looks at in detail
    pair = pairs[first]
    controls = {name: found.get("mf_matched_mlp_start") for name, found in complete.items()}
    judged = [
        ("OP-MF reaches the error of the SVD with SGD", "4.1", "figure2", first, reaches(pair)),
        ("Four rates reach it with OP-MF, none with MF (Figure 2; how many depends on the grid)",
         "4.1", "figure2", first, four_and_none(pair)),
        ("Across learning rates OP-MF ends lower than MF", "4.1", "figure2",
         first, lower_loss(pair)),
        ("OP-MF is less sensitive to the learning rate", "4.1", "sensitivity",
         first, less_sensitive(pair)),
        ("OP-MF converges faster", "4.1", "figure2", first, faster(pair)),
        *((f"OP-MF keeps its advantage with {OPTIMIZERS[name]} (Figure 4)", "4.1", "figure4",
           name, persists(pairs[name])) for name in others),
        *((f"OP-MF's step size rises and falls in training ({OPTIMIZERS[name]}; v2)", "v2",
           "step_size", name, adapts(each.op)) for name, each in pairs.items()),
        ("After the lower bound OP-MF's effective rank rises to about the SVD's, MF's does not",
         "4.1", "figure3", first, rank_rises(pair)),
        ("OP-MF's effective rank reaches its lower bound sooner", "4.1", "figure3",
         first, rank_falls_sooner(pair)),
        ("OP-MF's gradient norm spikes and collapses, MF's does not", "4.1", "figure3",
         first, spike(pair)),
        ("OP-MF's gradients turn sharply, MF's stay aligned", "4.1", "figure3", first, turn(pair)),
        *((f"Control: OP-MF does more than larger steps and first A ({OPTIMIZERS[name]})",
           "not the paper's", "step_size", name, beyond_step_size(each.op, controls[name]))
          for name, each in pairs.items() if controls[name]),
    ]  # fmt: skip
    runs = {name: [study.record for study in found.values()] for name, found in complete.items()}
    return [
        Claim.of(text, section, SCOPE, replace(finding, figure=figure), runs=runs[name])
        for text, section, figure, name, finding in judged
    ]


@dataclass(frozen=True)
class Pair:
    """MF and OP-MF under the same optimizer, at the same learning rates."""

    mf: Study
    op: Study

    def on_rates(self, evidence: str, whole: bool, holds: Callable[[list[int]], bool]) -> Finding:
        """A claim about a set of rates: on all of them, or on the longest window."""
        if whole:
            return Finding(HOLDS, evidence, where="the whole grid")
        window, rates = longest_window(self.mf, self.op, holds), self.mf.rates
        if not window:
            return Finding(FAILS, evidence)
        where = f"rates {span(rates, window)} ({len(window)} of {len(rates)})"
        return Finding(IN_A_RANGE, evidence, where=where)

    def at_best_rate(self, evidence: str, holds: bool) -> Finding:
        """A claim that is looked at where OP-MF is best."""
        where = f"rate {self.op.rates[self.op.best]:g}"
        return Finding(IN_A_RANGE, evidence, where=where) if holds else Finding(FAILS, evidence)

    def curves(self, name: str) -> list[numpy.ndarray]:
        """OP-MF's and MF's curve where OP-MF is best."""
        return [study.curve(name, self.op.best) for study in (self.op, self.mf)]


def reaches(pair: Pair) -> Finding:
    op = pair.op
    evidence = (
        f"at {op.reaches.sum()} of {len(op.rates)} rates; best median {op.median.min():.4f}, SVD "
        f"{numpy.median(op.svd):.4f}"
    )
    return Finding(HOLDS if op.reaches.any() else FAILS, evidence, where=_rates(op, op.reaches))


def four_and_none(pair: Pair) -> Finding:
    mf, op = pair.mf, pair.op
    evidence = (
        f"OP-MF {op.reaches.sum()}, MF {mf.reaches.sum()} of {len(mf.rates)} rates; MF's: "
        f"{_rates(mf, mf.reaches) or 'none'}; only OP-MF's: "
        f"{_rates(mf, op.reaches & ~mf.reaches) or 'none'}"
    )
    whole = op.reaches.sum() >= 4 and not mf.reaches.any()
    return pair.on_rates(
        evidence, whole, lambda i: op.reaches[i].sum() >= 4 and not mf.reaches[i].any()
    )


def lower_loss(pair: Pair) -> Finding:
    mf, op = pair.mf, pair.op
    lower, both = op.median < mf.median, ~op.diverges & ~mf.diverges
    evidence = (
        f"at {(lower & both).sum()} of {both.sum()} rates at which neither diverges; best of each: "
        f"OP-MF {op.median.min():.4f}, MF {mf.median.min():.4f}"
    )
    return pair.on_rates(evidence, bool(lower[both].all()), lambda i: lower[i].all())


def less_sensitive(pair: Pair) -> Finding:
    mine, theirs = pair.op.reaches, pair.mf.reaches
    share, their_share = (s.reaches.sum() / (~s.diverges).sum() for s in (pair.op, pair.mf))
    evidence = (
        f"rates reaching SVD: OP-MF {mine.sum()}, MF {theirs.sum()}; share of the rates "
        f"at which each is stable: OP-MF {share:.0%}, MF {their_share:.0%}"
    )
    return pair.on_rates(
        evidence,
        mine.sum() > theirs.sum() and share > their_share,
        lambda i: mine[i[0]] and mine[i[-1]] and mine[i].sum() > theirs[i].sum(),
    )


def faster(pair: Pair) -> Finding:
    mf, op = pair.mf, pair.op
    mine, theirs = op.steps_to_svd(op.best), mf.steps_to_svd(mf.best)
    sooner = [op.steps_to_svd(i) < mf.steps_to_svd(i) for i in range(len(mf.rates))]
    evidence = (
        f"steps to the SVD error, each at its best rate: OP-MF {mine:g}, MF {theirs:g}; at the "
        f"same rate OP-MF is first at {sum(sooner)} of {len(sooner)}"
    )
    return pair.on_rates(evidence, mine < theirs, lambda i: all(sooner[k] for k in i))


def persists(pair: Pair) -> Finding:
    """With another optimizer."""
    mf, op = pair.mf, pair.op
    lower = op.median < mf.median
    evidence = (
        f"best median: OP-MF {op.median.min():.5f}, MF {mf.median.min():.5f}; rates reaching SVD: "
        f"OP-MF {op.reaches.sum()}, MF {mf.reaches.sum()} of {len(mf.rates)}; lower at the same "
        f"rate at {lower.sum()}"
    )
    whole = op.median.min() < mf.median.min() and op.reaches.sum() > mf.reaches.sum()
    return pair.on_rates(evidence, whole, lambda i: lower[i].all())


def rank_rises(pair: Pair) -> Finding:
    """Holds in a range where MF's rank rises as well, at its own best rate."""
    target = numpy.median(pair.op.record.metrics["svd_effective_rank"])
    op_rank, mf_rank = pair.curves("effective_rank")
    mf_best = pair.mf.curve("effective_rank", pair.mf.best)[-1]
    op_rises = op_rank[-1] > 0.9 * target and op_rank[-1] > op_rank[1:].min() + 1
    holds = op_rises and mf_rank[-1] < 0.9 * target
    finding = pair.at_best_rate(
        f"final effective rank (SVD {target:.2f}): OP-MF {op_rank[-1]:.2f} and MF "
        f"{mf_rank[-1]:.2f} at rate {pair.op.rates[pair.op.best]:g}; MF at its best rate "
        f"{mf_best:.2f}",
        holds,
    )
    return replace(finding, verdict=HOLDS) if holds and mf_best <= 0.9 * target else finding


def rank_falls_sooner(pair: Pair) -> Finding:
    mine, theirs = (
        [int(s.steps[1 + s.curve("effective_rank", i)[1:].argmin()]) for i in range(len(s.rates))]
        for s in (pair.op, pair.mf)
    )
    i, sooner = pair.op.best, [a < b for a, b in zip(mine, theirs, strict=True)]
    evidence = (
        f"step of the minimum at rate {pair.op.rates[i]:g}: OP-MF {mine[i]}, MF {theirs[i]}; "
        f"sooner at {sum(sooner)} of {len(sooner)} rates"
    )
    return pair.on_rates(evidence, all(sooner), lambda i: all(sooner[k] for k in i))


def spike(pair: Pair) -> Finding:
    """Twice as high as MF's, and twice what follows."""
    heights, falls = [], []
    for norm in pair.curves("gradient_norm"):
        peak = int(norm.argmax())
        heights.append(norm[peak] / norm[0])
        falls.append(norm[peak] / norm[peak:].min())
    evidence = (
        "peak over first step, and peak over later minimum, at rate "
        f"{pair.op.rates[pair.op.best]:g}: OP-MF {heights[0]:.1f} and {falls[0]:.0f}, MF "
        f"{heights[1]:.1f} and {falls[1]:.0f}"
    )
    return pair.at_best_rate(evidence, heights[0] > 2 * heights[1] and falls[0] > 2)


def turn(pair: Pair) -> Finding:
    mine, theirs = (float(numpy.nanmin(curve)) for curve in pair.curves("gradient_cosine"))
    evidence = (
        f"lowest cosine of gradients 10 steps apart at rate {pair.op.rates[pair.op.best]:g}: "
        f"OP-MF {mine:.2f}, MF {theirs:.2f}"
    )
    return pair.at_best_rate(evidence, mine < 0.5 and theirs > 0.9)


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
