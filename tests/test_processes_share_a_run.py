"""Two processes train one run as `accelerate launch` starts them: commonsense and SDXL."""

import json
import os
import socket
from contextlib import ExitStack, nullcontext
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from processes import only_run, run_here
from safetensors.torch import load_file
from test_commonsense_experiment import command as commonsense
from test_commonsense_experiment import setting as text_setting  # noqa: F401 (a fixture)
from test_sdxl_experiment import command as sdxl
from test_sdxl_experiment import environment
from test_sdxl_experiment import setting as image_setting  # noqa: F401 (a fixture)
from transformers import TrainingArguments

from oplora.harness.distributed import share_batch
from oplora.trainer import OPTrainer

pytestmark = pytest.mark.skipif(
    "OPLORA_TWO_PROCESSES" not in os.environ,
    reason="set OPLORA_TWO_PROCESSES=1: where one was cut, the other may wait for it for ever",
)
BATCH = "training.per_device_train_batch_size=4"
SHORT = ["training.num_train_epochs=1", "training.logging_steps=1"]


class Cut(BaseException):
    """Where a run is killed: after its first checkpoint."""


def cut(trainer, *arguments, save=OPTrainer._save_checkpoint, **options):
    save(trainer, *arguments, **options)
    raise Cut


def worker(rank, ports, folder, commands, env):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    codes = {}
    for port, (name, (command, is_cut)) in zip(ports, commands.items()):
        os.environ["MASTER_PORT"] = str(port)  # of its own: the last one may not be left yet
        try:
            with mock.patch.object(OPTrainer, "_save_checkpoint", cut) if is_cut else nullcontext():
                done = run_here(command, env)
            codes[name] = [done.returncode, done.stdout, done.stderr[-2000:]]
        except Cut:
            codes[name] = ["cut", torch.initial_seed()]
            torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
    (folder / f"{rank}.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def runs(text_setting, image_setting, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("shared")

    def texts(name):
        return commonsense(text_setting, folder / name, BATCH, *SHORT)

    def images(name):
        return sdxl(image_setting, folder / name, BATCH, *SHORT, "training.save_steps=1", "lr=0.1")

    commands = {
        "text, cut": (texts("text"), True),
        "text": (texts("text"), False),
        "text, again": (texts("text"), False),
        "images, cut": (images("images"), True),
        "images": (images("images"), False),
        "calm images": (images("calm"), False),
    }
    with ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in commands]
        for each in free:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in free]
    arguments = (ports, folder, commands, environment(image_setting))
    torch.multiprocessing.spawn(worker, args=arguments, nprocs=2)
    codes = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    single = run_here(texts("single"))
    assert single.returncode == 0, single.stderr[-3000:]
    return folder, codes


def test_the_first_process_owns_the_run_and_the_others_leave_after_training(runs):
    folder, (first, second) = runs
    for name, (code, *_) in first.items():
        assert code == second[name][0] == ("cut" if "cut" in name else 0), (name, first, second)
    assert "validation NLL" in first["text"][1] and "finished already" in first["text, again"][1]
    assert not any(said for _, said, *_ in second.values() if isinstance(said, str))
    assert first["text, cut"][1] != second["text, cut"][1]  # noise and dropout of their own
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
