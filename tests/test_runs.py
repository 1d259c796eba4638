"""Run folders: finished, cut, foreign, damaged and contested ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from oplora.harness import runs

ROOT = Path(__file__).resolve().parent.parent


def config(tmp_path, **changes):
    return {
        "experiment": "toy",
        "preset": "small",
        "run_name": "lora",
        "lr": 0.1,
        "runtime": {"runs_dir": str(tmp_path), "threads": 1},
        **changes,
    }


def test_a_finished_run_is_skipped_and_a_cut_one_goes_on(tmp_path):
    with runs.open_run(config(tmp_path)) as run:
        (run.path / "checkpoint").write_text("half way")
    with runs.open_run(config(tmp_path)) as run:
        assert not run.finished and (run.path / "checkpoint").exists()
        run.finish({"accuracy": 0.5})
    with runs.open_run(config(tmp_path)) as run:
        assert run.finished
    (record,), problems = runs.load_runs(tmp_path)
    assert record.metrics == {"accuracy": 0.5} and record.config["lr"] == 0.1
    assert "runtime" not in record.config and not [p for p in problems if "not finished" in p]


def test_how_a_run_is_made_does_not_change_its_folder_but_what_does(tmp_path):
    same = config(tmp_path, runtime={"runs_dir": str(tmp_path), "threads": 9})
    assert runs.run_folder(config(tmp_path)) == runs.run_folder(same)
    assert runs.run_folder(config(tmp_path)) != runs.run_folder(config(tmp_path, lr=0.2))


def test_a_run_from_before_the_code_moved_is_found_under_the_hash_of_its_time(tmp_path):
    data = {"_target_": "oplora.data.items.load", "path": "lambda/captions", "split": None}
    method = {"name": "lora", "title": "LoRA", "order": 1}
    old = config(tmp_path, data=data, method={"name": "lora"})
    with runs.open_run(old) as run:
        (run.path / "checkpoint").write_text("half way")
    run.path.rename(run.path.with_name("lora-0123abcd"))
    moved = {"_target_": "oplora.studies.toy.items.load", "path": "lambda/captions"}
    new = config(tmp_path, data=moved, method=method, title={"model": "toy"}, direct_lr=None)
    with runs.open_run(new) as run:
        assert run.path.name == "lora-0123abcd" and (run.path / "checkpoint").exists()
        run.finish({"x": 1})
    with runs.open_run(new) as run:
        assert run.finished
    assert len(runs.load_runs(tmp_path)[0]) == 1
    other = config(tmp_path, data={**moved, "path": "another/set"}, method=method)
    assert runs.run_folder(other).name != "lora-0123abcd"


def test_another_config_in_the_same_folder_is_refused(tmp_path):
    folder = tmp_path / "here"
    with runs.open_run(config(tmp_path), folder) as run:
        run.finish({"x": 1})
    with pytest.raises(runs.RunError, match=r"lr is 0\.1 there and 0\.2 here"):
        runs.open_run(config(tmp_path, lr=0.2), folder)
    assert json.loads((folder / "metrics.json").read_text()) == {"x": 1}


@pytest.mark.parametrize("name", ["metrics.json", "config.yaml"])
def test_a_damaged_run_is_named_and_set_aside(tmp_path, name, capsys):
    with runs.open_run(config(tmp_path)) as run:
        run.finish({"x": 1})
    (run.path / name).write_text('{"x": [')
    records, problems = runs.load_runs(tmp_path)
    assert not records and "unreadable" in problems[0] and run.path.name in problems[0]
    with runs.open_run(config(tmp_path)) as again:
        assert not again.finished
        again.finish({"x": 2})
    assert name in capsys.readouterr().err
    (record,), _ = runs.load_runs(tmp_path)
    assert record.metrics == {"x": 2}
    assert len(list(run.path.parent.glob("*.corrupt1"))) == 1


def test_a_second_process_is_refused_and_a_killed_one_frees_the_run(tmp_path):
    script = (
        "import sys, time, json; from oplora.harness import runs\n"
        "run = runs.open_run(json.loads(sys.argv[1])); print('open', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, json.dumps(config(tmp_path))]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(runs.RunError, match="in use by another process"):
            runs.open_run(config(tmp_path))
    finally:
        holder.kill()
        holder.wait()
    with runs.open_run(config(tmp_path)) as run:
        assert not run.finished


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot count anew")
def test_the_memory_of_an_earlier_run_does_not_count():
    """Whatever it left: garbage that only the collector finds, in pieces that glibc keeps."""
    script = (
        "from oplora.harness import runs\n"
        "model = [bytearray(50_000) for _ in range(6_000)]\n"
        "keep = model[::2000]\n"
        "model.append(model)\n"
        "del model\n"
        "before = runs.peak_memory_bytes()\n"
        "runs.reset_peak_memory()\n"
        "print(before - runs.peak_memory_bytes())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert int(done.stdout) > 250_000_000


def test_metrics_hold_no_nan(tmp_path):
    with runs.open_run(config(tmp_path)) as run, pytest.raises(ValueError):
        run.finish({"loss": float("nan")})
    assert not (run.path / "metrics.json").exists()


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), runs.open_run(config(tmp_path / "runs")):
        raise ValueError("wrong input")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ValueError), runs.open_run(config(tmp_path / "runs")) as run:
        (run.path / "checkpoint").write_text("work")
        raise ValueError("later")
    assert (run.path / "checkpoint").exists()


def test_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(runs.RunError, match="choose another"):
        runs.open_run(config(tmp_path / "file"))


def test_duplicates_count_once_and_dirty_runs_are_named(tmp_path):
    for name in ("a", "b"):
        with runs.open_run(config(tmp_path), tmp_path / name) as run:
            run.finish({"x": name})
            facts = json.loads((run.path / "environment.json").read_text())
            (run.path / "environment.json").write_text(json.dumps({**facts, "dirty": True}))
    (tmp_path / "c").mkdir()
    with runs.open_run(config(tmp_path, lr=3), tmp_path / "c"):
        pass
    (record,), problems = runs.load_runs(tmp_path)
    assert record.metrics == {"x": "a"}
    assert [p.split(":")[0] for p in problems] == ["a", "b", "c"]
    assert "uncommitted" in problems[0] and "same config as a" in problems[1]
    assert "not finished" in problems[2]


def test_neither_runs_nor_report_import_torch():
    code = "import sys, oplora.harness.runs, oplora.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("trace", [None, "checkpoints", "checkpoints/a.pt"])
def test_a_run_that_fails_before_it_wrote_anything_leaves_no_folder(tmp_path, trace):
    with pytest.raises(ValueError), runs.open_run(config(tmp_path)) as run:
        if trace == "checkpoints":
            (run.path / trace).mkdir()
        elif trace:
            (run.path / trace).parent.mkdir()
            (run.path / trace).write_text("state")
        raise ValueError("wrong")
    assert run.path.exists() == (trace == "checkpoints/a.pt")
