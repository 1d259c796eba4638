"""Learning rates for scripts/sweep_*.sh: those that sweeps chose, or the grids of a sweep.

python scripts/rates.py vl_bart lora oplora          → lora=0.003 oplora=0.001
python scripts/rates.py glue task=sst2 lora oplora   → the same, of one of GLUE's tasks
python scripts/rates.py vl_bart --grids lora oplora  → a line per grid: its methods, its rates
"""

import argparse
import sys
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

import yaml

from oplora import report
from oplora.harness.runs import load_runs
from oplora.report.titles import CONFIGS, method, methods

PUBLISHED = Path(__file__).resolve().parent.parent / "results" / "published"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment")
    parser.add_argument("methods", nargs="*", help="with --grids: default as in configs/grids.yaml")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--runs", type=Path, default=PUBLISHED, help="default: results/published")
    parser.add_argument("--grids", action="store_true")
    arguments = parser.parse_intermixed_args()
    try:
        if arguments.grids:
            lines = grids(arguments.experiment, arguments.methods, arguments.preset)
        else:
            lines = [chosen(arguments)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def chosen(arguments: argparse.Namespace) -> str:
    known(arguments.experiment, [experiment.name for experiment in report.experiments()])
    named = [word for word in arguments.methods if "=" not in word]
    setting = " ".join([arguments.preset, *(w for w in arguments.methods if "=" in w)])
    for name in named:
        known(name, methods())
    records, problems = load_runs(arguments.runs / arguments.experiment / arguments.preset)
    found = report.Report(arguments.runs, records, problems).rates.get(arguments.experiment, {})
    if setting not in found and (others := [s for s in found if s.startswith(f"{setting} ")]):
        others = (other.removeprefix(f"{setting} ") for other in others)
        raise ValueError(
            f"rates of {arguments.experiment} are told with one of {', '.join(others)}"
        )
    rates = found.get(setting, {})
    missing = [method for method in named if method not in rates]
    if missing or not named:
        raise ValueError(
            f"no sweep of {', '.join(missing) or 'no method'} in {arguments.runs}: run "
            f"scripts/sweep_learning_rates.sh {arguments.experiment} method={','.join(missing)} "
            f"runtime.runs_dir={arguments.runs}"
        )
    return " ".join(f"{method}={rates[method]:g}" for method in named)


def known(name: str, names: Collection[str]) -> None:
    """ValueError where it is none of these, with those that are spelt alike."""
    if name not in names:
        near = get_close_matches(name, names) or names
        raise ValueError(f"there is no {name}: did you mean {' or '.join(near)}?")


def grids(experiment: str, wanted: list[str], preset: str = "small") -> list[str]:
    swept = yaml.safe_load((CONFIGS / "grids.yaml").read_text(encoding="utf-8"))
    known(experiment, swept)
    rates = swept[experiment] | swept[experiment].get(preset, {})
    by_grid: dict[str, list[str]] = {
        key: [] for key, values in rates.items() if key != "methods" and isinstance(values, list)
    }
    for name in wanted or rates["methods"]:
        known(name, methods())
        grid = name if name in rates else method(name).grid
        if grid not in rates:
            raise ValueError(
                f"configs/grids.yaml has no {grid} of {experiment}, as {name} asks for"
            )
        by_grid.setdefault(grid, []).append(name)
    return [
        f"{','.join(names)} {','.join(f'{rate:g}' for rate in rates[grid])}"
        for grid, names in by_grid.items()
        if names
    ]


if __name__ == "__main__":
    sys.exit(main())
