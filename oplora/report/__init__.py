"""The report: tables, figures and verdicts, rendered from finished runs and nothing else."""

import re
from pathlib import Path

import pandas
import yaml

from oplora.harness.runs import Record, load_runs
from oplora.report import (
    across,
    benchmarks,
    claims,
    commonsense,
    llava_cars,
    mf,
    provenance,
    sdxl,
    vl_bart,
)
from oplora.report.comparison import Comparison
from oplora.report.page import Section, Table, write_report

DEVIATIONS = Path(__file__).resolve().parents[2] / "results" / "paper" / "deviations.yaml"


PARTS = (mf, sdxl, vl_bart, llava_cars, commonsense)  # section(records), comparisons(records)


def build(runs_dir: Path) -> list[Section]:
    """All sections for which there are finished runs below `runs_dir`."""
    if not runs_dir.is_dir():
        raise ValueError(f"{runs_dir} is no folder: give the folder that holds the runs")
    records, problems = load_runs(runs_dir)
    records = provenance.noted(records)
    sections = [found for part in PARTS if (found := part.section(records)) is not None]
    if not sections:
        raise ValueError(f"no finished run below {runs_dir}: run `make reproduce` first")
    compared = comparisons(records)
    studies = mf.studies(records)
    folders = [runs_dir / "benchmarks", runs_dir.resolve().parent / "benchmarks"]
    speed = next(filter(None, map(benchmarks.section, folders)), None)
    return [
        claims.section(compared, mf.complete(studies)),
        across.section(compared, studies),
        *sections,
        *([speed] if speed else []),
        deviations(),
        provenance.section(runs_dir, records, problems),
    ]


def comparisons(records: list[Record]) -> list[Comparison]:
    """Of all fine-tuning experiments."""
    parts = [part for part in PARTS if hasattr(part, "comparisons")]
    return [c for part in parts for c in part.comparisons(records)]


def render(runs_dir: Path, out: Path) -> Path:
    """Render all runs below `runs_dir`; the path of the index.html written."""
    return write_report("OP-LoRA: results", build(runs_dir), out)


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


def deviations() -> Section:
    """Contradictions and gaps of the paper, with the choice made here and its switch."""
    rows = pandas.DataFrame(yaml.safe_load(DEVIATIONS.read_text(encoding="utf-8")))
    caption = (
        "Each choice is a default in configs/; the switch is an override where a method has it."
    )
    table = Table("deviations", caption, rows, text=True)
    return Section("Where the paper contradicts itself or is silent", [table])
