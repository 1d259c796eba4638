"""OP-LoRA with Hugging Face Trainer: `OPTrainer` in place of `Trainer`, nothing else.

python examples/trainer.py OUT    # the folder for checkpoints and the adapter
"""

import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from oplora import OPTrainer  # the one line that matters; Trainer otherwise


def base_model():
    """In place of `AutoModelForCausalLM.from_pretrained(…)`: a tiny Llama, always the same."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))


def main(out: str):
    model = get_peft_model(base_model(), LoraConfig(r=4, target_modules="all-linear"))
    tokens = torch.arange(32).repeat(16, 1)
    dataset = [dict(input_ids=row, labels=row) for row in tokens]
    args = TrainingArguments(
        out,
        learning_rate=1e-3,  # of the MLPs: begin at a tenth of LoRA's
        num_train_epochs=10,
        per_device_train_batch_size=8,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
    )
    trainer = OPTrainer(model, args, train_dataset=dataset)
    trainer.train()  # resume_from_checkpoint=True goes on exactly where a cut training was
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    trainer.save_model(out)  # a plain LoRA; its model card says how it was trained
    again = PeftModel.from_pretrained(base_model(), out)  # without oplora
    with torch.no_grad():
        same = torch.equal(again(tokens).logits, model.eval()(tokens).logits)
    print(f"the saved adapter gives the same logits: {same}")


if __name__ == "__main__":
    main(*sys.argv[1:])
