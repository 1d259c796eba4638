"""Two processes train one run as `accelerate launch` starts them: commonsense and SDXL."""

import json
import multiprocessing
import os
import socket
import time
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from omegaconf import OmegaConf
from processes import only_run, run_here
from safetensors.torch import load_file
from test_commonsense_experiment import command as commonsense
from test_commonsense_experiment import setting as text_setting  # noqa: F401 (a fixture)
from test_sdxl_experiment import command as sdxl
from test_sdxl_experiment import environment
from test_sdxl_experiment import setting as image_setting  # noqa: F401 (a fixture)
from transformers import TrainingArguments

from oplora.harness.checkpoints import CheckpointingTrainer
from oplora.harness.distributed import share_batch

BATCH = "training.per_device_train_batch_size=4"
SHORT = ["training.num_train_epochs=1", "training.logging_steps=1"]


LIMIT = 120  # seconds that a command may take
# what the commands import is there already in every process that it starts
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["oplora.harness.finetuning", "oplora.studies.sdxl.generation"])


def killed(trainer, *arguments, save=CheckpointingTrainer._save_checkpoint, **options):
    """Where a run is cut: after its first checkpoint."""
    save(trainer, *arguments, **options)
    trainer.join()
    os._exit(9)


def worker(rank, port, command, is_cut, env, told):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    cut = mock.patch.object(CheckpointingTrainer, "_save_checkpoint", killed)
    with cut if is_cut else nullcontext():
        done = run_here(command, env)
    told.write_text(json.dumps([done.returncode, done.stdout, done.stderr[-2000:]]))


def launch(command, folder, env, is_cut=False):
    """What both processes of a command say: exit code, stdout, stderr; None: it was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = [folder / f"{port}-{rank}.json" for rank in range(2)]
    processes = [
        START.Process(target=worker, args=(rank, port, command, is_cut, env, file))
        for rank, file in enumerate(told)
    ]
    for each in processes:
        each.start()
    deadline = time.monotonic() + LIMIT
    for each in processes:
        each.join(max(0, deadline - time.monotonic()))
    late = [each for each in processes if each.exitcode is None]
    for each in late:
        each.kill()
    assert not late, f"{len(late)} of 2 processes went on for {LIMIT} s: {command[1]}"
    return [json.loads(file.read_text()) if file.exists() else None for file in told]


@pytest.fixture(scope="module")
def runs(text_setting, image_setting, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("shared")

    def texts(name):
        return commonsense(text_setting, folder / name, BATCH, *SHORT)

    def images(name):
        return sdxl(image_setting, folder / name, BATCH, *SHORT, "training.save_steps=1", "lr=0.1")

    env = environment(image_setting)
    said = {
        "text, cut": launch(texts("text"), folder, env, is_cut=True),
        "text": launch(texts("text"), folder, env),
        "text, again": launch(texts("text"), folder, env),
        "images, cut": launch(images("images"), folder, env, is_cut=True),
        "images": launch(images("images"), folder, env),
        "calm images": launch(images("calm"), folder, env),
    }
    single = run_here(texts("single"))
    assert single.returncode == 0, single.stderr[-3000:]
    return folder, said


def test_the_first_process_owns_the_run_and_the_others_leave_after_training(runs):
    folder, said = runs
    for name, both in said.items():
        if "cut" in name:
            assert both == [None, None], both
        else:
            assert [code for code, *_ in both] == [0, 0], (name, both)
            assert not both[1][1]  # the second process says nothing
    assert "validation NLL" in said["text"][0][1]
    assert "finished already" in said["text, again"][0][1]
    assert len(list((folder / "text").rglob("config.yaml"))) == 1


def test_two_processes_that_were_cut_equal_one(runs):
    (_, shared), (_, single) = (only_run(runs[0] / name) for name in ("text", "single"))
    assert shared["resumed"] == "checkpoint-3" and shared["steps"] == single["steps"] == 8
    for name in ("train_loss", "validation_loss"):
        steps, losses = zip(*shared[name])
        expected_steps, expected = zip(*single[name])
        assert steps == expected_steps and losses == pytest.approx(expected, abs=1e-3)
    assert shared["validation_nll"] == pytest.approx(single["validation_nll"], abs=1e-4)


def test_two_processes_resume_exactly(runs):
    folder, _ = runs
    (path, resumed), (calm_path, calm) = (only_run(folder / name) for name in ("images", "calm"))
    assert resumed["resumed"] == "checkpoint-1" and resumed["images"] == calm["images"]
    weights = "adapter/pytorch_lora_weights.safetensors"
    expected = load_file(calm_path / weights)
    for name, tensor in load_file(path / weights).items():
        assert torch.equal(tensor, expected[name]), name
    assert any(tensor.abs().max() > 0 for name, tensor in expected.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("processes", "accumulated", "rows", "shared"),
    [(1, 1, 16, (1, 16)), (2, 4, 16, (2, 16)), (4, 2, 8, (2, 2)), (2, 1, 1, None), (3, 2, 8, None)],
)
def test_the_batch_stays_the_configured_one(monkeypatch, processes, accumulated, rows, shared):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    training = OmegaConf.create(
        {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": rows}
    )
    if shared is None:
        with pytest.raises(ValueError, match="cannot be shared by"):
            share_batch(training)
        return
    share_batch(training)
    assert tuple(training.values()) == shared


class TwoGpus(TrainingArguments):
    """As on a machine with two GPUs, where Trainer takes both."""

    def __post_init__(self):
        super().__post_init__()
        assert self.device  # which sets the number
        self._n_gpu = 2


def test_one_process_takes_one_gpu(text_setting, tmp_path):  # noqa: F811
    two = f"training._target_={__name__}.TwoGpus"
    done = run_here(commonsense(text_setting, tmp_path, *SHORT, two, "score_test=false"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert only_run(tmp_path)[1]["steps"] == 8  # with batches of twice the size 4
