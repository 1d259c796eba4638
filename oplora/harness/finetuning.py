"""What the fine-tuning experiments share: their frame, training with resume, and the dry run."""

import contextlib
import functools
import gc
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed as set_seed_of_process
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from oplora.baselines.products import save_plain_lora
from oplora.harness.cost import step_cost
from oplora.harness.distributed import (
    Left,
    is_first,
    open_shared_run,
    part_after_training,
    process_count,
    share_batch,
    wait_for_all,
)
from oplora.harness.entry import experiment
from oplora.harness.hub import check_hub
from oplora.harness.methods import OptimizerFactory, add_adapter
from oplora.harness.runs import Run, peak_memory_bytes
from oplora.optimizer import check_optimizer
from oplora.peft import parameter_report
from oplora.trainer import OPTrainer

CHECKPOINTS = "checkpoints"  # the folder of a run that has them
CARDS = (24, 48, 80)  # GB of GPUs that the dry run names
BYTES_PER_SECOND = 3e12  # of an H100's memory: what a step of the optimizer reads and writes


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


def planned_steps(cfg: DictConfig) -> tuple[int, int]:
    """Optimizer steps of the run, and rows of each, by the config's count of rows."""
    training = cfg.training
    rows = cfg.get("rows_per_batch", training.per_device_train_batch_size)
    batch, steps = rows * training.gradient_accumulation_steps, training.get("max_steps", -1)
    return (steps if steps >= 0 else -(-cfg.train_rows // batch) * training.num_train_epochs), batch


def train(
    model: nn.Module,
    create_optimizer: OptimizerFactory,
    training: DictConfig,
    run: Run,
    *,
    keep_best: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **trainer_options: Any,
) -> dict[str, Any]:
    """Train with HF Trainer, from the last whole checkpoint of this run if there is one.

    training: the config of TrainingArguments, without output_dir. keep_best: end with the weights
    of the lowest validation loss. Returns the run's figures; an
    adapter is saved in the run's folder as stock PEFT would. Checkpoints stay until `finish`.
    A run that diverges is a result: it is finished as such, then FloatingPointError is raised.
    Of several processes (`oplora.harness.distributed`) only the first one returns.
    """
    folder = run.path / CHECKPOINTS
    arguments: TrainingArguments = instantiate(training, output_dir=str(folder), _convert_="all")
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer takes all GPUs, with larger batches
    if process_count() > 1:
        arguments.data_seed = arguments.seed  # the same order everywhere, but
    if keep_best and any(hasattr(callback, "links") for callback in create_optimizer.callbacks):
        raise ValueError("a chain's best weights would lack its later links: set keep_best=false")
    best = [BestWeights(model, folder / "best.safetensors")] if keep_best else []
    trainer = OPTrainer(
        model,
        arguments,
        optimizer_factory=create_optimizer,
        callbacks=[*callbacks, *create_optimizer.callbacks, *best],
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
        trainer.train(resume_from_checkpoint=checkpoint)
        _check_finite(trainer.state.log_history)
    except FloatingPointError as error:
        finish(run, {"diverged": str(error), "steps": trainer.state.global_step})
        raise
    seconds = time.perf_counter() - start
    part_after_training()
    trainer.optimizer.eval()  # schedule-free optimizers train other weights than they mean
    optimizer = trainer.optimizer.optimizer  # inside accelerate's
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # no autocast from here on
    for each in best:
        each.load()
    if isinstance(model, PeftModel):
        model.save_pretrained(run.path / "adapter")
        if factors := create_optimizer.factors(model):
            save_plain_lora(model, run.path / "adapter", factors)
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


def whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end; a torn one is deleted."""
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))):
        if Path(last, "trainer_state.json").exists():  # Trainer writes it last
            return last
        shutil.rmtree(last)
    return None


def mlp_of(method: DictConfig) -> str:
    """What the method's file says, or full where method/create_optimizer=op.

    There the file is the plain adapter's; a control without MLPs knows their width, too.
    """
    composed = method.role != "control" and "mlp_width" in method.create_optimizer
    return "full" if composed and method.mlp == "none" else method.mlp


def describe(cfg: DictConfig, auto_class: type) -> str:
    """The dry run: what would be trained, on what and what it needs; `expected` as text."""
    is_ = expected(cfg, auto_class)
    licences = cfg.get("licences", {})
    lines = [
        f"{name}: {source}" + (f" ({licences[name]})" if name in licences else "")
        for name, source in cfg.sources.items()
    ]
    if not cfg.get("fine_tune", True):
        parameters = f"base parameters: {is_['base_parameters']:,}"
        return "\n".join([*lines, "method: none, the model as it is", parameters])
    other = mlp_of(cfg.method) == "other"
    mlp = "of another form, not counted" if other else f"{is_['mlp_parameters']:,}"
    lines += [
        f"method: {cfg.method.name}, rank {cfg.rank}, learning rate {cfg.lr:g}, seed {cfg.seed}",
        f"base parameters: {is_['base_parameters']:,}",
        f"adapter parameters: {is_['adapter_parameters']:,}",
        f"MLP parameters: {mlp}",
        f"optimizer steps: {is_['steps']:,} of {is_['batch']} rows on one device "
        f"({cfg.train_rows:,} rows)",
        f"memory: about {is_['held_bytes'] / 1e9:.1f} GB for weights, gradients and optimizer, "
        "plus activations",
    ]
    if "estimate" in cfg:
        fits = [f"{card} GB" for card in CARDS if fits_on(is_["memory_bytes"], card)]
        lines += [
            f"memory with activations: about {is_['memory_bytes'] / 1e9:.0f} GB with "
            f"{cfg.estimate.step_rows} rows at once; fits a GPU of "
            f"{', '.join(fits) or 'none of 24, 48 and 80 GB'}",
            f"time: about {hours(is_['training_seconds'])} of training and "
            f"{hours(is_['evaluation_seconds'])} of evaluation on one H100, at "
            f"{cfg.estimate.utilisation:.0%} of {cfg.estimate.peak_tflops:g} and "
            f"{cfg.estimate.evaluation.peak_tflops:g} TFLOP/s",
            f"disk: {is_['download_bytes'] / 1e9:.0f} GB of models and data, and up to "
            f"{is_['disk_bytes'] / 1e9 - is_['download_bytes'] / 1e9:.1f} GB of checkpoints",
        ]
    return "\n".join(lines)


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def fits_on(memory_bytes: float, card: int) -> bool:
    """Does it fit a GPU of so many GB, of which CUDA itself takes a part?"""
    return memory_bytes < 0.95e9 * card


def expected(cfg: DictConfig, auto_class: type) -> dict[str, Any]:
    """Counts, memory, time and disk of a run on one GPU; no weights or data are loaded.

    Reads from the config `architecture` (a transformers config, for `auto_class.from_config`),
    `weight_bytes` of what is not trained, `train_rows`, `training` and, where there is one,
    `estimate`: `step` (a model to the loss of its largest batch), `step_rows` (of that batch),
    `peak_tflops` and `utilisation` of the GPU, `besides_gb` (held, not counted otherwise),
    `evaluation` (rows that go forward, peak_tflops, weight_bytes and cache_gb), `download_gb`.
    """
    with torch.device("meta"):
        model = auto_class.from_config(instantiate(cfg.architecture, _convert_="all"))
    base = sum(p.numel() for p in model.parameters())
    if not cfg.get("fine_tune", True):
        return {"base_parameters": base}
    adapter = instantiate(cfg.method.adapter, _convert_="all")
    create = cfg.method.create_optimizer
    keys = ("mlp_width", "z_dim", "shared_trunk")
    plain = mlp_of(cfg.method) in ("none", "other")
    options = {} if plain else {k: create[k] for k in keys if k in create}
    options["lite"] = mlp_of(cfg.method) == "lite"
    if "optimizer" in create:
        options["optimizer_cls"] = get_class(create.optimizer._target_)
    if options.get("mlp_width"):
        check_optimizer(options["optimizer_cls"])
    if adapter is not None:
        if hasattr(adapter, "init_lora_weights"):
            adapter.init_lora_weights = True  # others look at weights; the counts are the same
        with torch.device("meta"):
            model = add_adapter(model, adapter)
    report = parameter_report(model, **options)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    training, (steps, batch) = cfg.training, planned_steps(cfg)
    # what is trained is held in float32, as its gradients are
    held = frozen * cfg.weight_bytes + 8 * trained + report["optimizer_state_bytes"]
    counts = {
        "base_parameters": base,
        "adapter_parameters": report["adapter_parameters"],
        "mlp_parameters": report["mlp_parameters"],
        "steps": steps,
        "batch": batch,
        "held_bytes": held,
    }
    if "estimate" not in cfg:
        return counts
    estimate, scored = cfg.estimate, cfg.estimate.evaluation
    if training.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    half = training.get("bf16", False) or training.get("fp16", False)
    cost = step_cost(
        (model.get_base_model() if isinstance(model, PeftModel) else model).train(),
        instantiate(estimate.step),
        half=cfg.weight_bytes == 2,
        autocast=half,
    )
    evaluation_bytes = base * scored.weight_bytes + 1e9 * scored.cache_gb
    memory = max(held - 4 * trained + cost.bytes, evaluation_bytes) + 1e9 * estimate.besides_gb
    checkpoint = report["optimizer_state_bytes"] + 4 * trained
    speed = 1e12 * estimate.utilisation * estimate.step_rows  # of that many rows
    computing = cfg.train_rows * training.num_train_epochs * cost.flop / estimate.peak_tflops
    return counts | {
        "memory_bytes": round(memory),
        "training_seconds": computing / speed + steps * 2 * checkpoint / BYTES_PER_SECOND,
        "evaluation_seconds": scored.rows * cost.forward_flop / (speed * scored.peak_tflops),
        "download_bytes": 1e9 * estimate.download_gb,
        # one more than are kept, as the next one is written before the last one goes
        "disk_bytes": 1e9 * estimate.download_gb + (training.save_total_limit + 1) * checkpoint,
    }
