"""The dry run: what a run would train, on what, and what it needs, before anything is loaded."""

from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from peft import PeftModel

from oplora.arguments import check_optimizer
from oplora.harness.cost import step_cost
from oplora.harness.methods import add_adapter
from oplora.peft import parameter_report

CARDS = (24, 48, 80)  # GB of GPUs that are named
BYTES_PER_SECOND = 3e12  # of an H100's memory: what a step of the optimizer reads and writes


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


def planned_steps(cfg: DictConfig) -> tuple[int, int]:
    """Optimizer steps of the run, and rows of each, by the config's count of rows."""
    training = cfg.training
    rows = cfg.get("rows_per_batch", training.per_device_train_batch_size)
    batch, steps = rows * training.gradient_accumulation_steps, training.get("max_steps", -1)
    return (steps if steps >= 0 else -(-cfg.train_rows // batch) * training.num_train_epochs), batch


def mlp_of(method: DictConfig) -> str:
    """What the method's file says, or full where method/create_optimizer=op.

    There the file is the plain adapter's; a control without MLPs knows their width, too.
    """
    composed = method.role != "control" and "mlp_width" in method.create_optimizer
    return "full" if composed and method.mlp == "none" else method.mlp


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def fits_on(memory_bytes: float, card: int) -> bool:
    """Does it fit a GPU of so many GB, of which CUDA itself takes a part?"""
    return memory_bytes < 0.95e9 * card
