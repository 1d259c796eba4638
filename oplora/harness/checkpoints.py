"""Checkpoints of a run: whole ones, best weights, and a large state that is written meanwhile."""

import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from oplora.trainer import OPTrainer

CHECKPOINTS = "checkpoints"  # the folder of a run that has them
STATE, SCHEDULE, PROGRESS = "optimizer.pt", "scheduler.pt", "trainer_state.json"  # Trainer's


class CheckpointingTrainer(OPTrainer):
    """OPTrainer that goes on while the optimizer's state is written: it is most of a checkpoint.

    On an accelerator; on a CPU the state would only be held twice. It is copied to the CPU's
    memory, from where a thread writes it. Older checkpoints, of which save_total_limit are kept,
    stay until the new one is whole. `join` waits for it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._writer, self._writing = ThreadPoolExecutor(1), None
        self._to_write: tuple[dict[str, Any], Path] | None = None
        if self.in_background:  # what is kept then is `write_state`'s to say
            self._kept, self.args.save_total_limit = self.args.save_total_limit, None

    @property
    def in_background(self) -> bool:
        return self.args.device.type != "cpu" and not self.is_fsdp_enabled

    def join(self) -> None:
        """Wait until the last checkpoint is whole; raises what failed meanwhile (a full disk)."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _save_checkpoint(self, model, trial):
        self.join()
        super()._save_checkpoint(model, trial)
        if self._to_write is not None:
            state, folder = self._to_write
            self._to_write = None
            self._writing = self._writer.submit(write_state, state, folder, self._kept)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.in_background or not self.args.should_save:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULE))
        self._to_write = copied(self.optimizer.state_dict()), Path(output_dir)


def copied(state: Any) -> Any:
    """The same dicts and lists with tensors of their own, on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return type(state)(map(copied, state)) if isinstance(state, list | tuple) else state


def write_state(state: dict[str, Any], folder: Path, kept: int | None) -> None:
    """Write an optimizer's state into a checkpoint, then delete all but the `kept` last ones."""
    partial = folder / f"{STATE}.partial"
    torch.save(state, partial)
    os.replace(partial, folder / STATE)
    if kept:
        there = folder.parent.glob("checkpoint-*")
        for old in sorted(there, key=lambda path: int(path.name.split("-")[1]))[:-kept]:
            shutil.rmtree(old)


def whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end; a torn one is deleted."""
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))):
        if all(Path(last, name).exists() for name in (STATE, PROGRESS)):
            return last
        shutil.rmtree(last)
    return None


class BestWeights(TrainerCallback):
    """Keeps what is trained as it was at the lowest validation loss so far, in one small file.

    Trainer's load_best_model_at_end would write the optimizer's state as often as it evaluates.
    """

    def __init__(self, model: nn.Module, path: Path):
        self.model, self.path, self.loss, self.step = model, path, math.inf, 0
        if path.exists():  # a run that was cut
            with safe_open(path, "pt") as file:
                self.loss, self.step = (
                    kind(file.metadata()[k]) for k, kind in (("eval_loss", float), ("step", int))
                )

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if not state.is_world_process_zero or not metrics["eval_loss"] < self.loss:
            return
        self.loss, self.step = metrics["eval_loss"], state.global_step
        trained = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        metadata = {"eval_loss": repr(self.loss), "step": str(self.step)}
        self.path.parent.mkdir(exist_ok=True)
        partial = self.path.with_suffix(".partial")
        save_file(trained, partial, metadata)
        os.replace(partial, self.path)

    def load(self) -> None:
        if self.path.exists():
            self.model.load_state_dict(load_file(self.path), strict=False)
