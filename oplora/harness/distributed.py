"""Several processes that train one run together, as `accelerate launch` starts them.

The first one owns the run's folder; the others follow it through the training and then leave.
"""

import gc
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from omegaconf import DictConfig
from transformers import Trainer

from oplora.harness.runs import Run, RunError, open_run

PATIENCE = timedelta(hours=12)  # others wait while the first one measures in between


class Left(Exception):
    """Ends a process that is not the first one, after the training."""


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def open_shared_run(config: dict[str, Any], use_cpu: bool = False) -> Run:
    """`open_run` by the first process; for the others a run that writes nothing."""
    if process_count() == 1:
        return open_run(config)
    PartialState(cpu=use_cpu, timeout=PATIENCE)
    message: list[Any] = [None]
    run = error = None
    if is_first():
        try:
            run = open_run(config)
            message = [(run.path, run.finished)]
        except RunError as reason:
            error = reason
    broadcast_object_list(message)
    if message[0] is None:
        raise error or Left
    return run or Run(Path(message[0][0]), message[0][1], lock=None)


def share_batch(training: DictConfig) -> None:
    """Give every process its part of the configured batch: fewer accumulated ones, or smaller ones.

    training: the config of TrainingArguments for one device. ValueError if the batch does not
    divide by the number of processes.
    """
    count = process_count()
    rows, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if accumulated % count == 0:
        training.gradient_accumulation_steps = accumulated // count
    elif rows % count == 0:
        training.per_device_train_batch_size = rows // count
    else:
        raise ValueError(
            f"a batch of {accumulated} × {rows} rows (training.gradient_accumulation_steps × "
            f"per_device_train_batch_size) cannot be shared by {count} processes: start as many as "
            "divide one of them"
        )


def wait_for_all() -> None:
    if process_count() > 1:
        torch.distributed.barrier()


def part_after_training(trainer: Trainer | None = None) -> None:
    """The first process goes on alone; the others end here. trainer: what has trained, if any."""
    if process_count() > 1:
        if trainer is not None:  # DDP goes before its process group: the last owner's end can hang
            trainer.accelerator.free_memory()
            trainer.model_wrapped = trainer.model
            gc.collect()
        torch.distributed.destroy_process_group()  # else torchmetrics would wait for the others
        if not is_first():
            raise Left
