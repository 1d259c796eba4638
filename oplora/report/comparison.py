"""Fine-tuning methods beside one another: one experiment at one scale, each at its best rate."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from oplora.harness.runs import Record
from oplora.report.methods import Sweep, by_method, chosen_rates, rates_of, trained
from oplora.report.statistics import mean_interval

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
    digits: int = 1
    higher: bool = True  # is a higher score better?
    every: list[Record] | None = None  # with those of other ranks and widths, if there are any
    swept: list[Record] | None = None
    sweep_name: str | None = None  # of the picture of a sweep that several share
    swept_elsewhere: bool = False  # were the rates chosen on another data set?
    unfit: str = ""  # why its scores cannot tell methods apart, if so
    variant: str = ""  # what tells it from others of its experiment and preset
    cited: dict[str, float] = field(default_factory=dict)  # method → the paper's score

    @property
    def scope(self) -> str:
        place = PLACES[self.experiment][self.preset]
        return f"{place}, {self.variant}" if self.variant else place

    @cached_property
    def sweep(self) -> Sweep:
        return rates_of(self.records if self.swept is None else self.swept, self.loss)

    @property
    def own_sweep(self) -> bool:
        """Is there a sweep of learning rates, and was it made on this data?"""
        return bool(self.sweep) and not self.swept_elsewhere

    @cached_property
    def chosen(self) -> dict[str, float]:
        """The learning rate of every method, by validation."""
        return chosen_rates(self.sweep)

    @cached_property
    def at_best(self) -> dict[str, list[Record]]:
        """The runs of every method at its chosen rate; where there was no sweep, at any.

        Runs of the sweep, which have no score, stand in only where a method has no others.
        """
        at = [
            r for r in trained(self.records)
            if self.chosen.get(r.config["method"]["name"], r.config["lr"]) == r.config["lr"]
        ]  # fmt: skip
        return {
            method: [r for r in runs if self.score(r) is not None] or runs
            for method, runs in by_method(at).items()
        }

    def scores(self, method: str) -> dict[int, float]:
        """Seed → score of a method at its chosen rate."""
        runs = self.at_best.get(method, [])
        return {r.config["seed"]: s for r in runs if (s := self.score(r)) is not None}

    def records_of(self, method: str) -> list[Record]:
        """All runs of a method that did not diverge."""
        return [r for r in trained(self.records) if r.config["method"]["name"] == method]

    def sweep_seeds(self, *methods: str) -> int:
        """With how many seeds at least the rates of these methods were swept."""
        return min(len(v) for m in methods for v in self.sweep.get(m, {}).values())

    @property
    def rates_figure(self) -> str:
        """The picture of the sweep, which may serve several comparisons."""
        return self.sweep_name or f"{self.name}_rates"

    @property
    def rank(self) -> int:
        return (self.records or self.swept)[0].config["rank"]

    def scores_at(self, method: str, **options) -> dict[int, float]:
        """Seed → score at the chosen rate, with another rank or mlp_width."""
        wanted = {"lr": self.chosen.get(method), **options}
        return {
            r.config["seed"]: s
            for r in trained(self.every or self.records)
            if r.config["method"]["name"] == method
            and all(r.config[key] == value for key, value in wanted.items() if value is not None)
            and (s := self.score(r)) is not None
        }

    def by_width(self, method: str) -> dict[int, dict[int, float]]:
        """Width of the MLP → seed → score, at the rate chosen for the usual width."""
        runs = [r for r in self.every or self.records if r.config["method"]["name"] == method]
        scores = {
            width: self.scores_at(method, rank=self.rank, mlp_width=width)
            for width in sorted({r.config["mlp_width"] for r in runs})
        }
        return {width: by_seed for width, by_seed in scores.items() if by_seed}

    def advantage(self, method: str, base: str) -> list[float]:
        """By how much a method is better than another, for every seed that both have."""
        mine, theirs = self.scores(method), self.scores(base)
        sign = 1 if self.higher else -1
        return [sign * (mine[seed] - theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]

    def losses(self, method: str) -> dict[float, float]:
        """Learning rate → mean validation loss; infinite where a run diverged."""
        return {rate: mean_interval(v)[0] for rate, v in self.sweep.get(method, {}).items()}

    def command(self, *methods: str) -> str:
        """What makes missing runs of these methods; seeds are run on this data set."""
        text = command(self.experiment, self.preset, methods, self.chosen)
        own = self.experiment == "sdxl" and "sweep_seeds" in text
        return f"{text} dataset={self.variant}" if own else text


def command(
    experiment: str, preset: str, methods: Sequence[str], chosen: Mapping[str, float] | None = None
) -> str:
    """What makes the runs that are missing: a sweep of rates, then seeds at the chosen ones."""
    scale = "" if preset == "small" else f" preset={preset}"
    rates = {method: (chosen or {}).get(method) for method in methods}
    unknown = [method for method, rate in rates.items() if rate is None]
    if unknown:
        return f"scripts/sweep_learning_rates.sh {experiment}{scale} method={','.join(unknown)}"
    at = " ".join(f"{method}={rate:g}" for method, rate in rates.items())
    return f"scripts/sweep_seeds.sh {experiment} {at}{scale}"


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


def main_rank(records: list[Record]) -> int | None:
    """The rank at which most methods were run."""
    methods: dict[int, set[str]] = {}
    for r in records:
        methods.setdefault(r.config["rank"], set()).add(r.config["method"]["name"])
    return max(methods, key=lambda rank: len(methods[rank]), default=None)


def usual(record: Record, records: list[Record]) -> bool:
    """Is a run of the rank at which most of these were run, and of its method's usual width?

    The usual width is the config's for the method (`widths`), else the one that most runs have.
    """
    if record.config["rank"] != main_rank(records):
        return False
    widths = record.config.get("widths")
    name = record.config["method"]["name"]
    if widths is not None:
        return record.config["mlp_width"] == widths.get(name, widths["default"])
    every = [r.config["mlp_width"] for r in records if r.config["method"]["name"] == name]
    return record.config["mlp_width"] == Counter(every).most_common(1)[0][0]
