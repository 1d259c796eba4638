"""Sweeps: a failed member ends nothing and is listed, cut ones go on, every grid composes."""

import inspect
import itertools
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest
import yaml
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).resolve().parent.parent
APP = """
import os, signal, sys
from pathlib import Path
import hydra

@hydra.main(config_path=".", config_name="app", version_base="1.3")
def main(cfg):
    done = Path(cfg.runtime.runs_dir, f"{cfg.x}.done")
    if done.exists():
        print(f"{cfg.x} is finished already")
        return
    if cfg.x in cfg.bad:
        raise ValueError(f"{cfg.x} is a bad number")
    if cfg.x in cfg.killed:
        os.kill(os.getpid(), signal.SIGKILL)
    done.touch()

os.environ["HYDRA_FULL_ERROR"] = "1"
main()
"""


@pytest.fixture
def sweep(tmp_path):
    """Run the trivial experiment over x; the process, and which members finished."""
    app = {
        "defaults": ["base", "_self_"], "x": 0, "bad": [], "killed": [],
        "hydra": {"searchpath": [f"file://{ROOT}/configs"]},
        "runtime": {"runs_dir": str(tmp_path / "runs")},
    }  # fmt: skip
    (tmp_path / "app.yaml").write_text(yaml.safe_dump(app))
    (tmp_path / "app.py").write_text(APP)

    def run(*overrides, jobs="2"):
        done = subprocess.run(
            [sys.executable, "app.py", "--multirun", *overrides],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JOBS": jobs},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done, sorted(int(p.stem) for p in (tmp_path / "runs").glob("*.done"))

    yield run
    assert not list((tmp_path / "runs").glob(".failed-*")), "notes of failures were left behind"
    assert not (tmp_path / "runs" / "multirun.yaml").exists()


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_failed_members_are_listed_and_end_nothing(sweep, launcher):
    done, finished = sweep(f"launcher={launcher}", "x=1,2,3,4", "bad=[1,3]")
    assert done.returncode == 2 and finished == [2, 4]
    tail = done.stderr.splitlines()[-3:]
    assert tail[0] == "2 failed:"
    assert " x=1 " in tail[1] and " x=3 " in tail[2]
    assert tail[1].endswith("ValueError: 1 is a bad number")
    assert "Traceback" not in done.stderr
    again, finished = sweep(f"launcher={launcher}", "x=1,2,3,4")
    assert again.returncode == 0 and finished == [1, 2, 3, 4]
    assert "2 is finished already" in again.stdout + again.stderr


def test_after_a_killed_member_the_sweep_goes_on_when_it_is_started_again(sweep):
    done, finished = sweep("launcher=joblib", "x=1,2,3", "bad=[1]", "killed=[2]", jobs="2")
    assert done.returncode != 0 and 2 not in finished
    assert sweep("launcher=joblib", "x=1,2,3")[1] == [1, 2, 3]


def test_a_cluster_is_a_choice_of_the_launcher():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose(
            "commonsense",
            overrides=["launcher=submitit_slurm", "preset=small"],
            return_hydra_config=True,
        )
    assert config.hydra.launcher.gpus_per_node == 1
    assert config.hydra.launcher._target_.endswith("SlurmLauncher")


ECHO = f"""#!/usr/bin/env bash
case $1 in scripts/*) exec {sys.executable} "$@" ;; esac
echo "$@"
"""


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    """A python that prints how experiments are started."""
    path = tmp_path_factory.mktemp("echo") / "python"
    path.write_text(ECHO)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", sorted((ROOT / "experiments").glob("*.py")), ids=str)
def test_every_experiment_can_be_sent_to_another_process(script):
    """joblib's pickle takes torch.classes along where main names both torch and classes."""
    main = runpy.run_path(str(script), run_name="experiment")["main"]
    cloudpickle.dumps(inspect.unwrap(main))


def multiruns(echo, script, *arguments):
    """The experiment and overrides of every multirun that a script starts."""
    env = {**os.environ, "PYTHON": str(echo)}
    command = ["bash", str(ROOT / "scripts" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("exp")]
    return [(Path(line[0]).stem, line[2:]) for line in lines]


def points(overrides):
    """Every grid point's overrides."""
    choices = [override.partition("=") for override in overrides]
    lists = [[f"{key}={value}" for value in values.split(",")] for key, _, values in choices]
    return list(itertools.product(*lists))


@pytest.mark.parametrize(
    ("script", "arguments", "count"),
    [
        ("sweep_learning_rates.sh", ["commonsense"], 7 * 5),
        ("sweep_learning_rates.sh", ["vl_bart"], 4 * 5 + 6),
        ("sweep_learning_rates.sh", ["sdxl"], 6 * 7),
        ("sweep_learning_rates.sh", ["llava_cars"], 2 * 6 + 5),
        ("sweep_learning_rates.sh", ["subjects"], 4 * 5),
        ("sweep_seeds.sh", ["subjects", "lora=1e-3"], 1 + 3),
        ("sweep_learning_rates.sh", ["glue"], 3 * 4 * 6),
        ("sweep_learning_rates.sh", ["glue", "preset=paper"], 6 * 4 * 5),
        ("sweep_learning_rates.sh", ["glue", "method=opvera,full", "task=rte"], 6 + 5),
        ("sweep_learning_rates.sh", ["vl_bart", "method=loraplus,opvera", "preset=paper"], 2 * 5),
        ("sweep_learning_rates.sh", ["sdxl", "preset=paper", "method=lora"], 7),
        ("sweep_learning_rates.sh", ["llava_cars", "preset=paper"], 2 * 6 + 5),
        ("sweep_seeds.sh", ["commonsense", "lora=3e-3", "oplora=3e-4"], 1 + 6),
        ("sweep_seeds.sh", ["sdxl", "lora=3e-3"], 2 + 6),
        ("sweep_seeds.sh", ["sdxl", "lora=3e-3", "preset=paper"], 2 + 6),
        ("sweep_seeds.sh", ["sdxl", "lora=3e-3", "dataset=twemoji"], 1 + 3),
        ("sweep_seeds.sh", ["sdxl", "lora=3e-3", "dataset=blobs_control"], 3),
        ("sweep_seeds.sh", ["glue", "vera=1e-1", "opvera=1e-2", "task=mrpc"], 1 + 6),
        ("sweep_mlp_width.sh", ["vl_bart", "opdora=1e-2"], 3 * 8),
        ("sweep_rank.sh", ["commonsense", "lora=3e-3", "oplora=3e-4"], 2 * 4 * 3),
        ("sweep_rank.sh", ["llava_cars", "oplora=3e-4"], 4 * 3),
        ("sweep_rank.sh", ["glue", "oplora=1e-3", "task=sst2"], 4 * 3),
        ("sweep_rank.sh", ["commonsense", "oplora=3e-4", "preset=paper"], 2 * 3),
    ],
)
def test_every_point_of_every_grid_composes(echo, script, arguments, count):
    grids = [
        (experiment, point)
        for experiment, overrides in multiruns(echo, script, *arguments)
        for point in points(overrides)
    ]
    assert len(grids) == count
    seen = set()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for experiment, point in grids:
            paper = "preset=paper" in point  # one run fills a GPU
            assert f"launcher={'basic' if paper else 'joblib'}" in point
            rest = [p for p in point if not p.startswith(("lr=", "seed=", "mlp_width=", "rank="))]
            if (experiment, *rest) not in seen:  # numbers compose like one another
                seen.add((experiment, *rest))
                compose(experiment, overrides=list(point))


@pytest.mark.parametrize(
    ("experiment", "own"),  # the paper's and the repositories' that it builds on
    [
        ("commonsense", {1e-4, 3e-4}),
        ("sdxl", {1e-4}),
        ("vl_bart", {1e-3}),
        ("llava_cars", {5e-5}),
        ("glue", {4e-4}),
    ],
)
def test_the_papers_own_rates_are_inside_the_grids(echo, experiment, own):
    script = ("sweep_learning_rates.sh", experiment, "preset=paper", "method=lora")
    ((_, overrides),) = multiruns(echo, *script)
    (rates,) = (x.removeprefix("lr=").split(",") for x in overrides if x.startswith("lr="))
    assert own < set(map(float, rates)) and not own & {float(rates[0]), float(rates[-1])}


@pytest.mark.parametrize(
    ("experiment", "ranks"),
    [("commonsense", {"16", "32"}), ("vl_bart", {"64", "128"}), ("llava_cars", {"16", "64"})],
)
def test_the_papers_ranks_and_half_of_them(echo, experiment, ranks):
    found = multiruns(echo, "sweep_rank.sh", experiment, "lora=1e-4", "preset=paper")
    assert {x.removeprefix("rank=") for _, o in found for x in o if x.startswith("rank=")} == ranks


def test_scripts_name_what_is_missing():
    for script in ("sweep_seeds.sh", "sweep_mlp_width.sh", "sweep_rank.sh"):
        command = ["bash", str(ROOT / "scripts" / script), "vl_bart"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and "=" in done.stderr
    for wrong in (["nothing"], ["vl_bart", "oplora"], ["vl_bart", "lora=3e-3"]):
        command = ["bash", str(ROOT / "scripts" / "sweep_learning_rates.sh"), *wrong]
        environment = {**os.environ, "PYTHON": sys.executable}
        assert subprocess.run(command, capture_output=True, env=environment).returncode == 2
    command = ["bash", str(ROOT / "scripts" / "sweep_seeds.sh"), "glue", "lora=1e-3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "task=sst2" in done.stderr


def test_a_failed_grid_is_told_by_the_scripts_exit_code():
    environment = {**os.environ, "PYTHON": "false"}
    command = ["bash", str(ROOT / "scripts" / "sweep_seeds.sh"), "vl_bart", "lora=1", "dora=1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout.count("== vl_bart") == 1 + 2


@pytest.mark.parametrize(
    "script", sorted(ROOT.glob("scripts/sweep_*.sh")), ids=lambda path: path.name
)
def test_help_starts_nothing(script, tmp_path):
    done = subprocess.run(
        ["bash", script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and not done.stderr
    assert f"scripts/{script.name}" in done.stdout
