"""Bfloat16 where the processor has it: emulated, it is slower than float32."""

import torch
from omegaconf import OmegaConf


def computes_in_bfloat16() -> bool:
    """Has the processor instructions for products in bfloat16? A torch that cannot tell has."""
    known = getattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})()
    return any(on is True for name, on in known.items() if "bf16" in name)


def use_in_configs() -> None:
    """`${half:TYPE,OTHER}` in a YAML file is TYPE where the processor has it, else OTHER.

    A run's config has what it was, so that runs in different precisions are different runs.
    """
    OmegaConf.register_new_resolver(
        "half", lambda half, other: half if computes_in_bfloat16() else other, replace=True
    )
