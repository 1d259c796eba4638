"""Fine-tuning methods beside one another: one experiment at one scale, each at its best rate."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from oplora.report.methods import NAMES, Sweep, by_method, chosen_rates, rates_of, trained
from oplora.report.statistics import mean_interval
from oplora.runs import Record

TOLERANCE = 1.05  # a rate is good if its validation loss is within 5% of the best
PLACES = {  # experiment → preset → what is trained on what
    "commonsense": {"paper": "LLaMA-7B, eight tasks", "small": "SmolLM2-135M, eight tasks"},
    "vl_bart": {"paper": "BART-base, four tasks", "small": "tiny BART, easy-vqa"},
    "sdxl": {"paper": "SDXL 1.0, Naruto and WikiArt", "small": "tiny SDXL, emoji"},
    "llava_cars": {"paper": "LLaVA-1.5-7B, Stanford Cars", "small": "tiny LLaVA, emoji"},
}


@dataclass(frozen=True)
class Comparison:
    """Runs that may be compared. `loss` chooses the learning rates, `score` is the test's figure.

    Scores come out in the unit of the paper's table: points, or a distance. swept: the runs that
    choose the rates, where they are others than `records`.
    """

    experiment: str
    preset: str
    name: str  # of its tables and pictures
    records: list[Record]
    loss: Callable[[Record], float | None]
    score: Callable[[Record], float | None]
    metric: str
    higher: bool = True  # is a higher score better?
    swept: list[Record] | None = None
    variant: str = ""  # what tells it from others of its experiment and preset
    cited: dict[str, float] = field(default_factory=dict)  # method → the paper's score

    @property
    def scope(self) -> str:
        place = PLACES[self.experiment][self.preset]
        return f"{place}, {self.variant}" if self.variant else place

    @cached_property
    def sweep(self) -> Sweep:
        return rates_of(self.records if self.swept is None else self.swept, self.loss)

    @cached_property
    def chosen(self) -> dict[str, float]:
        """The learning rate of every method, by validation."""
        return chosen_rates(self.sweep)

    @cached_property
    def at_best(self) -> dict[str, list[Record]]:
        """The runs of every method at its chosen rate; where there was no sweep, at any."""
        return by_method(
            [
                r for r in trained(self.records)
                if self.chosen.get(r.config["method"]["name"], r.config["lr"]) == r.config["lr"]
            ]
        )  # fmt: skip

    def scores(self, method: str) -> dict[int, float]:
        """Seed → score of a method at its chosen rate."""
        runs = self.at_best.get(method, [])
        return {r.config["seed"]: s for r in runs if (s := self.score(r)) is not None}

    def advantage(self, method: str, base: str) -> list[float]:
        """By how much a method is better than another, for every seed that both have."""
        mine, theirs = self.scores(method), self.scores(base)
        sign = 1 if self.higher else -1
        return [sign * (mine[seed] - theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]

    def losses(self, method: str) -> dict[float, float]:
        """Learning rate → mean validation loss; infinite where a run diverged."""
        return {rate: mean_interval(v)[0] for rate, v in self.sweep.get(method, {}).items()}

    def command(self, *methods: str) -> str:
        return command(self.experiment, self.preset, *methods)


def command(experiment: str, preset: str, *methods: str) -> str:
    """What makes the runs that are missing; the rates are those that the sweep found best."""
    return (
        f"python experiments/{experiment}.py --multirun preset={preset} "
        f"method={','.join(methods)} seed=0,1,2"
    )


@dataclass(frozen=True)
class GoodRates:
    """The neighbouring learning rates around the best one that are within TOLERANCE of a loss."""

    rates: list[float]
    grid: list[float]

    @property
    def factor(self) -> float:
        """Highest over lowest rate; 1 for a single one, 0 for none."""
        return self.rates[-1] / self.rates[0] if self.rates else 0.0

    @property
    def open(self) -> bool:
        """Does the range reach an edge of the grid, so that it may be wider?"""
        return bool(self.rates) and (
            self.rates[0] == self.grid[0] or self.rates[-1] == self.grid[-1]
        )

    def __str__(self) -> str:
        if not self.rates:
            return "none"
        bound = "≥ " if self.open else ""
        return f"{self.rates[0]:g} to {self.rates[-1]:g} ({bound}×{self.factor:.3g})"


def good_rates(losses: dict[float, float], best: float | None = None) -> GoodRates:
    """Rates within TOLERANCE of `best` (default: the lowest of these losses)."""
    grid = sorted(losses)
    best = min(losses.values()) if best is None else best
    good = [losses[rate] <= TOLERANCE * best for rate in grid]
    start = stop = grid.index(min(grid, key=losses.get))
    if not good[start]:
        return GoodRates([], grid)
    while start > 0 and good[start - 1]:
        start -= 1
    while stop + 1 < len(grid) and good[stop + 1]:
        stop += 1
    return GoodRates(grid[start : stop + 1], grid)


def label(method: str, runs: list[Record]) -> str:
    """The method's name; † where a run is noted: uncommitted code, other library versions."""
    return NAMES[method] + ("†" if any(r.environment.get("note") for r in runs) else "")
