"""A checkpoint's large part is written while training goes on, and the last whole one stays."""

import threading

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from oplora.harness import checkpoints
from oplora.harness.checkpoints import CheckpointingTrainer, whole_checkpoint, write_state
from oplora.trainer import OPTrainer


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x):
        return {"loss": self.layer(x).square().mean()}


def trainer(kind, folder, *callbacks, **options):
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=2, **options,
    )  # fmt: skip
    rows = [{"x": torch.full((3,), float(n))} for n in range(8)]
    return kind(
        Model(), arguments, train_dataset=rows, callbacks=list(callbacks),
        optimizer_factory=lambda model: torch.optim.AdamW(model.parameters(), 0.1),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(CheckpointingTrainer, "in_background", True)


class Watch(TrainerCallback):
    """What is in the folder when a step begins while the state of step 2 is being written."""

    def __init__(self, folder, may_write):
        self.folder, self.may_write, self.seen = folder, may_write, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.seen = {path.name: (path / "optimizer.pt").exists() for path in self.there()}
            self.may_write.set()

    def there(self):
        return self.folder.glob("checkpoint-*")


def test_training_goes_on_and_the_older_checkpoint_stays_meanwhile(tmp_path, monkeypatch):
    may_write = threading.Event()

    def slow(state, folder, kept):
        assert folder.name != "checkpoint-2" or may_write.wait(20)
        write_state(state, folder, kept)

    monkeypatch.setattr(checkpoints, "write_state", slow)
    watch = Watch(tmp_path / "mine", may_write)
    mine = trainer(CheckpointingTrainer, tmp_path / "mine", watch, save_total_limit=1)
    mine.train()
    mine.join()
    assert watch.seen == {"checkpoint-1": True, "checkpoint-2": False}
    assert [path.name for path in watch.there()] == ["checkpoint-4"]
    trainer(OPTrainer, tmp_path / "plain").train()
    for name in ("optimizer.pt", "scheduler.pt"):
        plain, own = (
            torch.load(tmp_path / kind / "checkpoint-4" / name, weights_only=True)
            for kind in ("plain", "mine")
        )
        torch.testing.assert_close(own, plain, rtol=0, atol=0)


def test_what_could_not_be_written_ends_the_training_and_is_no_checkpoint(tmp_path, monkeypatch):
    def full(state, folder, kept):
        if folder.name == "checkpoint-2":
            raise OSError(28, "No space left on device")
        write_state(state, folder, kept)

    monkeypatch.setattr(checkpoints, "write_state", full)
    with pytest.raises(OSError, match="No space left"):
        trainer(CheckpointingTrainer, tmp_path, save_total_limit=1).train()
    assert whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_copies_keep_kinds_and_share_nothing():
    state = {"state": {0: {"step": torch.ones(()), "rows": [torch.ones(2)]}}, "betas": (0.9, 0.99)}
    copy = checkpoints.copied(state)
    state["state"][0]["rows"][0].zero_()
    assert copy["betas"] == (0.9, 0.99) and copy["state"][0]["rows"][0].tolist() == [1, 1]


def test_on_a_cpu_it_is_the_plain_trainer(tmp_path, monkeypatch):
    monkeypatch.undo()
    mine = trainer(CheckpointingTrainer, tmp_path, save_total_limit=1)
    monkeypatch.setattr(checkpoints, "copied", None)
    mine.train()
    mine.join()
    assert whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
