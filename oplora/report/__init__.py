"""The report: tables, figures and verdicts, rendered from finished runs and nothing else."""

import importlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from oplora.harness.runs import Record, load_runs
from oplora.report import ablation, across, against, benchmarks, claims, front, price, provenance
from oplora.report.comparison import Comparison
from oplora.report.explorer import explorer
from oplora.report.page import (
    Part,
    ReportFigure,
    Row,
    Section,
    Statement,
    Table,
    Writer,
    write_summary,
)

PAPER = Path(__file__).resolve().parents[2] / "results" / "paper"
DEVIATIONS, RELATIVES = PAPER / "deviations.yaml", PAPER / "relatives.yaml"


def experiments() -> list:
    """EXPERIMENT of every room of oplora.studies that has a module `report`, in its order."""
    studies = importlib.import_module("oplora.studies")
    rooms = {
        path.parent.name
        for folder in studies.__path__
        for path in [*Path(folder).glob("*/report.py"), *Path(folder).glob("*/report")]
    }
    modules = [importlib.import_module(f"oplora.studies.{room}.report") for room in rooms]
    return sorted((m.EXPERIMENT for m in modules), key=lambda e: (e.order, e.name))


def comparisons(records: list[Record]) -> list[Comparison]:
    """Of all fine-tuning experiments."""
    return [c for experiment in experiments() for c in experiment.read(records).comparisons]


@dataclass(frozen=True)
class Report:
    """Everything that is shown of the runs below `root`."""

    root: Path
    records: list[Record]
    problems: list[str]  # of runs that are left out
    published: "Report | None" = None  # what these are compared with, if so

    @cached_property
    def results(self) -> list:
        """Of every experiment: what `oplora.report.experiment` lists."""
        return [experiment.read(self.records) for experiment in experiments()]

    @property
    def comparisons(self) -> list[Comparison]:
        return [c for results in self.results for c in results.comparisons]

    @cached_property
    def against(self) -> Table | None:
        """Of your runs; None where none is compared with a published one."""
        own, theirs = ([m for results in report.results for m in results.measured()]
                       for report in (self, self.published or self))  # fmt: skip
        table = against.against(own, theirs if self.published else [])
        return table if table.rows else None

    @cached_property
    def claims(self) -> list[claims.Claim]:
        """All claims of the paper, judged or waiting for runs, as the page shows them."""
        own = [claim for results in self.results for claim in results.claims()]
        return [
            claims.consistent(self.comparisons),
            *sorted(own, key=lambda claim: claim.order),
            *claims.general(self.comparisons, experiments()[-1].name),
        ]

    @cached_property
    def sections(self) -> list[Section]:
        """ValueError where nothing was run."""
        own = [section for results in self.results if (section := results.section())]
        if not own:
            raise ValueError(f"no finished run below {self.root}: run `make reproduce` first")
        folders = [self.root / "benchmarks", self.root.resolve().parent / "benchmarks"]
        speed = next(filter(None, map(benchmarks.section, folders)), None)
        gains = [gain for results in self.results for gain in results.gains()]
        shown = filter(None, [explorer(self.root, self.comparisons)])
        untuned = price.parts(self.comparisons)
        generators = ablation.section([c for each in self.results for c in each.settings])
        yours = [Section("Your runs", [self.against])] if self.against else []
        return [
            *yours,
            Section("Does it help?", [*front.parts(gains), *shown, *claims.parts(self.claims)]),
            *([Section("The price of not tuning", untuned)] if untuned else []),
            across.section(
                self.comparisons,
                [row for results in self.results for row in results.standings()],
                [row for results in self.results for row in results.sensitivity()],
                [method for experiment in experiments() for method in experiment.stand_ins],
            ),
            *([generators] if generators else []),
            *own,
            *([speed] if speed else []),
            deviations(),
            relatives(),
            provenance.section(self.root, self.records, self.problems),
        ]

    @cached_property
    def parts(self) -> list[Part]:
        return [part for section in self.sections for part in section.parts]

    def write(self, out: Path) -> Path:
        """All files of it; the path of the index.html written."""
        path = Writer(out, self.root, self.records).write("OP-LoRA: results", self.sections)
        tables = [part for part in self.parts if isinstance(part, Table)]
        provenance.write_runs(self.root, self.records, tables, out / "tables")
        write_summary(out, self.summary)
        return path

    @property
    def rates(self) -> dict[str, dict[str, dict[str, float]]]:
        """Experiment → preset → method → the learning rate that its sweep chose.

        Where variants have rates of their own, "small task=sst2" stands in place of "small".
        """
        found: dict = {}
        for c in self.comparisons:
            found.setdefault(c.experiment, {}).setdefault(c.setting, {}).update(c.chosen)
        return found

    @property
    def summary(self) -> dict[str, Any]:
        """What holds, for programs: claims with verdicts and evidence, statements, figures."""
        told = ("text", "section", "verdict", "evidence", "where", "p", "figure", "command")
        return {
            "runs": len(self.records),
            "rates": self.rates,
            "statements": {p.name: p.text for p in self.parts if isinstance(p, Statement)},
            "claims": [
                {key: getattr(claim, key) for key in told}
                | {
                    "scope": str(claim.scope),
                    "runs": [provenance.run_id(self.root, r) for r in claim.runs],
                }
                for claim in self.claims
            ],
            "figures": {p.file: p.caption for p in self.parts if isinstance(p, ReportFigure)},
        }


def build(runs_dir: Path, published: Path | None = None) -> Report:
    """The report of all finished runs below `runs_dir`, compared with those `published`."""
    if not runs_dir.is_dir():
        raise ValueError(f"{runs_dir} is no folder: give the folder that holds the runs")
    records, problems = load_runs(runs_dir)
    theirs = build(published) if published else None
    return Report(runs_dir, provenance.noted(records), problems, theirs)


def fill(text: str, tables: dict[str, str]) -> str:
    """`text` with what stands between <!-- NAME --> and <!-- /NAME --> replaced by tables[NAME].

    ValueError if a name in the text has no table.
    """

    def replacement(match: re.Match) -> str:
        name = match[1]
        if name not in tables:
            raise ValueError(f"nothing to fill in for <!-- {name} -->: of {', '.join(tables)}")
        return f"<!-- {name} -->\n{tables[name]}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", replacement, text, flags=re.DOTALL)


def relatives() -> Section:
    """Other systems around LoRA: what each of them changes, and its row here."""
    rows = list(map(Row, yaml.safe_load(RELATIVES.read_text(encoding="utf-8"))))
    caption = (
        "OP: can it be combined with MLPs in the optimizer? Plain: is its checkpoint a plain LoRA?"
    )
    return Section("Relatives", [Table("relatives", caption, rows, text=True)])


def deviations() -> Section:
    """Contradictions and gaps of the paper, with the choice made here and its switch."""
    rows = list(map(Row, yaml.safe_load(DEVIATIONS.read_text(encoding="utf-8"))))
    caption = (
        "Each choice is a default in configs/; the switch is an override where a method has it."
    )
    table = Table("deviations", caption, rows, text=True)
    return Section("Where the paper contradicts itself or is silent", [table])
