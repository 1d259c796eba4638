"""Learning rates of a sweep: how one is chosen by its seeds, and which are good enough."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile

from oplora.harness.runs import Record
from oplora.report.statistics import mean_interval
from oplora.report.titles import in_order, method_of

GOOD, SHARES = 0.9, (0.75, 0.9, 0.95)  # of the gain: a rate is good if it reaches GOOD
TOLERANCE = 1.05  # of the best loss, where the base model's is not known
Sweep = dict[str, dict[float, list[float]]]  # method → learning rate → one value per seed
BySeed = dict[str, dict[float, dict[int, float]]]  # method → learning rate → seed → value


def trained(records: Iterable[Record]) -> list[Record]:
    """Those that did not diverge."""
    return [r for r in records if "diverged" not in r.metrics]


def by_seed(records: list[Record], value: Callable[[Record], float | None]) -> BySeed:
    """What the learning rates are chosen by, None where a run has none; a diverged run is infinite.

    A rate without the seed that most rates of its method have is left out.
    """
    found: dict = defaultdict(lambda: defaultdict(dict))
    for r in records:
        number = value(r) if trained([r]) else math.inf
        if number is not None:
            found[method_of(r)][r.config["lr"]][r.config["seed"]] = number
    sweep = {}
    for method in in_order(found):
        seeds = Counter(seed for values in found[method].values() for seed in sorted(values))
        usual = seeds.most_common(1)[0][0]
        rates = sorted(found[method].items())
        sweep[method] = {rate: values for rate, values in rates if usual in values}
    return sweep


def shared_seeds(found: BySeed) -> Sweep:
    """Of every method only the seeds that all its rates have: no rate is judged by others."""
    return {method: on_shared_seeds(rates) for method, rates in found.items()}


def on_shared_seeds(rates: dict[float, dict[int, float]]) -> dict[float, list[float]]:
    shared = sorted(set.intersection(*map(set, rates.values())))
    return {rate: [values[seed] for seed in shared] for rate, values in rates.items()}


def deciding(rates: dict[float, dict[int, float]]) -> dict[float, list[float]]:
    """What decides between a method's rates: if the best one and others were run with more seeds
    than all rates were, these rates on the seeds that they share; else all rates."""
    every = on_shared_seeds(rates)
    best = min(every, key=lambda rate: mean_interval(every[rate])[0])
    more = {rate: values for rate, values in rates.items() if len(values) > len(every[rate])}
    if best not in more:
        return every
    again = on_shared_seeds(more)
    return again if len(again[best]) > len(every[best]) else every


def chosen_rates(found: BySeed) -> dict[str, float]:
    """The learning rate of every method whose values are lowest on average."""
    decided = {method: deciding(rates) for method, rates in found.items()}
    return {
        method: min(values, key=lambda rate: mean_interval(values[rate])[0])
        for method, values in decided.items()
    }


@dataclass(frozen=True)
class GoodRates:
    """The neighbouring learning rates around the best one at which a loss is low enough."""

    rates: list[float]
    grid: list[float]

    @property
    def factor(self) -> float:
        """Highest over lowest rate; 1 for a single one, 0 for none."""
        return self.rates[-1] / self.rates[0] if self.rates else 0.0

    @property
    def step(self) -> float:
        """The largest factor between neighbouring rates of the grid."""
        pairs = zip(self.grid, self.grid[1:], strict=False)
        return max((high / low for low, high in pairs), default=1.0)

    @property
    def open(self) -> bool:
        """Does the range reach an edge of the grid, so that it may be wider?"""
        return bool(self.rates) and (
            self.rates[0] == self.grid[0] or self.rates[-1] == self.grid[-1]
        )

    def __str__(self) -> str:
        if not self.rates:
            return "none"
        if len(self.grid) == 1:
            return f"{self.grid[0]:g}, the only one"
        bound = "≥ " if self.open else ""
        factor = float(f"{self.factor:.2g}")
        return f"{self.rates[0]:g} to {self.rates[-1]:g} ({bound}×{factor:g})"


def good_rates(losses: dict[float, float], bound: float) -> GoodRates:
    """Rates whose losses are at most `bound`."""
    grid = sorted(losses)

    def good(rate: float) -> bool:
        return losses[rate] <= bound

    middle = grid.index(min(grid, key=losses.get))
    lower, higher = takewhile(good, grid[:middle][::-1]), takewhile(good, grid[middle:])
    return GoodRates(sorted([*lower, *higher]), grid)


def loss_at(share: float, base: float, best: float) -> float:
    """What reaches this share of the gain from the base model's loss to the best one."""
    return base - share * (base - best)
