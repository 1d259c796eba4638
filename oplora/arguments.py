"""What users give to the optimizers: blocks of tensors, choices, hyperparameters."""

import inspect
from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer


def blocks_of(params, group: str) -> tuple[list[list], list[list[str]]]:
    """Blocks of tensors and their names from tensors, (name, tensor) pairs and lists of these."""
    blocks, names = [], []
    for number, item in enumerate([params] if isinstance(params, Tensor) else list(params)):
        pairs = [
            e if isinstance(e, tuple) else (f"{group} tensor {number}.{k}", e)
            for k, e in enumerate(item if isinstance(item, list) else [item])
        ]
        names.append([name for name, _ in pairs])
        blocks.append([tensor for _, tensor in pairs])
    return blocks, names


def check_choice(name: str, value, choices: tuple):
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use {' or '.join(map(repr, choices))}")


def check_adamw(group: dict, *more: str):
    """ValueError for hyperparameters out of range; more: others that must not be negative."""
    for key in ("lr", "eps", "weight_decay", *more):
        if not group[key] >= 0:
            raise ValueError(f"{key}={group[key]} is negative: give 0 or more")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']}: both must be at least 0 and below 1")


def check_optimizer(optimizer_cls):
    """Can this class train MLPs: elementwise, within one step, on the weights that it evaluates?"""
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"{optimizer_cls!r} is no optimizer class: give one as torch.optim.AdamW")
    name = optimizer_cls.__name__
    if name == "LBFGS":
        raise ValueError("LBFGS evaluates the loss within a step: use a first-order optimizer")
    if name in ("Muon", "SparseAdam"):
        raise ValueError(f"{name} is not for the dense tensors of any shape that an MLP has")
    if hasattr(optimizer_cls, "eval"):
        raise ValueError(
            f"{name} evaluates other weights than it trains (schedule-free), which the MLPs "
            "cannot follow: use AdamW, or train the adapter directly"
        )


def with_keywords_of(*sources: Callable) -> Callable:
    """Decorate a function that hands **kwargs on: its signature shows the keywords of `sources`."""

    def decorate(function: Callable) -> Callable:
        mine = inspect.signature(function)
        shown = {n: p for n, p in mine.parameters.items() if p.kind is not p.VAR_KEYWORD}
        rest = [p for n, p in mine.parameters.items() if n not in shown]
        for source in sources:
            for name, parameter in inspect.signature(source).parameters.items():
                if parameter.kind is parameter.KEYWORD_ONLY and name not in shown:
                    shown[name] = parameter
        function.__signature__ = mine.replace(parameters=[*shown.values(), *rest])
        return function

    return decorate
