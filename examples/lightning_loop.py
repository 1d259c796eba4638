"""OP-LoRA in a LightningModule with automatic optimization: `configure_optimizers` alone.

python examples/lightning_loop.py OUT
"""

import sys

import lightning
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from oplora import create_oplora_optimizer


class Adapted(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
        self.model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        self.losses = []

    def training_step(self, tokens, index):
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        # the one line that matters; torch.optim.AdamW otherwise
        return create_oplora_optimizer(self.model, lr=1e-3)


def main(out: str):
    module = Adapted()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.arange(32).repeat(64, 1), batch_size=8))
    print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")
    module.model.save_pretrained(out)  # a plain LoRA


if __name__ == "__main__":
    main(*sys.argv[1:])
