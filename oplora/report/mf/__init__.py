"""Figures 2-4 and the claims of section 4.1, from the matrix-factorization runs."""

import numpy
import pandas

from oplora.harness.runs import Record
from oplora.report.mf import figures
from oplora.report.mf.claims import CLAIMS_CAPTION, claims
from oplora.report.mf.study import METHODS, OPTIMIZERS, REACHED, Study, studies
from oplora.report.page import Section, Table

SUMMARY_CAPTION = (
    "Per method: its best rate with final MSE (median [minimum, maximum] over the seeds that did "
    "not diverge), the rates "
    "of the grid that reach the SVD error, those that diverge, the steps to the SVD error at the "
    "best rate, and trained parameters."
)


def section(records: list[Record]) -> Section | None:
    """The whole section, or None where no run of it is there."""
    found = studies(records)
    if not found:
        return None
    part = Section("Matrix factorization (Figures 2-4)")
    part.parts.append(
        "A 100×100 matrix with entries U(0, 1) is factorized at rank 8 in 1000 steps (50 of "
        "warm-up, then linear decay), as in section 4.1, at the paper's own scale. Every method "
        "is trained with the same grid of learning rates up to its divergence, each rate with "
        f"the same seeds. A run reaches the SVD error if it ends within {REACHED - 1:.0%} of it; "
        "a rate counts if most of its seeds do."
    )
    if both := complete(found):
        name = "sgd" if "sgd" in both else next(iter(both))
        part.parts += [
            figures.figure2(both[name]),
            Table("mf_claims", CLAIMS_CAPTION, claims(both), text=True),
            figures.figure3(both[name]),
            figures.figure4(both),
            figures.sensitivity(found),
            figures.step_sizes(both),
        ]
    part.parts += [Table("mf_summary", SUMMARY_CAPTION, summary(found))]
    for name, methods in found.items():
        caption = (
            f"Final MSE with {OPTIMIZERS[name]}, median [minimum, maximum] over the seeds that did "
            "not diverge."
        )
        part.parts.append(Table(f"mf_final_{name}", caption, final_errors(methods)))
    return part


def complete(found: dict[str, dict[str, Study]]) -> dict[str, dict[str, Study]]:
    """The optimizers for which both MF and OP-MF were run."""
    return {name: methods for name, methods in found.items() if {"mf", "opmf"} <= set(methods)}


def summary(found: dict[str, dict[str, Study]]) -> pandas.DataFrame:
    rows = []
    for optimizer, methods in found.items():
        for name in METHODS:
            if name in methods:
                study = methods[name]
                rows.append(
                    {
                        "optimizer": OPTIMIZERS[optimizer],
                        "method": METHODS[name] + study.mark,
                        "best rate": f"{study.rates[study.best]:g}",
                        "MSE at best rate": _band(study.final[study.best]),
                        "SVD": f"{numpy.median(study.svd):.4f}",
                        "rates reaching SVD": f"{study.reaches.sum()} of {len(study.rates)}",
                        "diverging": int(study.diverges.sum()),
                        "steps to SVD": _steps(study.steps_to_svd(study.best)),
                        "trained parameters": study.record.metrics["trained_parameters"],
                    }
                )
    return pandas.DataFrame(rows)


def final_errors(methods: dict[str, Study]) -> pandas.DataFrame:
    """One row per rate, one column per method."""
    rates = next(iter(methods.values())).rates
    rows = [{"rate": f"{rate:g}"} for rate in rates]
    for name in METHODS:
        if name in methods:
            for row, final in zip(rows, methods[name].final, strict=True):
                row[METHODS[name]] = _band(final)
    return pandas.DataFrame(rows)


def _band(final: numpy.ndarray) -> str:
    kept = final[numpy.isfinite(final)]
    diverged = len(final) - len(kept)
    note = f"{diverged} of {len(final)} diverged"
    if not len(kept):
        return note
    band = f"{numpy.median(kept):.4f} [{kept.min():.4f}, {kept.max():.4f}]"
    return f"{band}, {note}" if diverged else band


def _steps(steps: float) -> str | None:
    return f"{steps:g}" if numpy.isfinite(steps) else None
