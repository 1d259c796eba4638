"""`make reproduce`: what it runs and skips, its one line, and how it is ended."""

import importlib.util
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

STUB = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
case "$1 $2" in
  "scripts/rates.py vl_bart") exit 2 ;;
  scripts/rates.py*) echo lora=0.003 oplora=0.001 ;;
  experiments/commonsense.py*) exit 1 ;;
esac
"""


def test_reproduce_renders_early_skips_what_it_cannot_and_goes_on_after_a_failure(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    calls = tmp_path / "calls"
    environment = {**os.environ, "PYTHON": str(stub), "CALLS": str(calls), "JOBS": "2"}
    command = ["bash", str(ROOT / "scripts/reproduce.sh"), "runs", "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = calls.read_text().splitlines()
    assert [line.split()[0] for line in lines[:2]] == [
        "experiments/matrix_factorization.py", "scripts/report.py",
    ]  # fmt: skip
    assert lines[-1] == "scripts/report.py runs --out out --against results/published"
    (progress,) = [line.split()[2:] for line in lines if line.startswith("scripts/progress.py")]
    assert {"matrix_factorization=15", "commonsense=3"} <= set(progress)
    assert not any(planned.startswith("vl_bart") for planned in progress)
    assert "skipping vl_bart" in done.stdout  # the stub knows no rates for it
    seeds = [line for line in lines if line.startswith("experiments/commonsense.py")]
    assert seeds[0].split()[3:5] == ["fine_tune=false", "run_name=base"]
    assert [line.split()[3:6] for line in seeds[1:]] == [
        ["method=lora", "lr=0.003", "seed=0"], ["method=oplora", "lr=0.001", "seed=0"],
    ]  # fmt: skip
    assert done.returncode == 1  # commonsense failed
    for experiment, base in (("sdxl", "tiny_sdxl"), ("llava_cars", "tiny_llava")):
        there = (ROOT / "results/base_models" / base).exists()
        assert there == any(f"experiments/{experiment}.py" in line for line in lines)
        assert there or f"python base_models/{base}/pretrain.py" in done.stdout


SLOW = """#!/usr/bin/env bash
case "$1" in
  scripts/rates.py) echo lora=0.003 oplora=0.001 ;;
  experiments/"$SLOW"*) sleep 300 & echo $! >> "$CALLS"; wait ;;
esac
"""


@pytest.mark.parametrize(
    ("script", "slow"),
    [("sweep_seeds.sh", "vl_bart"), ("reproduce.sh", "matrix"), ("reproduce.sh", "commonsense")],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_script_ends_all_that_it_started(tmp_path, script, slow, number):
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(SLOW)
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "CALLS": str(calls), "SLOW": slow}
    given = ["vl_bart", "lora=1"] if script == "sweep_seeds.sh" else [str(tmp_path), "out"]
    command = ["bash", str(ROOT / "scripts" / script), *given]
    command = ["env", "--default-signal=INT", *command]  # a shell in the background ignores it
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while not (calls.exists() and calls.read_text().strip()):
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(number)
    _, told = started.communicate(timeout=20)
    assert started.returncode == 128 + number
    assert told.splitlines() == ["stopped: the same command goes on from here"]
    (sleeper,) = calls.read_text().split()
    deadline = time.time() + 10
    while Path(f"/proc/{sleeper}").exists() and time.time() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{sleeper}").exists()


def test_the_progress_line_counts_runs_and_their_published_times(tmp_path):
    spec = importlib.util.spec_from_file_location("progress", ROOT / "scripts" / "progress.py")
    progress = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(progress)
    plan, takes = {"a": 2, "b": 3}, {"a": 60.0, "b": 120.0}
    for name in ("a/small/1", "b/small/1", "c/small/1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.json").write_text("{}")
    done = progress.finished(tmp_path, plan)
    assert done == {"a": 1, "b": 1}
    nothing = progress.finished(tmp_path / "new", plan)
    assert progress.line(plan, takes, nothing, nothing, 0) == "run 1 of 5, about 8 min left"
    # 180 published seconds took 360: the other 300 will take 600
    assert progress.line(plan, takes, nothing, done, 360) == "run 3 of 5, about 10 min left"
    assert progress.seconds("vl_bart") > 0 and progress.seconds("nothing") == 60
