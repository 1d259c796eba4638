"""Render tables, figures and verdicts from finished runs.

python scripts/report.py                   results/published, and the tables of README.md and docs/
python scripts/report.py results/runs --out results/report
"""

import argparse
import ast
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pandas

from oplora.harness.runs import write_atomically
from oplora.report import Report, build, experiments, fill
from oplora.report.page import Statement, Table, markdown_table
from oplora.report.titles import title

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "published"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="?", type=Path, help="default: results/published")
    parser.add_argument("--out", type=Path, help="default: RUNS/report")
    parser.add_argument("--against", type=Path, help="published runs to compare them with")
    arguments = parser.parse_args()
    runs = arguments.runs or PUBLISHED
    start = time.perf_counter()
    try:
        report = build(runs, arguments.against)
        path = report.write(arguments.out or runs / "report")
        if arguments.runs is None:
            fill_texts(report, [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if report.against:
        print(f"\n{report.against.caption}\n\n{report.against.frame.to_string(index=False)}\n")
    print(f"{path} ({time.perf_counter() - start:.0f} s)")
    return 0


def fill_texts(report: Report, paths: Iterable[Path]) -> None:
    """Tables and statements between markers, the list of files, and the measured commands."""
    prices = [f"price_small{part}" for part in ("", "_one_rate", "_training")]
    texts = dict.fromkeys(("answer", "which", *prices), "Not run yet: `make reproduce`.")
    generators = "Not run yet: `scripts/sweep_learning_rates.sh vl_bart method=oplora_scalar`."
    texts |= dict.fromkeys(("ablation_small", "ablation_small_told"), generators)
    texts |= dict.fromkeys(("memory", "state_file"), "Not measured yet: `make benchmark`.")
    texts |= {
        name: f"Not run yet: `scripts/sweep_learning_rates.sh {experiment.name}`, then "
        "`sweep_seeds.sh`."
        for experiment in experiments()
        for name in experiment.readme
    }
    for part in report.parts:
        if isinstance(part, Table):
            texts[part.name] = markdown_table(part.compact)
        elif isinstance(part, Statement):
            texts[part.name] = part.text
    texts |= {"commands": commands(), "files": files()}
    texts |= {"paper_scale": paper_scale(False), "paper_scale_methods": paper_scale(True)}
    for path in paths:
        write_atomically(path, fill(path.read_text(encoding="utf-8"), texts))


def commands() -> str:
    """What the README's two commands cost, from scripts/measure_commands.py."""
    measured = json.loads((ROOT / "results" / "benchmarks" / "commands.json").read_text())
    minutes = {c["command"]: c["minutes"] for c in measured["commands"]}
    return (
        f"Measured at revision {measured['revision'][:7]} in a fresh clone on {measured['cores']} "
        f"cores ({measured['cpu']}): set-up {minutes['make setup']:.1f} min and "
        f"{measured['venv_megabytes']} MB, `make test` {minutes['make test']:.1f} min, `make "
        f"reproduce` {minutes['make reproduce']:.1f} min and {measured['results_megabytes']} MB, "
        f"again {measured['reproduce_again_seconds']:.0f} s."
    )


def paper_scale(whole: bool) -> str:
    """What the paper presets need, from scripts/expected_costs.py: a row per experiment.

    whole: of every method; else the most that any of them needs.
    """
    path = ROOT / "results" / "benchmarks" / "paper_scale.json"
    by_title: dict[str, list[dict]] = {}
    for row in json.loads(path.read_text(encoding="utf-8")):
        by_title.setdefault(row["title"], []).append(row)

    def each(rows: list[dict], key: str, unit: float, digits: int = 0) -> str:
        numbers = [row[key] / unit for row in rows]
        return " / ".join(f"{n:.{digits}f}" for n in (numbers if whole else [max(numbers)]))

    def hours(rows: list[dict], key: str) -> str:
        short = max(row[key] for row in rows) < 3600
        return f"{each(rows, key, 60)} min" if short else f"{each(rows, key, 3600, 1)} h"

    def assumed(row: dict) -> str:
        return f"{row['utilisation']:.0%} of {row['peak_tflops']}"

    table = [
        {
            "experiment": name,
            **({"methods": " / ".join(title(row["method"]) for row in rows)} if whole else {}),
            "GPU memory, GB": each(rows, "memory_bytes", 1e9),
            "training": hours(rows, "training_seconds"),
            "evaluation": hours(rows[:1], "evaluation_seconds"),
            "disk, GB": each(rows, "disk_bytes", 1e9),
            **({"assumed of an H100, TFLOP/s": assumed(rows[0])} if whole else {}),
        }
        for name, rows in by_title.items()
    ]
    return markdown_table(pandas.DataFrame(table))


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
