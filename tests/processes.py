"""Experiments as processes of their own: killed in the middle, and what they left behind."""

import json
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def kill_once(command: list[str], folder: Path, trace: str, env: dict | None = None) -> None:
    """Start the command and kill it once a file `trace` with content is below the folder.

    trace: a pattern of rglob. The command must still be running then.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not _is_there(folder, trace):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def _is_there(folder: Path, trace: str) -> bool:
    try:
        return any(p.is_dir() or p.stat().st_size for p in folder.rglob(trace))
    except FileNotFoundError:  # the command deleted an old checkpoint while this looked
        return False


def only_run(folder: Path) -> tuple[Path, dict]:
    """Path and metrics of the one finished run below the folder."""
    (path,) = folder.rglob("metrics.json")
    return path.parent, json.loads(path.read_text())
