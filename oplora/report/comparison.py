"""Fine-tuning methods beside one another: one experiment at one scale, each at its best rate."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import stdev

from oplora.harness.runs import Record
from oplora.report import titles
from oplora.report.metrics import Score
from oplora.report.rates import (
    BySeed,
    Sweep,
    by_seed,
    chosen_rates,
    deciding,
    shared_seeds,
    trained,
)
from oplora.report.statistics import mean_interval
from oplora.report.titles import Scope, by_method, by_number, method_of

LEARNS = 0.01  # of the base model's validation loss: what an adapter must gain at least
NOTHING_LEARNED = f"no adapter's validation loss is {LEARNS:.0%} below the base model's"


@dataclass(frozen=True)
class Comparison:
    """Runs that may be compared. `loss` chooses the learning rates, `score` is the test's result.

    Scores come out in the unit of the paper's table: points, or a distance.
    """

    experiment: str
    preset: str
    name: str  # of its tables and figures
    records: list[Record]
    loss: Callable[[Record], float | None]
    score: Score
    cited: Mapping[str, float] = field(default_factory=dict)  # method → the paper's score
    every: Sequence[Record] = ()  # with the runs of other ranks and widths, if there are any
    base: Sequence[Record] = ()  # of the model as it is
    swept: list[Record] | None = None  # what chooses the rates, if not `records`
    sweep_name: str | None = None  # of the figure of a sweep that several share
    swept_elsewhere: bool = False  # were the rates chosen on another data set?
    gate: str = ""  # why its scores cannot tell methods apart, if its base model is at fault
    variant: str = ""  # what tells it from others of its experiment and preset
    override: str = ""  # of the command that makes more runs of it

    @property
    def scope(self) -> Scope:
        scope = titles.preset(self.experiment, self.preset)
        return replace(scope, variant=self.variant or scope.variant)

    @cached_property
    def swept_seeds(self) -> BySeed:
        return by_seed(self.sweep_runs, self.loss)

    @cached_property
    def sweep(self) -> Sweep:
        return shared_seeds(self.swept_seeds)

    @property
    def sweep_runs(self) -> list[Record]:
        return self.records if self.swept is None else self.swept

    @property
    def setting(self) -> str:
        """What the chosen rates belong to: the preset, and the variant that was swept by itself."""
        return " ".join(filter(None, (self.preset, self._own_override)))

    @property
    def _own_override(self) -> str:
        """That of a variant that was swept by itself."""
        return self.override if self.swept is None else ""

    @property
    def own_sweep(self) -> bool:
        """Is there a sweep of learning rates, and was it made on this data?"""
        return bool(self.sweep) and not self.swept_elsewhere

    @cached_property
    def chosen(self) -> dict[str, float]:
        """The learning rate of every method, by validation."""
        return chosen_rates(self.swept_seeds)

    @cached_property
    def at_best(self) -> dict[str, list[Record]]:
        """The runs of every method at its chosen rate.

        Runs of the sweep, which have no score, stand in only where a method has no others.
        """
        return {
            method: [r for r in runs if self.score(r) is not None] or runs
            for method, runs in by_method(self.at_chosen_rate(self.records)).items()
        }

    def at_chosen_rate(self, records: Iterable[Record]) -> list[Record]:
        """Those at their method's chosen rate, or at any where there was no sweep of it."""
        found = trained(records)
        return [r for r in found if r.config["lr"] == self.chosen.get(method_of(r), r.config["lr"])]

    @cached_property
    def scored(self) -> list[Record]:
        """Runs with a score of every rank and width, at the rates chosen for the usual ones."""
        runs = self.at_chosen_rate(self.every or self.records)
        return [r for r in runs if self.score(r) is not None]

    def scores(self, method: str) -> dict[int, float]:
        """Seed → score of a method at its chosen rate."""
        return self._by_seed(self.at_best.get(method, []))

    def _by_seed(self, runs: Iterable[Record]) -> dict[int, float]:
        return {r.config["seed"]: s for r in runs if (s := self.score(r)) is not None}

    def records_of(self, method: str) -> list[Record]:
        """All runs of a method that did not diverge."""
        return [r for r in trained(self.records) if method_of(r) == method]

    def sweep_seeds(self, rates: Iterable[float], *methods: str) -> int:
        """With how many seeds at least these methods were swept at these rates."""
        found = [self.sweep.get(m, {}) for m in methods]
        return min(len(by_rate[rate]) for rate in rates for by_rate in found if rate in by_rate)

    def rivals(self, method: str) -> list[float]:
        """Rates whose losses differ from the best one's by less than the seeds do there.

        Not those that were compared with it on more seeds than the rest.
        """
        losses, best = self.losses(method), self.chosen[method]
        decided = deciding(self.swept_seeds[method])
        if len(decided) < len(losses):
            losses = {r: loss for r, loss in losses.items() if r == best or r not in decided}
        same = [self.loss(r) for r in self.seed_runs(method, best).values()]
        if len(same) < 2:
            return []
        return [r for r, loss in losses.items() if r != best and loss - losses[best] < stdev(same)]

    @property
    def base_loss(self) -> float | None:
        """Of the model as it is, on the data that the rates are chosen by."""
        known = [loss for r in self.base if (loss := self.loss(r)) is not None]
        return mean_interval(known)[0] if known else None

    @property
    def best_loss(self) -> float:
        """Of the adapters, each at its best rate."""
        adapters = [m for m in self.sweep if titles.method(m).role != "full"] or list(self.sweep)
        return min(min(self.losses(m).values()) for m in adapters)

    @cached_property
    def learns(self) -> bool:
        """Is the best adapter better than the base model, as far as that is known?"""
        if self.base_loss is None or not self.own_sweep:
            return True
        return self.best_loss <= (1 - LEARNS) * self.base_loss

    @property
    def unfit(self) -> str:
        """Why it cannot tell methods apart, if so."""
        return self.gate or ("" if self.learns else NOTHING_LEARNED)

    def seed_runs(self, method: str, rate: float) -> dict[int, Record]:
        """Seed → a run at this rate, of the usual rank and width, that did not diverge."""
        runs = [*([] if self.swept_elsewhere else self.sweep_runs), *self.records]
        at = [r for r in trained(runs) if method_of(r) == method and r.config["lr"] == rate]
        return {r.config["seed"]: r for r in at}

    @property
    def rates_figure(self) -> str:
        """The name of the sweep's figure, which may serve several comparisons."""
        return self.sweep_name or f"{self.name}_rates"

    @property
    def rank(self) -> int:
        return (self.records or self.sweep_runs)[0].config["rank"]

    def of_rank(self, method: str, rank: float) -> list[Record]:
        """Those of `scored` of a method at this rank."""
        return [r for r in self.scored if method_of(r) == method and r.config["rank"] == rank]

    def scores_at(self, method: str, rank: float) -> dict[int, float]:
        """Seed → score at the chosen rate, with another rank."""
        return self._by_seed(self.of_rank(method, rank))

    def by_width(self, method: str) -> dict[int, dict[int, float]]:
        """Width of the MLP → seed → score, at the rate chosen for the usual width."""
        widths = by_number(self.of_rank(method, self.rank), "mlp_width")
        return {width: self._by_seed(runs) for width, runs in widths.items()}

    def advantage(self, method: str, base: str) -> list[float]:
        """By how much a method is better than another, for every seed that both have."""
        return self.gains(self.scores(method), self.scores(base))

    def gains(self, mine: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
        """By how much scores are better than others, for every seed that both have."""
        shared = sorted(mine.keys() & theirs.keys())
        return [self.sign * (mine[seed] - theirs[seed]) for seed in shared]

    @property
    def sign(self) -> int:
        return 1 if self.score.higher else -1

    def losses(self, method: str) -> dict[float, float]:
        """Learning rate → mean validation loss; infinite where a run diverged."""
        return {rate: mean_interval(v)[0] for rate, v in self.sweep.get(method, {}).items()}

    def command(self, *methods: str, sweep: str = "seeds") -> str:
        """What makes missing runs of these methods: scripts/sweep_<sweep>.sh at the chosen rates.

        Of methods whose rate is not known, first the sweep that chooses it.
        """
        unknown = [method for method in methods if method not in self.chosen]
        if unknown:
            return self.rates_command(*unknown)
        at = " ".join(f"{method}={self.chosen[method]:g}" for method in methods)
        text = f"scripts/sweep_{sweep}.sh {self.experiment} {at}{_scale(self.preset)}"
        return f"{text} {self.override}" if self.override else text

    def can_run(self, method: str) -> bool:
        """Does the experiment have it?"""
        return True

    @property
    def base_command(self) -> str:
        """What runs the model as it is."""
        words = (f"preset={self.preset}", self.override, "fine_tune=false", "run_name=base")
        return " ".join(filter(None, (f"python experiments/{self.experiment}.py", *words)))

    def rates_command(self, *methods: str) -> str:
        """The sweep of these methods' learning rates."""
        text = rates_command(self.experiment, self.preset, methods)
        return " ".join(filter(None, (text, self._own_override)))

    def runs_of(self, *methods: str) -> list[Record]:
        """Every run of these methods: of the sweep, of other ranks and widths, diverged ones."""
        every = {str(r.path): r for r in (*self.sweep_runs, *self.records, *self.every)}
        return [r for r in every.values() if method_of(r) in methods]


def rates_command(experiment: str, preset: str, methods: Sequence[str]) -> str:
    """The sweep of these methods' learning rates."""
    scale = _scale(preset)
    if any("+" in method for method in methods):  # an optimizer that finds its own rate
        given = methods[0].lower().replace("+", " optimizer=")
        return f"python experiments/{experiment}.py preset={preset} method={given}"
    return f"scripts/sweep_learning_rates.sh {experiment}{scale} method={','.join(methods)}"


def _scale(preset: str) -> str:
    return "" if preset == "small" else f" preset={preset}"  # small: the scripts' default


def one_per_scale(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Where runs have several scores, the first."""
    found: dict[str, Comparison] = {}
    for c in comparisons:
        found.setdefault(c.name, c)
    return list(found.values())


def usual(records: Sequence[Record]) -> list[Record]:
    """Those of the rank at which most methods were run, and of their method's usual width.

    The usual width is the config's for the method (`widths`), else the one that most runs have.
    Of runs that train something besides the adapter at a rate of its own, those at the rate that
    most have.
    """
    direct = _most_common(rate for r in records if (rate := r.config.get("direct_lr")))
    records = [r for r in records if r.config.get("direct_lr") in (None, direct)]
    ranks = dict.fromkeys((method_of(r), r.config["rank"]) for r in records)
    rank = _most_common(rank for _, rank in ranks)
    widths = {
        name: _most_common(r.config["mlp_width"] for r in runs)
        for name, runs in by_method(records).items()
    }

    def usual_width(r: Record) -> int:
        given, name = r.config.get("widths"), method_of(r)
        return widths[name] if given is None else given.get(name, given["default"])

    right_rank = [r for r in records if r.config["rank"] == rank]
    return [r for r in right_rank if r.config["mlp_width"] == usual_width(r)]


def _most_common(values: Iterable[float]) -> float | None:
    return next((value for value, _ in Counter(values).most_common(1)), None)


def final_loss(record: Record) -> float | None:
    """The last validation loss of a run."""
    losses = record.metrics.get("validation_loss")
    return losses[-1][1] if losses else None
