"""Small presets compute in bfloat16 only where the processor does."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from oplora.harness import precision

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.mark.parametrize(
    ("known", "found"),
    [
        ({"avx512_bf16": False, "amx_bf16": True, "avx2": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, False),
        ({"bf16": True, "sve_max_length": 256}, True),  # ARM
        ({"neon": True}, False),
    ],
)
def test_the_processor_is_asked(monkeypatch, known, found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert precision.computes_in_bfloat16() is found


@pytest.mark.parametrize("has", [True, False])
def test_a_config_says_what_was_computed_in(monkeypatch, has):
    monkeypatch.setattr(precision, "computes_in_bfloat16", lambda: has)
    precision.use_in_configs()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        sdxl, subjects, llava = (
            compose(name, ["preset=small", "method=lora"])
            for name in ("sdxl", "subjects", "llava_cars")
        )
    for cfg in (sdxl, subjects):
        assert cfg.training.bf16 is has
        assert cfg.generate.autocast == ("bfloat16" if has else None)
    assert llava.model.dtype.path == ("torch.bfloat16" if has else "torch.float32")
