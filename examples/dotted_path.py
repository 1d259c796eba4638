"""OP for trainers that take an optimizer by its dotted path, as kohya-ss' sd-scripts do.

    python examples/dotted_path.py OUT --optimizer_type oplora.OPAdamW \\
        --optimizer_args mlp_width=32 weight_decay=0.01

The class then gets a flat list of tensors: each has an MLP of its own and keeps its value.
"""

import argparse
import ast
from importlib import import_module

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def optimizer_class(path: str) -> type[torch.optim.Optimizer]:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def main(out: str, optimizer_type: str, optimizer_args: list[str]):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    options = {key: ast.literal_eval(value) for key, _, value in
               (argument.partition("=") for argument in optimizer_args)}  # fmt: skip
    optimizer = optimizer_class(optimizer_type)(trained, lr=1e-3, **options)
    print(optimizer)
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
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--optimizer_type", default="oplora.OPAdamW")  # the one that matters
    parser.add_argument("--optimizer_args", nargs="*", default=["mlp_width=32"])
    main(**vars(parser.parse_args()))
