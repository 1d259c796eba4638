"""Figures 2-4 and the claims of section 4.1, from the matrix-factorization runs."""

from dataclasses import dataclass
from functools import cached_property

import numpy
import pandas

from oplora.harness.runs import Record
from oplora.report.across import sensitivity
from oplora.report.against import Measured
from oplora.report.claims import Claim
from oplora.report.comparison import Comparison
from oplora.report.front import Gain
from oplora.report.page import Part, Row, Section, Table
from oplora.report.tables import COSTS
from oplora.report.titles import Scope, label, title
from oplora.studies.matrix_factorization.report import figures
from oplora.studies.matrix_factorization.report.claims import claims
from oplora.studies.matrix_factorization.report.study import (
    OPTIMIZERS,
    REACHED,
    Studies,
    Study,
    studies,
)

MODELS = {  # method → the adapter that it models, in whose column it stands
    "mf": "lora",
    "opmf": "oplora",
    "mf_matched": "lora_matched",
    "mf_mlp_start": "lora_mlp_start",
    "mf_matched_mlp_start": "lora_matched_mlp_start",
}
INTRO = (
    "A 100×100 matrix with entries U(0, 1) is factorized at rank 8 in 1000 steps (50 of "
    "warm-up, then linear decay), as in section 4.1, at the paper's own scale. Every method "
    "is trained with the same grid of learning rates up to its divergence, each rate with "
    f"the same seeds. A run reaches the SVD error if it ends within {REACHED - 1:.0%} of it; "
    "a rate counts if most of its seeds do."
)
SUMMARY_CAPTION = (
    "Per method: its best rate with final MSE (median [minimum, maximum] over the seeds that did "
    "not diverge), the rates "
    "of the grid that reach the SVD error, those that diverge, the steps to the SVD error at the "
    "best rate, and trained parameters."
)


@dataclass(frozen=True)
class MatrixFactorization:
    name: str = "matrix_factorization"
    order: int = 1
    readme: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = tuple(MODELS)

    def read(self, records: list[Record]) -> "Results":
        return Results(studies(records))


@dataclass(frozen=True)
class Results:
    """All studies, and those of optimizers with both MF and OP-MF."""

    studies: Studies
    comparisons: tuple[Comparison, ...] = ()  # nothing is fine-tuned
    settings: tuple[Comparison, ...] = ()

    @cached_property
    def complete(self) -> Studies:
        """The optimizers for which both MF and OP-MF were run."""
        return {name: found for name, found in self.studies.items() if {"mf", "opmf"} <= set(found)}

    def claims(self) -> list[Claim]:
        return claims(self.complete)

    def section(self) -> Section | None:
        if not self.studies:
            return None
        parts: list[Part] = [INTRO]
        if both := self.complete:
            first = next(iter(both.values()))  # SGD's, which the paper looks at in detail
            parts += [
                figures.figure2(first),
                figures.figure3(first),
                figures.figure4(both),
                figures.sensitivity(self.studies),
                figures.step_sizes(both),
            ]
        parts.append(Table("mf_summary", SUMMARY_CAPTION, summary(self.studies), details=COSTS))
        for optimizer, methods in self.studies.items():
            caption = (
                f"Final MSE with {OPTIMIZERS[optimizer]}, median [minimum, maximum] over the seeds "
                "that did not diverge."
            )
            parts.append(Table(f"mf_final_{optimizer}", caption, final_errors(methods)))
        return Section("Matrix factorization (Figures 2-4)", parts)

    @property
    def scopes(self) -> dict[str, dict[str, Study]]:
        found = self.studies.items()
        return {f"matrix factorization, {OPTIMIZERS[name]}": methods for name, methods in found}

    def standings(self) -> list[Row]:
        return [standing(scope, methods) for scope, methods in self.scopes.items()]

    def sensitivity(self) -> list[Row]:
        found = []
        for scope, methods in self.scopes.items():
            sweeps = [
                (title(name), dict(zip(study.rates, study.median, strict=True)), [study.record])
                for name, study in methods.items()
            ]
            start = max(float(study.start) for study in methods.values())
            best = min(float(study.median.min()) for study in methods.values())
            seeds = {title(name): study.final.shape[1] for name, study in methods.items()}
            found += sensitivity(scope, sweeps, start, best, seeds, "")
        return found

    def measured(self) -> list[Measured]:
        """Final errors at the best rate, of the seeds that did not diverge."""
        found = []
        for scope, methods in self.scopes.items():
            for name, study in methods.items():
                at = study.final[study.best]
                values = at[numpy.isfinite(at)].tolist()
                found.append(Measured(scope, name, study.best_rate, values, 5, [study.record]))
        return found

    def gains(self) -> list[Gain]:
        """OP-MF over MF, seed by seed, each at its best rate."""
        found = []
        for name, studies_ in self.complete.items():
            mf, op = studies_["mf"], studies_["opmf"]
            values = mf.final[mf.best] - op.final[op.best]
            gain = Gain(
                scope=Scope("matrix factorization", variant=OPTIMIZERS[name], unit="MSE"),
                methods=("opmf", "mf"),
                values=values[numpy.isfinite(values)].tolist(),
                level=float(mf.median.min()),
                digits=5,
                rates=(op.best_rate, mf.best_rate),
                runs=[mf.record, op.record],
            )
            found.append(gain)
        return found


def standing(scope: str, methods: dict[str, Study]) -> Row:
    best = {m: float(study.median.min()) for m, study in methods.items()}
    cells = {"scope": scope, "metric": "MSE"}
    cells |= {title(MODELS[m]): f"{error:.4f}" for m, error in best.items() if m in MODELS}
    rival = min(best.keys() - {"opmf"}, key=lambda m: (best[m], m), default=None)
    if rival and "opmf" in best:
        cells |= {"gain": f"{best[rival] - best['opmf']:+.4f}", "over": title(rival)}
    return Row(cells, [study.record for study in methods.values()])


def summary(found: Studies) -> list[Row]:
    rows = []
    for optimizer, methods in found.items():
        for name, study in methods.items():
            cells = {
                "optimizer": OPTIMIZERS[optimizer],
                "method": label(name, [study.record]),
                "best rate": f"{study.best_rate:g}",
                "MSE at best rate": _band(study.final[study.best]),
                "SVD": f"{numpy.median(study.svd):.4f}",
                "rates reaching SVD": f"{study.reaches.sum()} of {len(study.rates)}",
                "diverging": int(study.diverges.sum()),
                "steps to SVD": _steps(study.steps_to_svd[study.best]),
                "trained parameters": study.record.metrics["trained_parameters"],
            }
            rows.append(Row(cells, [study.record]))
    return rows


def final_errors(methods: dict[str, Study]) -> list[Row]:
    """One row per rate, one column per method."""
    bands = {title(name): list(map(_band, study.final)) for name, study in methods.items()}
    rates = [f"{rate:g}" for rate in next(iter(methods.values())).rates]
    rows = pandas.DataFrame({"rate": rates, **bands}).to_dict("records")
    return [Row(cells, [study.record for study in methods.values()]) for cells in rows]


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


EXPERIMENT = MatrixFactorization()
