"""A byte-level tokenizer learnt from a few sentences, and a random LlamaForCausalLM for it."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = [
    "Question: Which of these is warm? Answer: the sun is warm and the moon is cold.",
    "Question: What does a cat drink? Answer: milk, and sometimes the water of a puddle.",
    "### Instruction: ### Response: the correct answer is answer1 answer2 solution1 true false",
]


def tiny_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side=padding_side,
    )


def with_llamas_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """It begins texts with <s>, and has the names that LLaMA's tokenizers have."""
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens(names)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )
    return tokenizer


def tiny_llama(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # far from uniform outputs
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()
