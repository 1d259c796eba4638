"""OP-LoRA in an accelerate loop, cut in the middle and resumed from `save_state`.

accelerate launch examples/accelerate_loop.py OUT    # or python examples/accelerate_loop.py OUT
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from oplora import create_oplora_optimizer


def prepared(accelerator):
    set_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    model = accelerator.prepare(model)
    # the one line that matters, after the model was prepared; torch.optim.AdamW otherwise
    optimizer = create_oplora_optimizer(model, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
    batches = DataLoader(torch.arange(32).repeat(64, 1), batch_size=8)
    return model, *accelerator.prepare(optimizer, batches, scheduler)


def train(accelerator, out, resume=False, save_at=None):
    model, optimizer, batches, scheduler = prepared(accelerator)
    if resume:
        accelerator.load_state(out)  # MLPs, moments, schedule, adapter
        batches = accelerator.skip_first_batches(batches, save_at)
    losses = []
    for step, tokens in enumerate(batches, 1):
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == save_at and not resume:
            accelerator.save_state(out)
    return accelerator.unwrap_model(model), losses


def main(out: str):
    accelerator = Accelerator(cpu=True)
    _, losses = train(accelerator, out, save_at=4)  # never cut, saved after four steps
    accelerator.free_memory()
    resumed, rest = train(accelerator, out, resume=True, save_at=4)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"the resumed training makes the same steps: {rest == losses[4:]}")
    resumed.save_pretrained(out)  # a plain LoRA


if __name__ == "__main__":
    main(*sys.argv[1:])
