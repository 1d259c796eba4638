"""OP-LoRA: adapters predicted by an MLP during training, plain adapters afterwards."""

from oplora.mlp import AdapterMLP
from oplora.optimizer import OPAdamW, OPOptimizer

__all__ = ["AdapterMLP", "OPAdamW", "OPOptimizer"]
