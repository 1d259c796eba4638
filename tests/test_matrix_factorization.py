"""The experiment as users start it: end to end, killed and resumed, and with wrong input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from processes import kill_once, run_here

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "problem.rows=12", "problem.columns=10", "problem.rank=3", "problem.steps=60",
    "problem.warmup_steps=5", "seeds=[0,1]", "mlp.width=8", "mlp.z_dim=6",
]  # fmt: skip


def start(*overrides):
    return run_here([sys.executable, "experiments/matrix_factorization.py", *overrides])


def only_run(folder):
    (metrics,) = folder.rglob("metrics.json")
    with numpy.load(metrics.parent / "curves.npz") as archive:
        return json.loads(metrics.read_text()), dict(archive)


def same_science(a, b):
    drop = ("train_seconds", "peak_memory_bytes")
    (metrics_a, curves_a), (metrics_b, curves_b) = a, b
    assert {k: v for k, v in metrics_a.items() if k not in drop} == {
        k: v for k, v in metrics_b.items() if k not in drop
    }
    assert curves_a.keys() == curves_b.keys()
    for name in curves_a:
        numpy.testing.assert_array_equal(curves_a[name], curves_b[name])


@pytest.mark.parametrize("method", ["opmf", "mf_matched_mlp_start"])
def test_twice_the_same_config_gives_identical_metrics(tmp_path, method):
    for name in ("a", "b"):
        done = start(
            f"method={method}", "optimizer=adam", *SMALL, f"runtime.runs_dir={tmp_path / name}"
        )
        assert done.returncode == 0, done.stderr
    metrics, curves = only_run(tmp_path / "a")
    same_science((metrics, curves), only_run(tmp_path / "b"))
    assert metrics["trained_parameters"] > 0
    assert curves["mse"].shape == (len(metrics["final_mse"]), 2, 60 // 5 + 1)
    again = start(
        f"method={method}", "optimizer=adam", *SMALL, f"runtime.runs_dir={tmp_path / 'a'}"
    )
    assert "finished already" in again.stdout


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_the_grid_follows_the_loss(tmp_path, optimizer):
    errors = []
    for loss in ("mse", "frobenius"):
        options = [f"problem.loss={loss}", f"runtime.runs_dir={tmp_path / loss}"]
        done = start(f"optimizer={optimizer}", *SMALL, *options)
        assert done.returncode == 0, done.stderr
        errors.append([x or 0 for x in numpy.ravel(only_run(tmp_path / loss)[0]["final_mse"])])
    numpy.testing.assert_allclose(errors[1], errors[0], rtol=0.05, atol=1e-4)


def test_killed_and_started_again_equals_an_undisturbed_run(tmp_path):
    long = [*SMALL, "problem.steps=1500"]
    command = [sys.executable, "experiments/matrix_factorization.py", *long]
    kill_once(
        [*command, f"runtime.runs_dir={tmp_path / 'killed'}"],
        tmp_path / "killed",
        "config.yaml",
        {**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert not list((tmp_path / "killed").rglob("metrics.json"))
    for name in ("killed", "calm"):
        done = start(*long, f"runtime.runs_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
    same_science(only_run(tmp_path / "killed"), only_run(tmp_path / "calm"))


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("method=lorra", "lorra"),
        ("method=lora", "method=lora is an adapter"),
        ("optimizer=sgdd", "sgdd"),
        ("stepz=3", "there is no option 'stepz'"),
        ("optimizer=prodigy", "this optimizer is not for this experiment"),
        ("runtime.threads=x", "runtime.threads=x must be a whole number"),
        ("problem.rank=10", "rank=10"),
        ("rates=[0.1,-1]", "[-1]"),
        ("rates=[fast]", "['fast']"),
        ("mlp.width=0", "width=0"),
        ("seeds=3", "seeds=3"),
        ("problem.steps=many", "steps='many'"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, wrong, words):
    done = start(*SMALL, f"runtime.runs_dir={tmp_path / 'runs'}", wrong)
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_unwritable_results_folder(tmp_path):
    (tmp_path / "file").write_text("")
    done = start(*SMALL, f"runtime.runs_dir={tmp_path / 'file'}")
    assert done.returncode == 2 and "choose another runtime.runs_dir" in done.stderr


def test_help_names_the_choices():
    done = start("--help")
    assert done.returncode == 0
    for word in ("opmf", "momentum", "problem:", "rates:"):
        assert word in done.stdout


def test_a_failed_member_does_not_end_a_sweep(tmp_path):
    command = [sys.executable, "experiments/matrix_factorization.py", "--multirun", *SMALL]
    command += ["problem.rank=99,2,3", f"runtime.runs_dir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "rank=99" in done.stderr
    assert len(list(tmp_path.rglob("metrics.json"))) == 2
