"""What an experiment tells the report of itself, and what the report makes of its runs.

A room of oplora.studies takes part through a module `report` with an object EXPERIMENT: an
`Experiment`, or anything else with its `name`, `order`, `readme`, `stand_ins` and `read`, which
gives what `FineTuning` has: comparisons, settings, section, claims, gains, measured, standings,
sensitivity.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from oplora.harness.runs import Record
from oplora.report import across, tables
from oplora.report.against import Measured, measured
from oplora.report.claims import Claim, Thesis, of_experiment
from oplora.report.comparison import NOTHING_LEARNED, Comparison, one_per_scale, usual
from oplora.report.diagnostics import diagnosed
from oplora.report.figures import Curves, over_training, rate_parts
from oplora.report.front import Gain, gains_of
from oplora.report.metrics import Column, Score
from oplora.report.page import Part, Row, Section, Statement
from oplora.report.tables import Groups, Items
from oplora.report.titles import by_method


@dataclass(frozen=True)
class Experiment:
    """Fine-tuning methods on the same data; runs of different presets never share a table."""

    name: str
    order: int  # of its section
    title: str  # of its section
    paper: str  # the file in results/paper with the paper's own numbers
    loss: Callable[[Record], float | None]  # chooses the learning rates
    loss_title: str = "validation loss"
    loss_caption: str = "Validation loss after training, by learning rate"
    scores: tuple[Score, ...] = ()  # the first is the one that stands for the others
    about: str = ""  # how rates are chosen and the test set is scored
    columns: Callable[[Groups], Sequence[Column]] = lambda final: ()  # of the table of results
    units: str = ""  # of the columns
    names_rank: bool = False  # in captions
    items: Items | None = None
    curves: Curves | None = None
    untrained: Callable[[Groups], list[Row]] = lambda final: []  # what needs no model
    more: Callable[[Comparison, Groups], list[Part]] = lambda c, final: []
    theses: tuple[Thesis, ...] = ()
    readme: tuple[str, ...] = ()  # the tables that the README shows
    intro: tuple[str, ...] = ()  # paragraphs of the section
    variant: Callable[[Record], str] = lambda record: ""  # what else may not share a table
    variant_title: str = "{}"  # told where there are several
    variant_option: str = ""  # the override that chooses a variant, which has its own rates
    compare: Callable[[list[Record]], list[Comparison]] | None = None  # default: by preset, variant
    body: Callable[["FineTuning"], list[Part]] | None = None  # default: `parts` of each comparison
    stand_ins: tuple[str, ...] = ()

    def read(self, records: list[Record]) -> "FineTuning":
        """Its part of the report, from runs of any experiments."""
        return FineTuning(self, [r for r in records if r.config["experiment"] == self.name])

    def comparisons(self, records: list[Record]) -> list[Comparison]:
        """For each preset and variant one by every score."""
        found = []
        scales: dict[tuple[str, str], list[Record]] = {}
        bases: dict[tuple[str, str], list[Record]] = {}
        for r in records:
            where = scales if is_tuned(r) else bases
            where.setdefault((r.config["preset"], self.variant(r)), []).append(r)
        for (preset, variant), every in sorted(scales.items()):
            several = len([name for name, _ in scales if name == preset]) > 1
            usual_runs = usual(every)
            rank = usual_runs[0].config["rank"]
            for score in self.scores:
                column = score.cited and score.cited.format(rank=rank, variant=variant)
                comparison = Comparison(
                    experiment=self.name,
                    preset=preset,
                    name="_".join(filter(None, (self.name, preset, variant))),
                    records=usual_runs,
                    every=every,
                    base=bases.get((preset, variant), ()),
                    loss=self.loss,
                    score=score,
                    cited=tables.cited_scores(self.paper, column) if column else {},
                    variant=self.variant_title.format(variant) if several else "",
                    override=self.variant_option.format(variant),
                )
                found.append(comparison)
        return found

    def parts(self, c: Comparison) -> list[Part]:
        """The sweep, the results, the differences by item, the curves, and what is its own."""
        name, scope = c.name, f"{c.scope}, rank {c.rank}" if self.names_rank else str(c.scope)
        final = by_method(r for rs in c.at_best.values() for r in rs if c.score(r) is not None)
        found: list[Part] = [f"{c.scope}. {self.about}"]
        if c.sweep:
            caption = f"{self.loss_caption}; {scope}."
            found += rate_parts(c, caption, self.loss_title)
        if not (final or c.learns):
            found.append(Statement(name, unscored(c)))
        if final:
            caption = f"{scope}: test set, mean ± 95% interval (seeds). {self.units}"
            columns = self.columns(final)
            first = self.untrained(final) + tables.zero_shot(c.base, columns)
            found.append(tables.results_table(name, caption, final, columns, first))
        if final and self.items:
            things = self.items.columns[1]
            caption = (
                f"{scope}: difference to LoRA{self.items.unit} on the same test {things} (mean "
                f"over shared seeds) [95% bootstrap interval over {things}]."
            )
            found.append(tables.paired_table(f"{name}_paired", caption, final, self.items))
        drawn = c.at_best if self.curves else {}
        if any(self.curves.points(r) for runs in drawn.values() for r in runs):
            found.append(over_training(f"{name}_curves", drawn, self.curves, str(c.scope)))
        return found + self.more(c, final)


def is_tuned(record: Record) -> bool:
    """Was anything trained? Else the base model was measured as it is."""
    return record.config.get("fine_tune", True)


@dataclass(frozen=True)
class FineTuning:
    """What the report makes of an experiment's own runs."""

    experiment: Experiment
    records: list[Record]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        compare = self.experiment.compare or self.experiment.comparisons
        return compare(self.records)

    @property
    def settings(self) -> list[Comparison]:
        """One of each scale, whose losses over the rates may be told."""
        return one_per_scale(self.comparisons)

    def section(self) -> Section | None:
        """None where nothing was run."""
        if not self.records:
            return None
        experiment = self.experiment
        paper = tables.cited_table(f"{experiment.name}_paper", experiment.paper)
        parts = experiment.body(self) if experiment.body else self._parts()
        parts += diagnosed(self.comparisons)
        return Section(experiment.title, [*experiment.intro, paper, *parts])

    def _parts(self) -> list[Part]:
        return [part for c in self.settings for part in self.experiment.parts(c)]

    def claims(self) -> list[Claim]:
        return of_experiment(self.experiment.theses, self.experiment.name, self.comparisons)

    def gains(self) -> list[Gain]:
        return [gain for c in self.comparisons for gain in gains_of(c)]

    def measured(self) -> list[Measured]:
        return [found for c in self.comparisons for found in measured(c)]

    def standings(self) -> list[Row]:
        return [row for c in self.comparisons for row in across.standing(c)]

    def sensitivity(self) -> list[Row]:
        return [row for c in self.settings for row in across.sensitivity_of(c)]


def unscored(c: Comparison) -> str:
    """Why no method was scored."""
    return (
        f"{c.scope}: not scored, as {NOTHING_LEARNED} (that is {c.base_loss:.3f}, the best "
        f"adapter's {c.best_loss:.3f})."
    )
