"""Render tables, figures and verdicts from finished runs.

python scripts/report.py                                 results/published, and the README's tables
python scripts/report.py results/runs --out results/report
"""

import argparse
import ast
import json
import sys
import time
from pathlib import Path

import pandas

from oplora.harness.runs import write_atomically
from oplora.report import build, claims, fill
from oplora.report.page import Statement, Table, markdown_table, write_report

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "published"
PENDING = {  # the README's tables of experiments that may have no published runs
    "sdxl_small_twemoji": "sdxl",
    "sdxl_small_blobs": "sdxl",
    "llava_cars_small": "llava_cars",
    "vl_bart_small": "vl_bart",
    "commonsense_small_float32": "commonsense",
}


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
            fill_readme(sections, ROOT / "README.md")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path} ({time.perf_counter() - start:.0f} s)")
    return 0


def fill_readme(sections: list, readme: Path) -> None:
    """The README's tables and statements, its list of files, and the measured commands."""
    parts = [part for section in sections for part in section.parts]
    rows = {part.name: part.rows for part in parts if isinstance(part, Table)}
    texts = {
        name: f"Not run yet: `scripts/sweep_learning_rates.sh {experiment}`, then `sweep_seeds.sh`."
        for name, experiment in PENDING.items()
    }
    texts |= {name: markdown_table(compact(table)) for name, table in rows.items()}
    texts |= {part.name: part.text for part in parts if isinstance(part, Statement)}
    texts["claims_short"] = markdown_table(claims.short(rows["claims"]))
    texts |= {"commands": commands(), "files": files()}
    write_atomically(readme, fill(readme.read_text(encoding="utf-8"), texts))


def compact(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Without the single commonsense tasks and the costs."""
    left_out = {"trained parameters", "shipped parameters", "train seconds", "peak memory, GB"}
    if "held-out NLL" in rows and "average" in rows:
        columns = list(rows.columns)
        left_out |= set(columns[columns.index("average") + 1 : columns.index("trained parameters")])
    return rows[[column for column in rows.columns if column not in left_out]]


def commands() -> str:
    """What the README's commands cost, from scripts/measure_commands.py."""
    measured = json.loads((ROOT / "results" / "benchmarks" / "commands.json").read_text())
    minutes = {c["command"]: c["minutes"] for c in measured["commands"]}
    return (
        f"Measured at revision {measured['revision'][:7]} in a fresh clone on {measured['cores']} "
        f"cores ({measured['cpu']}): set-up {minutes['make setup']:.1f} min and "
        f"{measured['venv_megabytes']} MB, then `make test` {minutes['make test']:.1f} min, "
        f"`make reproduce` {minutes['make reproduce']:.1f} min and {measured['results_megabytes']} "
        f"MB of results; started again it skips what is there and renders the report anew in "
        f"{measured['reproduce_again_seconds']:.0f} s."
    )


def files() -> str:
    """One line a file: what its first line says of it."""
    package = ROOT / "oplora"
    folders = [package / name for name in ("baselines", "harness", "studies", "report")]
    paths = sorted(package.glob("*.py"))  # the library first
    for folder in (*folders, ROOT / "base_models"):
        paths += sorted(folder.rglob("*.py"))
    lines = {}
    for path in (*paths, *sorted((ROOT / "scripts").glob("*"))):
        if path.suffix == ".py" and path.name != "__init__.py":
            lines[path] = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        elif path.suffix == ".sh":
            text = path.read_text(encoding="utf-8").removeprefix("#!/usr/bin/env bash\n")
            lines[path] = text.splitlines()[0].removeprefix("# ")
    listed = [f"{path.relative_to(ROOT)!s:52} {text.splitlines()[0].rstrip('.')}"
              for path, text in lines.items()]  # fmt: skip
    return "```\n" + "\n".join(listed) + "\n```"


if __name__ == "__main__":
    sys.exit(main())
