"""What an experiment tells the report of itself, and what the report makes of its runs.

A room of oplora.studies takes part through a module `report` with an object EXPERIMENT: an
`Experiment`, or anything else with its `name`, `order`, `readme`, `stand_ins` and `read`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from oplora.report import across
from oplora.report.across import Losses, Standing
from oplora.report.claims import Claim, Thesis, of_experiment
from oplora.report.comparison import Comparison, one_per_scale, usual
from oplora.report.page import Part, Section
from oplora.report.tables import cited_scores, cited_table
from oplora.runs import Record


class Results(Protocol):
    """An experiment's part of the report."""

    comparisons: Sequence[Comparison]  # of fine-tuning methods

    def section(self) -> Section | None:
        """None where nothing was run."""

    def claims(self) -> list[Claim]: ...
    def standings(self) -> list[Standing]: ...
    def sweeps(self) -> list[Losses]: ...


@dataclass(frozen=True)
class Score:
    """A metric by which methods are compared."""

    metric: str
    unit: str
    digits: int = 1
    scale: float = 100  # fractions are shown in percent
    higher: bool = True  # is a higher score better?
    cited: str | None = None  # the column of the paper's table; may name the {rank}

    def __call__(self, record: Record) -> float | None:
        value = record.metrics.get(self.metric)
        return None if value is None else self.scale * value


@dataclass(frozen=True)
class Experiment:
    """Fine-tuning methods on the same data; runs of different presets never share a table."""

    name: str
    order: int  # of its section
    title: str  # of its section
    paper: str  # the file in results/paper with the paper's own numbers
    loss: Callable[[Record], float | None]  # chooses the learning rates
    scores: tuple[Score, ...] = ()  # the first is the one that stands for the others
    parts: Callable[[Comparison, list[Record]], list[Part]] | None = None  # and runs of the base
    theses: tuple[Thesis, ...] = ()
    readme: tuple[str, ...] = ()  # the tables that the README shows
    intro: tuple[str, ...] = ()  # paragraphs of the section
    variant: Callable[[Record], str] = lambda record: ""  # what else may not share a table
    variant_title: str = "{}"  # told where there are several
    compare: Callable[[list[Record]], list[Comparison]] | None = None  # default: by preset, variant
    body: Callable[["FineTuning"], list[Part]] | None = None  # default: `parts` one by one
    stand_ins: tuple[str, ...] = ()

    def read(self, records: list[Record]) -> "FineTuning":
        """Its part of the report, from runs of any experiments."""
        return FineTuning(self, [r for r in records if r.config["experiment"] == self.name])

    def comparisons(self, records: list[Record]) -> list[Comparison]:
        """For each preset and variant one by every score."""
        found = []
        scales = sorted({self._scale(r) for r in records if is_tuned(r)})
        for preset, variant in scales:
            every = [r for r in records if is_tuned(r) and self._scale(r) == (preset, variant)]
            several = len([scale for scale in scales if scale[0] == preset]) > 1
            usual_runs = [r for r in every if usual(r, every)]
            rank = usual_runs[0].config["rank"]
            for score in self.scores:
                column = score.cited and score.cited.format(rank=rank)
                comparison = Comparison(
                    experiment=self.name,
                    preset=preset,
                    name="_".join(filter(None, (self.name, preset, variant))),
                    records=usual_runs,
                    every=every,
                    loss=self.loss,
                    score=score,
                    unit=score.unit,
                    digits=score.digits,
                    higher=score.higher,
                    cited=cited_scores(self.paper, column) if column else {},
                    variant=self.variant_title.format(variant) if several else "",
                )
                found.append(comparison)
        return found

    def _scale(self, record: Record) -> tuple[str, str]:
        return record.config["preset"], self.variant(record)


def is_tuned(record: Record) -> bool:
    """Was anything trained? Else the base model was measured as it is."""
    return record.config.get("fine_tune", True)


@dataclass(frozen=True)
class FineTuning:
    """Results of a fine-tuning experiment, from its own runs."""

    experiment: Experiment
    records: list[Record]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        compare = self.experiment.compare or self.experiment.comparisons
        return compare(self.records)

    def section(self) -> Section | None:
        if not self.records:
            return None
        experiment = self.experiment
        paper = cited_table(f"{experiment.name}_paper", experiment.paper)
        parts = experiment.body(self) if experiment.body else self._parts()
        return Section(experiment.title, [*experiment.intro, paper, *parts])

    def _parts(self) -> list[Part]:
        return [
            part
            for c in one_per_scale(self.comparisons)
            for part in self.experiment.parts(c, self.base(c.preset))
        ]

    def base(self, preset: str) -> list[Record]:
        """Runs that measured the base model."""
        return [r for r in self.records if not is_tuned(r) and r.config["preset"] == preset]

    def claims(self) -> list[Claim]:
        return of_experiment(self.experiment.theses, self.experiment.name, self.comparisons)

    def standings(self) -> list[Standing]:
        return [found for c in self.comparisons if (found := across.standing(c))]

    def sweeps(self) -> list[Losses]:
        return [losses for c in one_per_scale(self.comparisons) for losses in across.losses(c)]
