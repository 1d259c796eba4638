"""Optimizers of LoRA factors that no library has: LoRA-Pro and LoRA-RITE, in PEFT's idiom."""

from oplora.baselines.lora_pro import LoRAPro, create_lora_pro_optimizer
from oplora.baselines.lora_rite import LoRARITE, create_lora_rite_optimizer

__all__ = ["LoRAPro", "LoRARITE", "create_lora_pro_optimizer", "create_lora_rite_optimizer"]
