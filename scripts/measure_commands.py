"""The README's two commands in a fresh clone with a fresh environment: do they work, how long?

Writes results/benchmarks/commands.json; the committed state is what is cloned.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from oplora.harness.runs import environment, write_atomically

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    facts = environment()
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "oplora"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        commands = []
        for command in ("make setup", "make test", "make reproduce"):
            start = time.perf_counter()
            subprocess.run(command.split(), cwd=clone, env=clean, check=True)
            commands.append({"command": command, "minutes": (time.perf_counter() - start) / 60})
        start = time.perf_counter()
        subprocess.run(["make", "reproduce"], cwd=clone, env=clean, check=True)
        again = time.perf_counter() - start
        if not (clone / "results" / "report" / "index.html").exists():
            raise RuntimeError("make reproduce wrote no report")
        result = {
            "commands": commands,
            "reproduce_again_seconds": again,
            "venv_megabytes": _megabytes(clone / ".venv"),
            "results_megabytes": _megabytes(clone / "results" / "runs"),
            "cores": facts["cores"],
            "cpu": facts["cpu"],
            "revision": facts["revision"],
        }
    path = ROOT / "results" / "benchmarks" / "commands.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


def _megabytes(folder: Path) -> int:
    return round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6)


if __name__ == "__main__":
    sys.exit(main())
