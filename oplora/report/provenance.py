"""Where the numbers come from, and which of them are to be read with care."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pandas

from oplora.harness.runs import Record
from oplora.report.page import Row, Section, Table
from oplora.report.titles import method_of

LIBRARIES = ("torch", "transformers", "diffusers", "peft")
NUMBERS = {"rate": "lr", "seed": "seed", "rank": "rank", "width": "mlp_width"}  # of a config


def noted(records: list[Record]) -> list[Record]:
    """The same runs; `environment` gets a `note` where a run needs one.

    Code with uncommitted changes, or versions of LIBRARIES other than most runs have.
    """
    usual = Counter(map(_versions, records)).most_common(1)
    found = []
    for r in records:
        notes = ["run from code with uncommitted changes"] if r.environment.get("dirty") else []
        if (versions := _versions(r)) != usual[0][0]:
            notes.append(f"other library versions: {versions}")
        note = {"note": "; ".join(notes)} if notes else {}
        found.append(replace(r, environment={**r.environment, **note}))
    return found


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
    if not rows:
        return Section("Where the numbers come from", [text, "No run is noted or left out."])
    table = Table("noted_runs", "Runs that are noted, failed or left out.", rows, text=True)
    return Section("Where the numbers come from", [text, table])


def listed(root: Path, records: list[Record], problems: list[str]) -> list[Row]:
    """One row per run: those left out (by load_runs), those that diverged, those with a note."""
    lines = [(*line.split(": ", 1), ()) for line in problems]
    lines = [line for line in lines if "uncommitted" not in line[1]]  # a note says it, too
    for r in records:
        name = run_id(root, r)
        if isinstance(r.metrics.get("diverged"), str):  # matrix factorization has it per rate
            lines.append((name, f"failed: {r.metrics['diverged']}", [r]))
        if "note" in r.environment:
            lines.append((name, r.environment["note"], [r]))
    lines.sort(key=lambda line: line[0])
    return [Row({"run": name, "what": what}, runs) for name, what, runs in lines]


def run_id(root: Path, record: Record) -> str:
    """The run's folder below the folder of all runs."""
    return record.path.relative_to(root).as_posix()


def runs_table(root: Path, records: Iterable[Record]) -> pandas.DataFrame:
    """Every run with what identifies it, and its metrics as they were written.

    Metrics that are lists (curves) stay in the run's metrics.json; nested ones get dotted names.
    """
    rows = []
    for r in records:
        named = {"run": run_id(root, r), "experiment": r.config["experiment"]}
        named |= {"preset": r.config["preset"], "method": method_of(r)}
        named |= {name: r.config.get(key) for name, key in NUMBERS.items()}
        (metrics,) = pandas.json_normalize(r.metrics).to_dict("records")
        kept = {k: v for k, v in metrics.items() if v is not None and not isinstance(v, list)}
        rows.append(named | dict(sorted(kept.items())))
    return pandas.DataFrame(rows, dtype=object)


def write_runs(
    root: Path, records: Iterable[Record], tables: Iterable[Table], folder: Path
) -> None:
    """runs.csv with all runs, and <table>.runs.csv with the runs behind each row of a table.

    Rows are counted from 0, as they stand in the table's own CSV file.
    """
    runs_table(root, records).to_csv(folder / "runs.csv", index=False)
    for table in tables:
        behind = [
            {"row": number, "run": run}
            for number, row in enumerate(table.rows)
            for run in dict.fromkeys(run_id(root, r) for r in row.runs)  # members share theirs
        ]
        if behind:
            pandas.DataFrame(behind).to_csv(folder / f"{table.name}.runs.csv", index=False)
