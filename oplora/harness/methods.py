"""From a method's config to an adapted model and the factory of its optimizer."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from diffusers.loaders import PeftAdapterMixin
from hydra.utils import instantiate
from omegaconf import DictConfig
from peft import AdaLoraConfig, PeftConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from torch.optim import Optimizer

from oplora.peft import adapter_blocks, create_plain_optimizer

OptimizerFactory = Callable[[nn.Module], Optimizer]


def apply_method(
    model: nn.Module,
    method: DictConfig,
    batches: Iterable[dict] | None = None,
    *,
    direct_lr: float | None = None,
) -> tuple[nn.Module, OptimizerFactory]:
    """The model with the method's adapter, and a callable model -> optimizer.

    method: the node of one of configs/method/*.yaml, still in its config (it refers to the
    experiment's rank, learning rate, …). batches: inputs with labels, for methods that initialise
    from data (lora_ga, eva); others do not read them. direct_lr: the learning rate of what is
    trained besides an adapter; None: the adapter's. Call the factory after wrapping the model.
    """
    parts = instantiate(method, _convert_="all")

    def create_optimizer(model: nn.Module) -> Optimizer:
        optimizer = parts["create_optimizer"](model)
        if direct_lr is not None and parts["adapter"] is not None:
            set_direct_lr(optimizer, model, direct_lr)
        return optimizer

    return parts["adapt"](model, parts["adapter"], batches), create_optimizer


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


def train_everything(model: nn.Module, adapter: None, batches: Iterable[dict] | None):
    """Full fine-tuning; what is trained is held in float32, as adapters are."""
    model.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def add_adapter(model: nn.Module, adapter: PeftConfig, batches: Iterable[dict] | None = None):
    """A PeftModel, or for diffusers models the same model with an adapter inside."""
    if isinstance(model, PeftAdapterMixin):
        model.add_adapter(adapter)
        return model
    return get_peft_model(model, adapter)


def add_lora_ga(model: nn.Module, adapter: PeftConfig, batches: Iterable[dict] | None):
    """LoRA-GA: A and B from the gradient of the full weights over the batches."""
    batches = _required(batches, "lora_ga")

    def backward():
        for batch in batches:
            model(**batch).loss.backward()

    preprocess_loraga(model, adapter, backward)
    model.zero_grad()
    return add_adapter(model, adapter)


def add_eva(model: nn.Module, adapter: PeftConfig, batches: Iterable[dict] | None):
    """EVA: A from the singular vectors of the layers' inputs over the batches."""
    batches = list(_required(batches, "eva"))
    model = add_adapter(model, adapter)
    with torch.no_grad():
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def create_with(
    model: nn.Module, create: Callable[..., Optimizer], optimizer: partial, **options
) -> Optimizer:
    """`create(model, optimizer_cls, lr=…, …)`, the form of PEFT's and our factories.

    optimizer: an instantiated configs/optimizer/*.yaml, a class with its arguments.
    """
    return create(model, optimizer.func, **{**optimizer.keywords, **options})


def adalora_config(target_r: int, total_step: int, **kwargs) -> AdaLoraConfig:
    """From 1.5 target_r, pruned between 10% and 70% of the run's steps."""
    schedule = dict(tinit=total_step // 10, tfinal=3 * total_step // 10, total_step=total_step)
    return AdaLoraConfig(target_r=target_r, init_r=round(1.5 * target_r), **schedule, **kwargs)


def create_adalora_optimizer(
    model: PeftModel, optimizer_cls: type[Optimizer], **kwargs
) -> Optimizer:
    """The plain optimizer; after each step AdaLoRA spends its rank budget."""
    if not issubclass(optimizer_cls, torch.optim.Adam | torch.optim.AdamW):
        raise ValueError(f"adalora needs optimizer=adam or adamw, not {optimizer_cls.__name__}")
    optimizer = create_plain_optimizer(model, optimizer_cls, **kwargs)

    def prune(optimizer, args, kw):
        # The count from the optimizer's state: a resumed run goes on with the schedule.
        step = max(int(state["step"]) for state in optimizer.state.values())
        model.base_model.update_and_allocate(step)

    optimizer.register_step_post_hook(prune)
    return optimizer


def _required(batches: Iterable[dict] | None, method: str) -> Iterable[dict]:
    if batches is None:
        raise ValueError(
            f"{method} initialises from batches of data, which this experiment does not give: use "
            "oplora.harness.methods.apply_method(…, batches=…)"
        )
    return batches
