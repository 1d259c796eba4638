"""One line while scripts/reproduce.sh works: run 19 of 26, about 12 min left.

The time left is what the published runs of the same experiments took, at the pace of the finished
ones so far. On a terminal the line is renewed, elsewhere it is written once a run. It works until
it is ended.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean

PUBLISHED = Path(__file__).resolve().parent.parent / "results" / "published"
EVERY = 2.0  # seconds


def seconds(experiment: str) -> float:
    """What a published run of it takes, mean."""
    paths = (PUBLISHED / experiment).rglob("metrics.json")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    taken = [m.get("train_seconds", 0) + m.get("evaluate_seconds", 0) for m in found]
    return fmean(taken) if taken else 60.0


def finished(runs: Path, plan: dict[str, int]) -> Counter:
    """Runs by experiment, of those that are planned."""
    done = {name: len(list((runs / name).rglob("metrics.json"))) for name in plan}
    return Counter({name: min(count, plan[name]) for name, count in done.items()})


def line(plan: dict[str, int], takes: dict[str, float], begun: Counter, done: Counter,
         elapsed: float) -> str:  # fmt: skip
    """begun: what was finished at the start, `elapsed` seconds ago."""
    total, ready = sum(plan.values()), done.total()
    left = sum((plan[name] - done[name]) * takes[name] for name in plan)
    worked = sum((done[name] - begun[name]) * takes[name] for name in plan)
    pace = elapsed / worked if worked else 1.0
    return f"run {min(ready + 1, total)} of {total}, about {left * pace / 60:.0f} min left"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("plan", nargs="+", help="EXPERIMENT=COUNT, as vl_bart=3")
    given = parser.parse_args()
    runs, plan = given.runs, {k: int(count) for k, count in (p.split("=") for p in given.plan)}
    takes = {name: seconds(name) for name in plan}
    begun, start, shown = finished(runs, plan), time.monotonic(), None
    while True:
        done = finished(runs, plan)
        text = line(plan, takes, begun, done, time.monotonic() - start)
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif done != shown:
            print(text, file=sys.stderr, flush=True)
        shown = done
        time.sleep(EVERY)


if __name__ == "__main__":
    main()
