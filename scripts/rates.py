"""The learning rates that the sweeps of an experiment chose, as METHOD=RATE for scripts/sweep_*.sh.

python scripts/rates.py vl_bart lora oplora          → lora=0.003 oplora=0.001
"""

import argparse
import sys
from pathlib import Path

from oplora import report
from oplora.harness.runs import load_runs

PUBLISHED = Path(__file__).resolve().parent.parent / "results" / "published"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment")
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--runs", type=Path, default=PUBLISHED, help="default: results/published")
    arguments = parser.parse_args()
    records, _ = load_runs(arguments.runs / arguments.experiment / arguments.preset)
    chosen = {}
    for comparison in report.comparisons(records):
        chosen |= comparison.chosen
    missing = [method for method in arguments.methods if method not in chosen]
    if missing:
        print(
            f"error: no sweep of {', '.join(missing)} in {arguments.runs}: run "
            f"scripts/sweep_learning_rates.sh {arguments.experiment} method={','.join(missing)} "
            f"runtime.runs_dir={arguments.runs}",
            file=sys.stderr,
        )
        return 2
    print(" ".join(f"{method}={chosen[method]:g}" for method in arguments.methods))
    return 0


if __name__ == "__main__":
    sys.exit(main())
