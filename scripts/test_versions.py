"""The core tests with the lowest and the newest transformers, PEFT and diffusers that we allow.

    python scripts/test_versions.py            # both ends; about ten minutes and 2 GB each
    python scripts/test_versions.py newest     # nightly: what was released since?

Each end is installed through pip into a virtual environment that is thrown away afterwards.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("transformers", "peft", "diffusers")
CORE = (
    "optimizer optimizer_state starts lite peft peft_safety trainer diffusion export bare examples"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ends", nargs="*", help="lowest, newest; default: both")
    ends = parser.parse_args().ends or ["lowest", "newest"]
    return int(any([run(end) for end in ends]))  # all, also after one has failed


def run(end: str) -> int:
    """Exit code of the core tests in a fresh environment."""
    with tempfile.TemporaryDirectory() as folder:
        python = bare_environment(Path(folder) / "venv")
        pip = [python, "-m", "pip", "install", "--quiet", "--upgrade"]
        subprocess.run(
            [*pip, "-e", f"{ROOT}[experiments]", *tests_need(), *wanted(end)], check=True
        )
        listed = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True)
        chosen = [line for line in listed.stdout.split() if line.split("==")[0] in PACKAGES]
        print(f"{end}: {' '.join(chosen)}", flush=True)
        files = [str(ROOT / "tests" / f"test_{name}.py") for name in CORE.split()]
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        return subprocess.run(command, cwd=ROOT, env=clean_environment()).returncode


def bare_environment(folder: Path) -> str:
    """The Python of a new virtual environment with torch alone: where there is no GPU, for CPU."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "torch==2.13.0"], check=True)
    return python


def clean_environment() -> dict[str, str]:
    """This process's, without the paths that would import another oplora."""
    return {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}


def wanted(end: str) -> list[str]:
    """pip's requirements for one end of the ranges in pyproject.toml."""
    if end == "newest":
        return list(PACKAGES)
    if end != "lowest":
        raise ValueError(f"end {end!r} is unknown: use 'lowest' or 'newest'")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lowest = {name: re.search(rf'"{name}>=([\d.]+)', text) for name in PACKAGES}
    return [f"{name}=={found[1]}" for name, found in lowest.items()]


def tests_need() -> list[str]:
    """What the core tests import besides the experiments' packages."""
    return ["pytest>=8", "prodigyopt>=1.1", "schedulefree>=1.4"]


if __name__ == "__main__":
    sys.exit(main())
