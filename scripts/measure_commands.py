"""The README's two commands in a fresh clone with a fresh environment: do they work, how long?

Also `pip install .` in a bare environment, with one training step. The committed state is what is
cloned; writes results/benchmarks/commands.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from oplora.harness.runs import environment, write_atomically

ROOT = Path(__file__).resolve().parent.parent
STEP = """
import sys, torch
from peft import LoraConfig, get_peft_model
from oplora import create_oplora_optimizer
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 2)), LoraConfig(target_modules=["0"]))
optimizer = create_oplora_optimizer(model, lr=1e-2)
model(torch.ones(3, 4)).square().mean().backward()
optimizer.step()
assert all(p.any() for group in optimizer.param_groups for p in group["params"])
import oplora.trainer
assert sys.prefix in oplora.__file__, f"{oplora.__file__} is not what pip installed"
"""


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
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
            "bare_install": bare_install(clone, Path(folder) / "bare", clean),
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


def bare_install(clone: Path, venv: Path, env: dict[str, str]) -> dict[str, float]:
    """`pip install .` in a new environment, then one training step: with torch and peft alone?"""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", venv], env=env, check=True)
    python = venv / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "torch==2.13.0"], env=env, check=True)  # as scripts/setup.sh
    subprocess.run([*pip, "."], cwd=clone, env=env, check=True)
    minutes = (time.perf_counter() - start) / 60
    subprocess.run([python, "-c", STEP], cwd=venv, env=env, check=True)
    listed = subprocess.run([*pip[:3], "freeze"], env=env, check=True, capture_output=True)
    packages = [line.split(b"==")[0].decode() for line in listed.stdout.splitlines()]
    for name in ("diffusers", "datasets", "hydra-core", "pandas", "matplotlib", "torchmetrics"):
        if name in packages:
            raise RuntimeError(f"pip install . brought {name}: it belongs to an extra")
    return {"minutes": minutes, "megabytes": _megabytes(venv), "packages": len(packages)}


def _megabytes(folder: Path) -> int:
    return round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6)


if __name__ == "__main__":
    sys.exit(main())
