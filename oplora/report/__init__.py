"""The report: tables, figures and verdicts, rendered from finished runs and nothing else."""

import re
from pathlib import Path

import matplotlib
import pandas
import yaml

from oplora.report import commonsense, mf, sdxl, vl_bart
from oplora.report.page import Section, Table, write_report
from oplora.runs import load_runs

matplotlib.use("Agg")
DEVIATIONS = Path(__file__).resolve().parents[2] / "results" / "paper" / "deviations.yaml"


def build(runs_dir: Path) -> list[Section]:
    """All sections for which there are finished runs below `runs_dir`."""
    if not runs_dir.is_dir():
        raise ValueError(f"{runs_dir} is no folder: give the folder that holds the runs")
    records, problems = load_runs(runs_dir)
    parts = [part.section(records) for part in (mf, sdxl, vl_bart, commonsense)]
    sections = [part for part in parts if part is not None]
    if not sections:
        raise ValueError(f"no finished run below {runs_dir}: run `make reproduce` first")
    return [*sections, deviations(), provenance(records, problems)]


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
    caption = "Each choice is a default in configs/; the switch is an override of any command."
    table = Table("deviations", caption, rows, text=True)
    return Section("Where the paper contradicts itself or is silent", [table])


def provenance(records, problems: list[str]) -> Section:
    """Where the numbers come from: hardware, versions, revisions, and what was left out."""
    cpus = sorted({str(r.environment.get("gpu") or r.environment.get("cpu")) for r in records})
    versions = sorted({str(r.environment.get("versions", {}).get("torch")) for r in records})
    revisions = sorted({str(r.environment.get("revision"))[:10] for r in records})
    return Section(
        "Where the numbers come from",
        [
            f"{len(records)} finished runs on {', '.join(cpus)}; torch {', '.join(versions)}; "
            f"code revision {', '.join(revisions)}.",
            "Left out or to be noted: " + ("; ".join(problems) if problems else "nothing") + ".",
        ],
    )
