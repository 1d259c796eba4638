"""Matrix-factorization runs as arrays, and the rules by which they are judged."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy

from oplora.harness.runs import Record
from oplora.report.titles import in_order

OPTIMIZERS = {"sgd": "SGD", "momentum": "SGD with momentum", "adam": "Adam"}
COLORS = {
    "mf": "tab:orange",
    "opmf": "tab:blue",
    "mf_matched": "tab:green",
    "mf_mlp_start": "tab:gray",
    "mf_matched_mlp_start": "tab:purple",
}
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
    def mark(self) -> str:
        """† where the run is noted (see report.provenance)."""
        return "†" if "note" in self.record.environment else ""

    @property
    def rates(self) -> list[float]:
        return self.record.config["rates"]

    @property
    def steps(self) -> numpy.ndarray:
        problem = self.record.config["problem"]
        return numpy.arange(0, problem["steps"] + 1, problem["log_every"])

    @cached_property
    def svd(self) -> numpy.ndarray:
        """SVD error of every seed's target."""
        return numpy.array(self.record.metrics["svd_mse"])

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

    @cached_property
    def best(self) -> int:
        """Index of the rate with the lowest median error."""
        return int(self.median.argmin())

    def steps_to_svd(self, rate: int) -> float:
        """Median over seeds of the first step within REACHED of the SVD error (inf: never)."""
        below = self.curves["mse"][rate] <= REACHED * self.svd[:, None]
        first = numpy.where(below.any(1), self.steps[below.argmax(1)], numpy.inf)
        return float(numpy.median(first))

    def curve(self, name: str, rate: int) -> numpy.ndarray:
        """Median over the seeds that go on."""
        values = self.curves[name][rate]
        result = numpy.full(values.shape[1], numpy.nan)
        some = ~numpy.isnan(values).all(0)
        result[some] = numpy.nanmedian(values[:, some], 0)
        return result


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


def complete(found: Studies) -> Studies:
    """The optimizers for which both MF and OP-MF were run."""
    return {name: methods for name, methods in found.items() if {"mf", "opmf"} <= set(methods)}


def _is_default(problem: dict) -> bool:
    wanted = dict(rows=100, columns=100, rank=8, condition_number=None, loss="mse", steps=1000)
    return all(problem[key] == value for key, value in wanted.items())


def longest_window(mf: Study, op: Study, holds: Callable[[list[int]], bool]) -> list[int]:
    """The longest run of neighbouring rates (within both methods' stability) where `holds`."""
    count, best = len(mf.rates), []
    for start in range(count):
        for stop in range(start + 1, count + 1):
            chosen = list(range(start, stop))
            if stop - start > len(best) and not op.diverges[chosen].any() and holds(chosen):
                best = chosen
    return best


def span(rates: list[float], chosen: list[int]) -> str:
    """ "0.1 to 4.6": the rates of a window in words."""
    if not chosen:
        return "none"
    first, last = chosen[0], chosen[-1]
    return f"{rates[first]:g} to {rates[last]:g}" if first != last else f"{rates[first]:g}"
