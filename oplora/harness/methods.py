"""From a method's config to an adapted model and the factory of its optimizer."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from diffusers.loaders import PeftAdapterMixin
from hydra.utils import instantiate
from omegaconf import DictConfig
from peft import (
    AdaLoraConfig,
    LoraGAConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from oplora.baselines.products import (
    Factors,
    factors_of,
    joined,
    negative,
    save_plain_lora,
)
from oplora.baselines.runlora import use_runlora
from oplora.baselines.starts import common_basis, lora_one
from oplora.peft import adapter_blocks, create_plain_optimizer


@dataclass
class Data:
    """What a method may read before the training: batches, and the loss of one of them.

    batches: inputs with labels, as the training's, read only by methods that initialise from
    them; loss: (model, batch) -> scalar.
    """

    batches: Iterable[dict] | None = None
    loss: Callable[[nn.Module, dict], Tensor] = lambda model, batch: model(**batch).loss

    def first(self, count: int, model: nn.Module) -> list[dict]:
        """So many batches, on the device where both will be; ValueError without any."""
        if self.batches is None or not (found := list(islice(self.batches, count))):
            raise ValueError("this method initialises from data: give apply_method(…, batches=…)")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)
        move = lambda value: value.to(device) if torch.is_tensor(value) else value  # noqa: E731
        return [{name: move(value) for name, value in batch.items()} for batch in found]


@dataclass
class OptimizerFactory:
    """Called with the prepared model it makes the method's optimizer.

    callbacks: what HF Trainer needs besides for this method; merged: what the base has gained, or
    with a start that was taken out of it lost, in products B A; export: saves what of the trained
    PeftModel is no adapter of its own in a folder beside it.
    """

    create: Callable[[nn.Module], Optimizer]
    direct_lr: float | None = None
    callbacks: list[TrainerCallback] = field(default_factory=list)
    merged: list[Factors] = field(default_factory=list)
    export: Callable[[PeftModel, Path], None] | None = None

    def __call__(self, model: nn.Module) -> Optimizer:
        optimizer = self.create(model)
        if self.direct_lr is not None:
            set_direct_lr(optimizer, model, self.direct_lr)
        return optimizer

    def factors(self, model: nn.Module) -> Factors | None:
        """All that was learned as one LoRA on the first base; None where the adapter is that."""
        merged = self.merged + [f for each in self.callbacks for f in getattr(each, "links", [])]
        return joined(*merged, factors_of(model)) if merged else None

    def save(self, model: PeftModel, folder: Path) -> None:
        """All that was learned, for stock PEFT."""
        model.save_pretrained(folder)
        if factors := self.factors(model):
            save_plain_lora(model, folder, factors)
        if self.export:
            self.export(model, folder)


def apply_method(
    model: nn.Module,
    method: DictConfig,
    batches: Iterable[dict] | None = None,
    *,
    direct_lr: float | None = None,
    **data: Callable,
) -> tuple[nn.Module, OptimizerFactory]:
    """The model with the method's adapter, and what makes its optimizer.

    method: the node of one of configs/method/*.yaml, still in its config (it refers to the
    experiment's rank, learning rate, …). batches, loss=…: `Data`. direct_lr: the learning rate of
    what is trained besides an adapter; None: the adapter's. Call the factory after wrapping the
    model.
    """
    parts = instantiate(method, _convert_="all")
    factory = OptimizerFactory(
        parts["create_optimizer"],
        direct_lr if parts["adapter"] is not None else None,
        [parts["callback"]] if "callback" in parts else [],
        export=parts.get("export"),
    )
    model = parts["adapt"](model, parts["adapter"], Data(batches, **data))
    if getattr(parts["adapter"], "init_lora_weights", None) == "lora_ga":
        factory.merged.append(negative(factors_of(model)))
    return model, factory


def set_direct_lr(optimizer: Optimizer, model: nn.Module, lr: float):
    """Give what is trained besides the adapters groups of their own, at this learning rate.

    For an optimizer of any class that has made no step yet.
    """
    adapter = {id(t) for block in adapter_blocks(model)[0] for t in block.tensors}
    for group in list(optimizer.param_groups):
        direct = [p for p in group["params"] if id(p) not in adapter]
        if len(direct) == len(group["params"]):
            group["lr"] = lr
        elif direct:
            group["params"] = [p for p in group["params"] if id(p) in adapter]
            optimizer.param_groups.append({**group, "params": direct, "lr": lr})


def train_everything(model: nn.Module, adapter: None, data: Data):
    """Full fine-tuning; what is trained is held in float32, as adapters are."""
    model.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def add_adapter(model: nn.Module, adapter: PeftConfig, data: Data | None = None):
    """A PeftModel, or for diffusers models the same model with an adapter inside."""
    if isinstance(model, PeftAdapterMixin):
        model.add_adapter(adapter)
        return model
    return get_peft_model(model, adapter)


def add_to_peft_model(model: nn.Module, adapter: PeftConfig, data: Data | None = None):
    """As `add_adapter`, for methods of which PEFT's part works on a PeftModel alone."""
    if isinstance(model, PeftAdapterMixin):
        raise ValueError(
            "this method is not for diffusers models, which are adapted in place: take another "
            "one, or an experiment with a transformers model"
        )
    return get_peft_model(model, adapter)


def add_lora_ga(model: nn.Module, adapter: PeftConfig, data: Data, batches: int):
    """LoRA-GA: A and B from the gradient of the full weights over so many batches."""
    given = data.first(batches, model)

    def backward():
        for batch in given:
            data.loss(model, batch).backward()

    preprocess_loraga(model, adapter, backward)
    model.zero_grad()
    return add_adapter(model, adapter)


def add_lora_one(model: nn.Module, adapter: PeftConfig, data: Data, batches: int, gamma: float):
    """LoRA-One: A and B from the gradient of the full weights over so many batches (`lora_one`)."""
    given, loss = data.first(batches, model), data.loss
    gradients = copy.deepcopy(adapter)
    gradients.lora_ga_config = LoraGAConfig()  # PEFT reads the gradient for LoRA-GA alone
    preprocess_loraga(model, gradients, lambda: [loss(model, b).backward() for b in given])
    model.zero_grad()
    model = add_adapter(model, adapter)
    lora_one(model, gamma)
    return model


def add_runlora(model: nn.Module, adapter: PeftConfig, data: Data | None = None):
    """LoRA whose layers take their products in the cheapest order (`use_runlora`)."""
    return use_runlora(add_adapter(model, adapter))


def add_cora(model: nn.Module, adapter: PeftConfig, data: Data | None = None):
    """CoRA: B from the layers' common basis and frozen (`common_basis`)."""
    model = add_adapter(model, adapter)
    common_basis(model)
    return model


def add_eva(model: nn.Module, adapter: PeftConfig, data: Data, batches: int):
    """EVA: A from the singular vectors of the layers' inputs over so many batches."""
    given = data.first(batches, model)
    model = add_to_peft_model(model, adapter)
    with torch.no_grad():
        initialize_lora_eva_weights(
            model,
            given,
            prepare_model_inputs_fn=lambda inputs, config: inputs.get("attention_mask"),
            prepare_layer_inputs_fn=_tokens,
            show_progress_bar=False,
        )
    return model


def _tokens(inputs: tuple[Tensor, ...], mask: Tensor | None, layer: str) -> Tensor:
    """Rows of a layer's input; without padding where the layer reads what the mask is of."""
    (rows, *_) = inputs
    fits = mask is not None and mask.shape == rows.shape[:-1]
    return rows[mask.bool()] if fits else rows.flatten(0, -2)


def create_with(
    model: nn.Module, create: Callable[..., Optimizer], optimizer: partial, **options
) -> Optimizer:
    """`create(model, optimizer_cls, lr=…, …)`, the form of PEFT's and our factories.

    optimizer: an instantiated configs/optimizer/*.yaml, a class with its arguments.
    """
    return create(model, optimizer.func, **{**optimizer.keywords, **options})


def of_mlp_size(value: float, mlp_width: int) -> float:
    """From a rank or alpha those at which LoRA has as many values as OP-LoRA in W2 and b2."""
    return value * (mlp_width + 1)


def adalora_config(target_r: int, total_step: int | None, **kwargs) -> AdaLoraConfig:
    """From 1.5 target_r, pruned between 10% and 70% of the run.

    total_step: None where `AdaLoRASchedule` will tell it.
    """
    schedule = adalora_schedule(total_step or 10)  # PEFT insists on some
    config = AdaLoraConfig(target_r=target_r, init_r=round(1.5 * target_r), **schedule, **kwargs)
    config.total_step = total_step
    return config


def adalora_schedule(steps: int) -> dict[str, int]:
    return dict(tinit=steps // 10, tfinal=3 * steps // 10, total_step=steps)


class AdaLoRASchedule(TrainerCallback):
    """Tells AdaLoRA how many steps the training has, and at its end which ranks were kept."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for config in model.peft_config.values():
            vars(config).update(adalora_schedule(state.max_steps))

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        kept = getattr(optimizer, "optimizer", optimizer).rank_pattern
        model.peft_config[model.base_model.trainable_adapter_name].rank_pattern = kept


def create_adalora_optimizer(
    model: PeftModel, optimizer_cls: type[Optimizer], **kwargs
) -> Optimizer:
    """The plain optimizer; after each step AdaLoRA spends its rank budget.

    Its state holds what decides that: scores and kept ranks. PEFT has them as attributes, and
    saves only the kept ranks as soon as its config names them, which then fit no optimizer state:
    the config gets them for the step alone.
    """
    if not issubclass(optimizer_cls, torch.optim.Adam | torch.optim.AdamW):
        raise ValueError(f"adalora needs optimizer=adam or adamw, not {optimizer_cls.__name__}")
    optimizer = create_plain_optimizer(model, optimizer_cls, **kwargs)
    tuner, scores = model.base_model, ("exp_avg_ipt", "exp_avg_unc")
    config, optimizer.rank_pattern = model.peft_config[tuner.trainable_adapter_name], None

    def prune(optimizer, args, kw):
        # The count from the optimizer's state: a resumed run goes on with the schedule.
        step = max(int(state["step"]) for state in optimizer.state.values())
        config.rank_pattern = optimizer.rank_pattern
        tuner.update_and_allocate(step)
        optimizer.rank_pattern, config.rank_pattern = config.rank_pattern, None

    def save(optimizer, state):
        held = {name: getattr(tuner.rankallocator, name) for name in scores}
        state["adalora"] = held | {"rank_pattern": optimizer.rank_pattern}

    def load(optimizer, state):
        held = dict(state["adalora"])
        optimizer.rank_pattern = held.pop("rank_pattern")
        for name, values in held.items():
            setattr(tuner.rankallocator, name, {n: t.clone() for n, t in values.items()})
        tuner.rankallocator.ipt = dict.fromkeys(held["exp_avg_ipt"])

    optimizer.register_step_post_hook(prune)
    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
    return optimizer
