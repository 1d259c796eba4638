"""Render tables, figures and verdicts from finished runs.

python scripts/report.py                                 results/published, and the README's tables
python scripts/report.py results/runs --out results/report
"""

import argparse
import json
import sys
import time
from pathlib import Path

from oplora.report import build, fill
from oplora.report.page import Statement, Table, markdown_table, write_report
from oplora.runs import write_atomically

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "published"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="?", type=Path, help="default: results/published")
    parser.add_argument("--out", type=Path, help="default: RUNS/report")
    arguments = parser.parse_args()
    runs = arguments.runs or PUBLISHED
    start = time.perf_counter()
    try:
        sections = build(runs)
        path = write_report("OP-LoRA: results", sections, arguments.out or runs / "report")
        if arguments.runs is None:
            fill_readme(sections)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path} ({time.perf_counter() - start:.0f} s)")
    return 0


def fill_readme(sections: list) -> None:
    """The README's tables and statements, from the published runs and the measured commands."""
    parts = [part for section in sections for part in section.parts]
    tables = {part.name: markdown_table(part.rows) for part in parts if isinstance(part, Table)}
    tables |= {part.name: part.text for part in parts if isinstance(part, Statement)}
    measured = json.loads((ROOT / "results" / "benchmarks" / "commands.json").read_text())
    minutes = {c["command"]: c["minutes"] for c in measured["commands"]}
    tables["commands"] = (
        f"Measured in a fresh clone on {measured['cores']} cores ({measured['cpu']}): set-up "
        f"{minutes['make setup']:.1f} min and {measured['venv_megabytes']} MB, then `make test` "
        f"{minutes['make test']:.1f} min, `make reproduce` {minutes['make reproduce']:.1f} min "
        f"and {measured['results_megabytes']} MB of results; started again it skips everything and "
        f"renders the report anew in {measured['reproduce_again_seconds']:.0f} s."
    )
    readme = ROOT / "README.md"
    write_atomically(readme, fill(readme.read_text(encoding="utf-8"), tables))


if __name__ == "__main__":
    sys.exit(main())
