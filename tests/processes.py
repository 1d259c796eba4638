"""Experiments as users start them: in this process, or in one that is killed in the middle."""

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent


CHECKPOINT = "optimizer.pt trainer_state.json"  # a trace of a whole one


def run_here(command: list[str], env: dict | None = None) -> subprocess.CompletedProcess:
    """`subprocess.run` of [python, script, …] without the eight seconds that its imports take.

    For what needs no process of its own; several of these may follow one another in one process.
    """
    out, err, code, threads = io.StringIO(), io.StringIO(), 0, torch.get_num_threads()
    with (
        mock.patch.object(sys, "argv", [str(part) for part in command[1:]]),
        mock.patch.dict(os.environ, env or {}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        folder = Path.cwd()
        os.chdir(ROOT)
        try:
            runpy.run_path(command[1], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            os.chdir(folder)
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision("highest")
            torch.set_flush_denormal(False)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def kill_once(command: list[str], folder: Path, trace: str, env: dict | None = None) -> None:
    """Start the command and kill it once what `trace` names has content below the folder.

    trace: patterns of rglob. The command must still be running then.
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
        return all(
            any(p.is_dir() or p.stat().st_size for p in folder.rglob(pattern))
            for pattern in trace.split()
        )
    except FileNotFoundError:  # the command deleted an old checkpoint while this looked
        return False


def base_and_still(run_with, folder: Path) -> tuple[dict, dict]:
    """Metrics of the base model and of a training whose rate moves nothing.

    run_with: starts the experiment with a folder for its runs and overrides.
    """
    found = []
    for name, *overrides in (
        ("base", "fine_tune=false", "run_name=base"),
        ("still", "method=lora", "lr=1e-12", "direct_lr=1e-12", "training.weight_decay=0"),
    ):
        done = run_with(folder / name, *overrides)
        assert getattr(done, "returncode", 0) == 0, done.stderr[-3000:]
        found.append(only_run(folder / name)[1])
    return tuple(found)


def only_run(folder: Path) -> tuple[Path, dict]:
    """Path and metrics of the one finished run below the folder."""
    (path,) = folder.rglob("metrics.json")
    return path.parent, json.loads(path.read_text())
