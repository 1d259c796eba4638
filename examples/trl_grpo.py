"""OP-LoRA in TRL's GRPOTrainer: the mixin in front of it.

python examples/trl_grpo.py OUT
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from oplora import OPTrainerMixin

WORDS = ["<pad>", "<eos>", "<unk>", "the", "cat", "sat", "on", "a", "mat"]


class OPGRPOTrainer(OPTrainerMixin, GRPOTrainer):  # the one line that matters
    pass


def tokenizer():
    """In place of `AutoTokenizer.from_pretrained(…)`."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def share_of_cats(completions, **_):
    """The reward."""
    return [text.split().count("cat") / 8 for text in completions]


def main(out: str):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**sizes, vocab_size=9, eos_token_id=1, initializer_range=0.2)
    options = dict(learning_rate=3e-3, max_steps=20, logging_steps=1, max_completion_length=8)
    local = dict(use_cpu=True, bf16=False, report_to="none")
    trainer = OPGRPOTrainer(
        LlamaForCausalLM(config),
        share_of_cats,
        args=GRPOConfig(out, **options, **local, per_device_train_batch_size=16, num_generations=8),
        train_dataset=Dataset.from_dict({"prompt": ["the cat sat on a"] * 32}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"reward {sum(rewards[:5]) / 5:.3f} -> {sum(rewards[-5:]) / 5:.3f}")
    trainer.save_model(out)  # a plain LoRA


if __name__ == "__main__":
    main(*sys.argv[1:])
