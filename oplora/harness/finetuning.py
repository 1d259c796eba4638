"""What the fine-tuning experiments share: their frame, and training with resume."""

import contextlib
import functools
import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed as set_seed_of_process
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from oplora.diagnostics import Diagnostics
from oplora.harness.checkpoints import (
    CHECKPOINTS,
    BestWeights,
    CheckpointingTrainer,
    whole_checkpoint,
)
from oplora.harness.distributed import (
    Left,
    is_first,
    open_shared_run,
    part_after_training,
    process_count,
    share_batch,
    wait_for_all,
)
from oplora.harness.dry_run import describe, expected
from oplora.harness.entry import experiment
from oplora.harness.hub import check_hub
from oplora.harness.methods import OptimizerFactory
from oplora.harness.runs import DIAGNOSTICS, Run, peak_memory_bytes
from oplora.peft import parameter_report


def fine_tuning(
    name: str, auto_class: type, prepare: Callable[[DictConfig], None] | None = None
) -> Callable:
    """Decorate a main(cfg, run) whose config is configs/<name>.yaml: it is called for open runs.

    Finished runs are skipped, `dry_run=true` prints `describe(cfg, auto_class)` instead.
    prepare: completes the config, before either.
    """

    def decorate(main: Callable[[DictConfig, Run], None]) -> Callable[[], None]:
        @experiment(name)
        @functools.wraps(main)
        def job(cfg: DictConfig) -> None:
            complete(cfg, prepare)
            if cfg.dry_run:
                if is_first():
                    print(describe(cfg, auto_class))
                return
            torch.set_num_threads(cfg.runtime.threads)
            config = OmegaConf.to_container(cfg, resolve=True)
            check_hub(config)
            if process_count() > 1:
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    raise ValueError("accelerate launch takes one run at a time, not --multirun")
                share_batch(cfg.training)
            use_cpu = cfg.training.get("use_cpu", False)
            with contextlib.suppress(Left), open_shared_run(config, use_cpu) as run:
                if run.finished:
                    if is_first():
                        print(f"{run.path} is finished already")
                    return
                if not cfg.get("fine_tune", True):
                    part_after_training()
                set_seed(cfg.seed)
                main(cfg, run)

        def numbers(cfg: DictConfig) -> dict[str, Any]:
            complete(cfg, prepare)
            return expected(cfg, auto_class)

        job.expected = numbers  # of a composed config, for scripts/expected_costs.py
        return job

    return decorate


def complete(cfg: DictConfig, prepare: Callable[[DictConfig], None] | None) -> None:
    """Values that follow from others."""
    if prepare is not None:
        prepare(cfg)
    rate = cfg.optimizer.get("lr", cfg.lr)
    if rate != cfg.lr:  # an optimizer that finds its own: names of runs show what it is given
        cfg.lr = rate


def train(
    model: nn.Module,
    create_optimizer: OptimizerFactory,
    training: DictConfig,
    run: Run,
    *,
    keep_best: bool = False,
    diagnostics: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **trainer_options: Any,
) -> dict[str, Any]:
    """Train with HF Trainer, from the last whole checkpoint of this run if there is one.

    training: the config of TrainingArguments, without output_dir. keep_best: end with the weights
    of the lowest validation loss. diagnostics: write `oplora.diagnostics` into the run's folder.
    Returns the run's figures; an adapter is saved in the run's folder as stock PEFT would.
    Checkpoints stay until `finish`.
    A run that diverges is a result: it is finished as such, then FloatingPointError is raised.
    Of several processes (`oplora.harness.distributed`) only the first one returns.
    """
    folder = run.path / CHECKPOINTS
    arguments = training_arguments(training, folder)
    if process_count() > 1:
        arguments.data_seed = arguments.seed  # the same order everywhere, but
    if keep_best and any(hasattr(callback, "links") for callback in create_optimizer.callbacks):
        raise ValueError("a chain's best weights would lack its later links: set keep_best=false")
    best = [BestWeights(model, folder / "best.safetensors")] if keep_best else []
    looking_on = [Diagnostics(run.path / DIAGNOSTICS)] if diagnostics else []
    trainer = CheckpointingTrainer(
        model,
        arguments,
        optimizer_factory=create_optimizer,
        callbacks=[*callbacks, *create_optimizer.callbacks, *best, *looking_on],
        **trainer_options,
    )
    if process_count() > 1:
        set_seed_of_process(arguments.seed, device_specific=True)  # other noise and dropout
    start = time.perf_counter()
    if is_first():
        whole_checkpoint(folder)
    wait_for_all()
    checkpoint = whole_checkpoint(folder)
    try:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            trainer.join()
        _check_finite(trainer.state.log_history)
    except FloatingPointError as error:
        finish(run, {"diverged": str(error), "steps": trainer.state.global_step})
        raise
    seconds = time.perf_counter() - start
    part_after_training(trainer)
    trainer.optimizer.eval()  # schedule-free optimizers train other weights than they mean
    optimizer = trainer.optimizer.optimizer  # inside accelerate's
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # no autocast from here on
    for each in best:
        each.load()
    if isinstance(model, PeftModel):
        create_optimizer.save(model, run.path / "adapter")
    history, steps = trainer.state.log_history, trainer.state.global_step
    directly = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter = parameter_report(model)["adapter_parameters"]
    mlp = getattr(optimizer, "mlp_parameters", 0)
    trainer.accelerator.free_memory()  # what is measured next needs the optimizer's place
    del trainer, optimizer
    gc.collect()
    return {
        "train_seconds": round(seconds, 1),
        "steps": steps,
        "train_loss": [[e["step"], e["loss"]] for e in history if "loss" in e],
        "validation_loss": [[e["step"], e["eval_loss"]] for e in history if "eval_loss" in e],
        "adapter_parameters": adapter,
        "mlp_parameters": mlp,
        "trained_parameters": mlp + directly - adapter if mlp else directly,
        "peak_memory_bytes": peak_memory_bytes(),
        **({"best_step": best[0].step} if best else {}),
        **({"resumed": Path(checkpoint).name} if checkpoint else {}),  # seconds: since then
    }


def validate(
    model: nn.Module, training: DictConfig, run: Run, **trainer_options: Any
) -> dict[str, Any]:
    """The validation loss of a model as it is: what the curve of its training would begin with.

    Nothing where there is no validation data (`eval_dataset`).
    """
    if trainer_options.get("eval_dataset") is None:
        return {}
    trainer = Trainer(
        model, training_arguments(training, run.path / CHECKPOINTS), **trainer_options
    )
    loss = trainer.evaluate()["eval_loss"]
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # no autocast from here on
    return {"validation_loss": [[0, loss]]}


def training_arguments(training: DictConfig, folder: Path) -> TrainingArguments:
    """TrainingArguments of a config, with checkpoints in `folder`."""
    arguments = instantiate(training, output_dir=str(folder), _convert_="all")
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer takes all GPUs, with larger batches
    return arguments


def first_batches(rows: Sequence, collator: Callable, training: DictConfig) -> Iterator[dict]:
    """Batches of the training's size for methods that initialise from data, in a fixed order.

    They are read only where a method asks for them; the seed of the training draws the order.
    """
    stream = torch.Generator().manual_seed(training.seed)
    order = torch.randperm(len(rows), generator=stream).tolist()
    size = training.per_device_train_batch_size
    for start in range(0, len(order), size):
        yield collator([rows[n] for n in order[start : start + size]])


def device() -> str:
    """Where models run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_finite(history: list[dict]) -> None:
    for entry in history:
        for name in ("loss", "eval_loss"):
            if not math.isfinite(entry.get(name, 0)):
                raise FloatingPointError(
                    f"{name} is {entry[name]} at step {entry['step']}: lower the learning rate"
                )


def finish(run: Run, metrics: dict[str, Any]) -> None:
    """Write the metrics, then remove the checkpoints: until then the run can be resumed."""
    run.finish(metrics)
    shutil.rmtree(run.path / CHECKPOINTS, ignore_errors=True)
