"""OP-LoRA under FSDP2 (`fully_shard`), saved and resumed by torch.distributed.checkpoint.

torchrun --nproc-per-node 2 examples/fsdp2.py OUT    # on GPUs: "nccl", and the model moved
"""

import sys

import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint import state_dict as sd
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from oplora import create_oplora_optimizer

ADAPTER = sd.StateDictOptions(ignore_frozen_params=True, strict=False)
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)


class Training:  # torch's checkpoints take anything with these two methods
    def __init__(self):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4))
        self.model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        for layer in [*model.model.layers, self.model]:
            fully_shard(layer)
        # the one line that matters, after fully_shard; torch.optim.AdamW otherwise
        self.optimizer = create_oplora_optimizer(self.model, lr=1e-3)

    def state_dict(self):
        states = sd.get_state_dict(self.model, self.optimizer, options=ADAPTER)
        return dict(zip(("model_state_dict", "optim_state_dict"), states, strict=True))

    def load_state_dict(self, states):
        sd.set_state_dict(self.model, self.optimizer, **states, options=ADAPTER)

    def step(self):
        tokens = torch.arange(32).repeat(8, 1)
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


if __name__ == "__main__":
    out = sys.argv[1]
    torch.distributed.init_process_group("gloo")
    first, second = Training(), Training()
    losses = [first.step() for _ in range(5)]
    dcp.save({"training": first}, checkpoint_id=out)
    dcp.load({"training": second}, checkpoint_id=out)
    same = all(first.step() == second.step() for _ in range(5))
    whole = sd.get_model_state_dict(first.model, options=sd.StateDictOptions(full_state_dict=True))
    if torch.distributed.get_rank() == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        print(f"the resumed training makes the same steps: {same}")
        first.model.save_pretrained(out, state_dict=whole)  # a plain LoRA
    torch.distributed.destroy_process_group()
