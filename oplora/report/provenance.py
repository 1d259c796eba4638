"""Where the numbers come from, and which of them are to be read with care."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas

from oplora.harness.runs import Record
from oplora.report.page import Section, Table

LIBRARIES = ("torch", "transformers", "diffusers", "peft")


def noted(records: list[Record]) -> list[Record]:
    """The same runs; `environment` gets a `note` where a run needs one.

    Code with uncommitted changes, or versions of LIBRARIES other than most runs have.
    """
    usual = Counter(map(_versions, records)).most_common(1)
    return [_with_note(r, usual[0][0]) for r in records]


def _with_note(record: Record, usual: str) -> Record:
    notes = []
    if record.environment.get("dirty"):
        notes.append("run from code with uncommitted changes")
    if _versions(record) != usual:
        notes.append(f"other library versions: {_versions(record)}")
    if not notes:
        return record
    return replace(record, environment={**record.environment, "note": "; ".join(notes)})


def _versions(record: Record) -> str:
    versions = record.environment.get("versions") or {}
    return json.dumps({name: versions.get(name) for name in LIBRARIES})


def section(root: Path, records: list[Record], problems: list[str]) -> Section:
    """Hardware, versions and revisions; and a list of the runs that are noted or left out."""
    cpus = sorted({str(r.environment.get("gpu") or r.environment.get("cpu")) for r in records})
    versions = sorted({str(r.environment.get("versions", {}).get("torch")) for r in records})
    revisions = sorted({str(r.environment.get("revision"))[:10] for r in records})
    text = (
        f"{len(records)} finished runs on {', '.join(cpus)}; torch {', '.join(versions)}; "
        f"code revision {', '.join(revisions)}. † marks a method one of whose runs is noted below."
    )
    rows = listed(root, records, problems)
    if rows.empty:
        return Section("Where the numbers come from", [text, "No run is noted or left out."])
    table = Table("noted_runs", "Runs that are noted, failed or left out.", rows, text=True)
    return Section("Where the numbers come from", [text, table])


def listed(root: Path, records: list[Record], problems: list[str]) -> pandas.DataFrame:
    """One row per run: those left out (by load_runs), those that diverged, those with a note."""
    rows = [dict(zip(("run", "what"), line.split(": ", 1), strict=True)) for line in problems]
    rows = [row for row in rows if "uncommitted" not in row["what"]]  # a note says it, too
    for r in records:
        name = str(r.path.relative_to(root))
        if isinstance(r.metrics.get("diverged"), str):  # matrix factorization has it per rate
            rows.append({"run": name, "what": f"failed: {r.metrics['diverged']}"})
        if "note" in r.environment:
            rows.append({"run": name, "what": r.environment["note"]})
    return pandas.DataFrame(sorted(rows, key=lambda row: row["run"]), columns=["run", "what"])
