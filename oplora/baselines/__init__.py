"""Other systems around LoRA that no library has, in PEFT's and the Trainer's idiom."""

from oplora.baselines.chain import MergeAndRestart, merge_and_restart
from oplora.baselines.lora_pro import LoRAPro, create_lora_pro_optimizer
from oplora.baselines.lora_rite import LoRARITE, create_lora_rite_optimizer
from oplora.baselines.scaled import create_op_scaled_optimizer

__all__ = [
    "LoRAPro",
    "LoRARITE",
    "MergeAndRestart",
    "create_lora_pro_optimizer",
    "create_lora_rite_optimizer",
    "create_op_scaled_optimizer",
    "merge_and_restart",
]
