"""OP-LoRA on a base in 4 bits (QLoRA): the optimizer looks at the adapter alone.

python examples/qlora.py OUT
"""

import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from oplora import create_oplora_optimizer


def tiny_checkpoint(folder: str) -> str:
    """In place of a model's name: a tiny Llama on disk."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=64)
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(folder)
    return folder


def main(out: str):
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with tempfile.TemporaryDirectory() as folder:
        base = AutoModelForCausalLM.from_pretrained(
            tiny_checkpoint(folder), quantization_config=four_bits
        )
    print(f"base: {type(base.model.layers[0].self_attn.q_proj).__name__}")
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    # the one line that matters; bitsandbytes' or torch's AdamW otherwise
    optimizer = create_oplora_optimizer(model, lr=1e-3)
    tokens = torch.arange(32).repeat(8, 1)
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    model.save_pretrained(out)  # a plain LoRA


if __name__ == "__main__":
    main(*sys.argv[1:])
