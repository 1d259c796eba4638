"""OP-LoRA in TRL's SFTTrainer: the mixin in front of it.

python examples/trl_sft.py OUT
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from oplora import OPTrainerMixin

WORDS = ["<pad>", "<eos>", "<unk>", "the", "cat", "sat", "on", "a", "mat"]


class OPSFTTrainer(OPTrainerMixin, SFTTrainer):  # the one line that matters
    pass


def tokenizer():
    """In place of `AutoTokenizer.from_pretrained(…)`."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def main(out: str):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=32)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, eos_token_id=1))
    trainer = OPSFTTrainer(
        model,
        args=SFTConfig(
            out,
            learning_rate=1e-3,
            max_steps=10,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"text": ["the cat sat on a mat"] * 32}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    trainer.save_model(out)  # a plain LoRA


if __name__ == "__main__":
    main(*sys.argv[1:])
