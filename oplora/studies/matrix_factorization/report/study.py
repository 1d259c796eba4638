"""Matrix-factorization runs as arrays, and the rules by which they are judged."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy
import pandas

from oplora.harness.runs import Record
from oplora.report.titles import in_order

OPTIMIZERS = {"sgd": "SGD", "momentum": "SGD with momentum", "adam": "Adam"}
REACHED = 1.02  # times the SVD error: closer than the line width of the paper's figure


@dataclass
class Study:
    """One run of the experiment: all rates and seeds of a method under one optimizer."""

    record: Record

    @cached_property
    def curves(self) -> dict[str, numpy.ndarray]:
        """Name to (rate, seed, time); NaN after divergence."""
        with numpy.load(self.record.path / "curves.npz", allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    @property
    def rates(self) -> list[float]:
        return self.record.config["rates"]

    @property
    def best_rate(self) -> float:
        return self.rates[self.best]

    @property
    def steps(self) -> numpy.ndarray:
        problem = self.record.config["problem"]
        return numpy.arange(0, problem["steps"] + 1, problem["log_every"])

    @cached_property
    def svd(self) -> numpy.ndarray:
        """SVD error of every seed's target."""
        return numpy.array(self.record.metrics["svd_mse"])

    @property
    def start(self) -> float:
        """The error before training, median over seeds."""
        return numpy.median(self.curves["mse"][0, :, 0])

    @cached_property
    def final(self) -> numpy.ndarray:
        """Final MSE (rate, seed); infinite where the run diverged."""
        values = self.record.metrics["final_mse"]
        return numpy.array([[numpy.inf if v is None else v for v in row] for row in values])

    @cached_property
    def median(self) -> numpy.ndarray:
        return numpy.median(self.final, 1)

    @cached_property
    def reaches(self) -> numpy.ndarray:
        """Per rate: do most seeds end within REACHED of the SVD error?"""
        return (self.final <= REACHED * self.svd).mean(1) > 0.5

    @cached_property
    def diverges(self) -> numpy.ndarray:
        """Per rate: did most seeds diverge?"""
        return numpy.isinf(self.final).mean(1) > 0.5

    @property
    def stable(self) -> list[int]:
        """Indices of the rates at which most seeds do not diverge."""
        return numpy.flatnonzero(~self.diverges).tolist()

    @cached_property
    def best(self) -> int:
        """Index of the rate with the lowest median error."""
        return int(self.median.argmin())

    @cached_property
    def steps_to_svd(self) -> numpy.ndarray:
        """Per rate: median over seeds of the first step within REACHED of the SVD error, or inf."""
        below = self.curves["mse"] <= REACHED * self.svd[:, None]
        first = numpy.where(below.any(2), self.steps[below.argmax(2)], numpy.inf)
        return numpy.median(first, 1)

    def peak(self, whose: str, rate: int) -> tuple[float, float] | None:
        """Highest gradient norm over the first one and over the lowest afterwards, medians.

        whose: "adapter", A and B; "trained", what the method trains. None: not measured.
        """
        peaks = self.record.metrics.get("gradient_peaks", {}).get(whose)
        if peaks is None:
            return None
        first, highest, lowest = (
            numpy.array(peaks[part][rate], float) for part in ("first", "highest", "lowest_after")
        )
        return numpy.nanmedian(highest / first), numpy.nanmedian(highest / lowest)

    def curve(self, name: str, rate: int) -> numpy.ndarray:
        """Median over the seeds that go on."""
        return pandas.DataFrame(self.curves[name][rate]).median().to_numpy()


Studies = dict[str, dict[str, Study]]  # optimizer → method → study


def studies(records: list[Record]) -> Studies:
    """Of the paper's problem only (not of changed ones), in the order of the tables."""
    found: Studies = {}
    for record in records:
        config = record.config
        if config["experiment"] == "matrix_factorization" and _is_default(config["problem"]):
            by_method = found.setdefault(config["optimizer"]["name"], {})
            by_method.setdefault(config["method"]["name"], Study(record))
    return {
        optimizer: {name: found[optimizer][name] for name in in_order(found[optimizer])}
        for optimizer in OPTIMIZERS
        if optimizer in found
    }


def _is_default(problem: dict) -> bool:
    wanted = dict(rows=100, columns=100, rank=8, condition_number=None, loss="mse", steps=1000)
    return wanted.items() <= problem.items()


def longest_window(op: Study, mf: Study, holds: Callable[[list[int]], bool]) -> list[int]:
    """The longest run of neighbouring rates (at which OP-MF does not diverge) where `holds`."""
    windows = [list(range(*ends)) for ends in combinations(range(len(mf.rates) + 1), 2)]
    found = [window for window in windows if not op.diverges[window].any() and holds(window)]
    return max(found, key=len, default=[])


def reached_only_by(op: Study, mf: Study) -> Callable[[list[int]], bool]:
    """Of rates: is the SVD error reached at four at least with OP-MF, at none with MF?"""
    return lambda rates: op.reaches[rates].sum() >= 4 and not mf.reaches[rates].any()


def span(rates: list[float], chosen: list[int]) -> str:
    """ "0.1 to 4.6": the rates of a window in words."""
    if not chosen:
        return "none"
    first, last = chosen[0], chosen[-1]
    return f"{rates[first]:g} to {rates[last]:g}" if first != last else f"{rates[first]:g}"
