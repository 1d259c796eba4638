"""Experiments as processes of their own: killed in the middle, and what they left behind."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def kill_once(command: list[str], begun: Callable[[], bool], env: dict | None = None) -> None:
    """Start the command and kill it as soon as `begun()`; it must be running then."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not begun():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def only_run(folder: Path) -> tuple[Path, dict]:
    """Path and metrics of the one finished run below the folder."""
    (path,) = folder.rglob("metrics.json")
    return path.parent, json.loads(path.read_text())
