"""OP-LoRA: adapters predicted by an MLP during training, plain adapters afterwards."""

from importlib import import_module

__version__ = "0.2.0"

_HOMES = {
    "AdapterMLP": "mlp",
    "OPAdamW": "adamw",
    "OPOptimizer": "optimizer",
    "OPTrainer": "trainer",
    "OPTrainerMixin": "trainer",
    "ScaleAdamW": "scale",
    "create_oplora_optimizer": "peft",
    "create_scale_optimizer": "peft",
    "parameter_report": "peft",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    # On first use: what needs no torch (`oplora.report`) shall not wait for it, nor OPAdamW for
    # transformers.
    if name not in _HOMES:
        raise AttributeError(f"module 'oplora' has no attribute {name!r}")
    return getattr(import_module(f"oplora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    # The names above are no globals before their first use: dir() and completion miss them.
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
