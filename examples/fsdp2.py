"""OP-LoRA under FSDP2 (`fully_shard`) in one's own loop, here two processes on CPU.

torchrun --nproc-per-node 2 examples/fsdp2.py OUT    # on GPUs: "nccl", and the model moved
"""

import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from oplora import create_oplora_optimizer


def main(out: str):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    # the one line that matters, after fully_shard; torch.optim.AdamW otherwise
    optimizer = create_oplora_optimizer(model, lr=1e-3)

    tokens = torch.arange(32).repeat(8, 1)
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        model.save_pretrained(out, state_dict=whole)  # a plain LoRA
        print(f"{len(get_peft_model_state_dict(model, whole))} tensors saved")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
