"""Every claim of section 4.1, judged by a rule from the runs alone.

A verdict is "holds" (on the whole grid of rates), "holds in a range" (of neighbouring rates, which
is named) or "does not hold".
"""

import numpy
import pandas

from oplora.report.mf.study import OPTIMIZERS, Study, longest_window, span

CLAIMS_CAPTION = (
    "The claims of section 4.1 (and 5 for the last rows: controls that the paper lacks), each "
    "judged from these runs by a fixed rule."
)


def claims(complete: dict[str, dict[str, Study]]) -> pandas.DataFrame:
    """One row per claim: what was measured, where it holds, and the verdict."""
    rows = []
    name = "sgd" if "sgd" in complete else next(iter(complete))
    methods = complete[name]
    pair = methods["mf"], methods["opmf"]
    rows.append(_reaches(*pair))
    rows.append(_four_and_none(*pair))
    rows.append(_lower_loss(*pair))
    rows.append(_less_sensitive(*pair))
    rows.append(_faster(*pair))
    for other, studies in complete.items():
        if other != name:
            rows.append(_persists(other, studies["mf"], studies["opmf"]))
    rows += [_adapts(other, studies["opmf"]) for other, studies in complete.items()]
    rows += [_rank_rises(*pair), _rank_falls_sooner(*pair), _spike(*pair), _turn(*pair)]
    for other, studies in complete.items():
        if "mf_matched_mlp_start" in studies:
            rows.append(_beyond_step_size(other, studies))
    return pandas.DataFrame(rows)


def _row(claim: str, measured: str, where: str | None, verdict: str) -> dict:
    return {"claim": claim, "measured": measured, "range": where, "verdict": verdict}


def _windowed(claim, measured, mf: Study, op: Study, whole: bool, holds) -> dict:
    """Verdict of a claim about a set of rates: on all of them, or on the longest window."""
    if whole:
        return _row(claim, measured, "the whole grid", "holds")
    window = longest_window(mf, op, holds)
    if not window:
        return _row(claim, measured, None, "does not hold")
    where = f"rates {span(mf.rates, window)} ({len(window)} of {len(mf.rates)})"
    return _row(claim, measured, where, "holds in a range")


def _reaches(mf: Study, op: Study) -> dict:
    return _row(
        "OP-MF reaches the error of the SVD with SGD",
        f"at {op.reaches.sum()} of {len(op.rates)} rates; best median {op.median.min():.4f}, SVD "
        f"{numpy.median(op.svd):.4f}",
        _rates(op, op.reaches),
        "holds" if op.reaches.any() else "does not hold",
    )


def _four_and_none(mf: Study, op: Study) -> dict:
    ahead = op.reaches & ~mf.reaches
    return _windowed(
        "Four rates reach it with OP-MF, none with MF (Figure 2; how many depends on the grid)",
        f"OP-MF {op.reaches.sum()}, MF {mf.reaches.sum()} of {len(mf.rates)} rates; MF's: "
        f"{_rates(mf, mf.reaches) or 'none'}; only OP-MF's: {_rates(mf, ahead) or 'none'}",
        mf,
        op,
        op.reaches.sum() >= 4 and not mf.reaches.any(),
        lambda i: op.reaches[i].sum() >= 4 and not mf.reaches[i].any(),
    )


def _lower_loss(mf: Study, op: Study) -> dict:
    lower = op.median < mf.median
    both = ~op.diverges & ~mf.diverges
    return _windowed(
        "Across learning rates OP-MF ends lower than MF",
        f"at {(lower & both).sum()} of {both.sum()} rates at which neither diverges; best of each: "
        f"OP-MF {op.median.min():.4f}, MF {mf.median.min():.4f}",
        mf,
        op,
        bool(lower[both].all()),
        lambda i: lower[i].all(),
    )


def _less_sensitive(mf: Study, op: Study) -> dict:
    share = [s.reaches.sum() / (~s.diverges).sum() for s in (mf, op)]
    return _windowed(
        "OP-MF is less sensitive to the learning rate",
        f"rates reaching SVD: OP-MF {op.reaches.sum()}, MF {mf.reaches.sum()}; share of the rates "
        f"at which each is stable: OP-MF {share[1]:.0%}, MF {share[0]:.0%}",
        mf,
        op,
        op.reaches.sum() > mf.reaches.sum() and share[1] > share[0],
        lambda i: (
            op.reaches[i[0]] and op.reaches[i[-1]] and op.reaches[i].sum() > mf.reaches[i].sum()
        ),
    )


def _faster(mf: Study, op: Study) -> dict:
    best = [s.steps_to_svd(s.best) for s in (mf, op)]
    sooner = [op.steps_to_svd(i) < mf.steps_to_svd(i) for i in range(len(mf.rates))]
    return _windowed(
        "OP-MF converges faster",
        f"steps to the SVD error, each at its best rate: OP-MF {best[1]:g}, MF {best[0]:g}; at the "
        f"same rate OP-MF is first at {sum(sooner)} of {len(sooner)}",
        mf,
        op,
        best[1] < best[0],
        lambda i: all(sooner[k] for k in i),
    )


def _persists(optimizer: str, mf: Study, op: Study) -> dict:
    lower = op.median < mf.median
    return _windowed(
        f"OP-MF keeps its advantage with {OPTIMIZERS[optimizer]} (Figure 4)",
        f"best median: OP-MF {op.median.min():.5f}, MF {mf.median.min():.5f}; rates reaching SVD: "
        f"OP-MF {op.reaches.sum()}, MF {mf.reaches.sum()} of {len(mf.rates)}; lower at the same "
        f"rate at {lower.sum()}",
        mf,
        op,
        op.median.min() < mf.median.min() and op.reaches.sum() > mf.reaches.sum(),
        lambda i: lower[i].all(),
    )


def _rank_rises(mf: Study, op: Study) -> dict:
    i = op.best
    target = numpy.median(op.record.metrics["svd_effective_rank"])
    cases = ((op, i), (mf, i), (mf, mf.best))
    op_rank, mf_rank, mf_best = (s.curve("effective_rank", k) for s, k in cases)
    op_rises = op_rank[-1] > 0.9 * target and op_rank[-1] > op_rank[1:].min() + 1
    stays = mf_rank[-1] < 0.9 * target
    mf_rises = mf_best[-1] > 0.9 * target
    verdict = "does not hold"
    if op_rises and stays:
        verdict = "holds in a range" if mf_rises else "holds"
    return _row(
        "After the lower bound OP-MF's effective rank rises to about the SVD's, MF's does not",
        f"final effective rank (SVD {target:.2f}): OP-MF {op_rank[-1]:.2f} and MF "
        f"{mf_rank[-1]:.2f} at rate {op.rates[i]:g}; MF at its best rate {mf_best[-1]:.2f}",
        f"rate {op.rates[i]:g}" if verdict != "does not hold" else None,
        verdict,
    )


def _rank_falls_sooner(mf: Study, op: Study) -> dict:
    first = {}
    for name, study in (("MF", mf), ("OP-MF", op)):
        first[name] = [
            int(study.steps[1 + study.curve("effective_rank", i)[1:].argmin()])
            for i in range(len(study.rates))
        ]
    i = op.best
    sooner = [a < b for a, b in zip(first["OP-MF"], first["MF"], strict=True)]
    return _windowed(
        "OP-MF's effective rank reaches its lower bound sooner",
        f"step of the minimum at rate {op.rates[i]:g}: OP-MF {first['OP-MF'][i]}, MF "
        f"{first['MF'][i]}; sooner at {sum(sooner)} of {len(sooner)} rates",
        mf,
        op,
        all(sooner),
        lambda window: all(sooner[k] for k in window),
    )


def _spike(mf: Study, op: Study) -> dict:
    i = op.best
    spikes = {}
    for name, study in (("OP-MF", op), ("MF", mf)):
        norm = study.curve("gradient_norm", i)
        peak = int(norm.argmax())
        after = norm[peak:]
        spikes[name] = (norm[peak] / norm[0], norm[peak] / after.min())
    holds = spikes["OP-MF"][0] > 2 * spikes["MF"][0] and spikes["OP-MF"][1] > 2
    return _row(
        "OP-MF's gradient norm spikes and collapses, MF's does not",
        f"peak over first step, and peak over later minimum, at rate {op.rates[i]:g}: OP-MF "
        f"{spikes['OP-MF'][0]:.1f} and {spikes['OP-MF'][1]:.0f}, MF {spikes['MF'][0]:.1f} and "
        f"{spikes['MF'][1]:.0f}",
        f"rate {op.rates[i]:g}" if holds else None,
        "holds in a range" if holds else "does not hold",
    )


def _turn(mf: Study, op: Study) -> dict:
    i = op.best
    lowest = [float(numpy.nanmin(s.curve("gradient_cosine", i))) for s in (op, mf)]
    holds = lowest[0] < 0.5 and lowest[1] > 0.9
    return _row(
        "OP-MF's gradients turn sharply, MF's stay aligned",
        f"lowest cosine of gradients 10 steps apart at rate {op.rates[i]:g}: OP-MF "
        f"{lowest[0]:.2f}, MF {lowest[1]:.2f}",
        f"rate {op.rates[i]:g}" if holds else None,
        "holds in a range" if holds else "does not hold",
    )


def _adapts(optimizer: str, op: Study) -> dict:
    claim = f"OP-MF's step size rises and falls in training ({OPTIMIZERS[optimizer]}; v2)"
    every = op.curves["step_multiplier"][op.best]
    every = every[~numpy.isnan(every[:, -1])]
    dead = every[:, -1] == 1  # every hidden unit is off: the step size fell with the MLP
    note = f"; in {dead.sum()} of {len(every)} seeds, not counted, every hidden unit ends off"
    note = note if dead.any() else ""
    if dead.all():
        return _row(claim, "every hidden unit ends off, in all seeds", None, "does not hold")
    multiplier = numpy.nanmedian(every[~dead], 0)
    multiplier = multiplier[numpy.isfinite(multiplier)]
    peak = multiplier.max()
    rises, falls = peak > 1.1 * multiplier[0], multiplier[-1] < 0.9 * peak
    return _row(
        claim,
        f"steps of A and B over MF's at rate {op.rates[op.best]:g}: {multiplier[0]:.1f} first, "
        f"{peak:.1f} at most, {multiplier[-1]:.1f} last (10% counts){note}",
        "it only rises"
        if rises and not falls
        else "it only falls"
        if falls and not rises
        else None,
        "holds" if rises and falls else "holds in a range" if rises or falls else "does not hold",
    )


def _beyond_step_size(optimizer: str, studies: dict[str, Study]) -> dict:
    op, control = studies["opmf"], studies["mf_matched_mlp_start"]
    return _row(
        f"Control: OP-MF does more than larger steps and first A ({OPTIMIZERS[optimizer]})",
        f"rates reaching SVD: OP-MF {op.reaches.sum()}, control {control.reaches.sum()}; best "
        f"median: OP-MF {op.median.min():.5f}, control {control.median.min():.5f}",
        None,
        "holds"
        if op.reaches.sum() > control.reaches.sum() and op.median.min() <= control.median.min()
        else "does not hold",
    )


def _rates(study: Study, mask: numpy.ndarray) -> str | None:
    return ", ".join(f"{r:g}" for r, m in zip(study.rates, mask, strict=True) if m) or None
