"""Train the small preset's base model for VL-BART from scratch: a tiny BART on easy-vqa.

python base_models/tiny_vl_bart/pretrain.py        → results/base_models/tiny_vl_bart
It sees some families of questions and five of eight colours (oplora/studies/vl_bart/easy_vqa.py);
beside the weights, pretraining.json holds what it can do on held-out images, family by family. Cut
off, it goes on from its last checkpoint.
"""

import argparse
import json
import shutil
import time
from collections import defaultdict
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from oplora.harness.assets import fetch
from oplora.harness.checkpoints import whole_checkpoint
from oplora.studies.vl_bart import easy_vqa
from oplora.studies.vl_bart.batches import MultitaskBatches, VLCollator, VLItem
from oplora.studies.vl_bart.metrics import evaluate
from oplora.studies.vl_bart.model import VLBart

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "results" / "base_models" / "tiny_vl_bart"
ITEMS = {"vqa": 5000, "gqa": 6000, "nlvr": 6000, "caption": 2300}
HELD_OUT = 400  # items of every task that the scores are taken on
BATCH_SIZES = {"vqa": 64, "gqa": 64, "nlvr": 64, "caption": 64, "text": 128}
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # with BART's ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists: delete it first")
    torch.set_num_threads(arguments.threads)
    set_seed(0)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("vl_bart", ["preset=small"])
    items = easy_vqa.pretraining_items(ITEMS)
    tasks = {**cfg.tasks, "text": {"prefix": "", "input_tokens": None, "target_tokens": None}}
    prefixes = [task["prefix"] for task in tasks.values()]
    tokenizer = word_tokenizer([*prefixes, *easy_vqa.TASKS], items)  # "gqa", if not "gpa", too
    config = instantiate(cfg.architecture, vocab_size=len(tokenizer), dropout=0.1)
    model = VLBart(config)
    collator = VLCollator(tokenizer, instantiate(cfg.grids), tasks)
    work = arguments.out.with_name(f".{arguments.out.name}.partial")
    start = time.perf_counter()
    trainer = Trainer(
        model,
        training_arguments(work / "checkpoints", arguments.epochs),
        train_dataset=MultitaskBatches(items, BATCH_SIZES, seed=0),
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=whole_checkpoint(work / "checkpoints"))
    facts = {
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - start),
        "parameters": sum(p.numel() for p in model.parameters()),
        "scores": scores(model, tokenizer, collator, work / "predictions.jsonl"),
    }
    save(model, tokenizer, facts, work, arguments.out)
    print(json.dumps(facts, indent=1))


def training_arguments(folder: Path, epochs: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.01,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=50,
        use_cpu=True,
        report_to="none",
    )


def word_tokenizer(prefixes: list[str], items: dict[str, list[VLItem]]) -> PreTrainedTokenizerFast:
    """One token per word of all texts, answers and prefixes, and per mark."""
    split = pre_tokenizers.Whitespace()
    texts = {text for each in items.values() for i in each for text in (i.text, i.answers[0][0])}
    words = {
        word
        for text in (*prefixes, *(text.replace("<mask>", " ") for text in texts))
        for word, _ in split.pre_tokenize_str(text)
    }
    vocabulary = {word: n for n, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = dict(zip(("bos", "pad", "eos", "unk", "mask"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in names.items()}
    )


def scores(model, tokenizer, collator: VLCollator, path: Path) -> dict[str, dict[str, float]]:
    """Metrics on the adapters' validation images by task, and accuracies by family."""
    folder = fetch("easy-vqa")
    items = {t: easy_vqa.task_items(folder, "validation", t, HELD_OUT) for t in easy_vqa.TASKS}
    options = dict(answer_tokens=10, caption_tokens=20, caption_tokenizer="simple")
    path.unlink(missing_ok=True)
    result = {"all": evaluate(model, tokenizer, collator.inputs, items, path, **options)}
    families = defaultdict(list)
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if "score" in row:
            task, _, family, _ = row["id"].split("/")
            seen = "seen" if family in easy_vqa.SEEN_FAMILIES[task] else "new"
            families[f"{task} {family} ({seen})"].append(row["score"])
    return result | {"families": {k: sum(v) / len(v) for k, v in sorted(families.items())}}


def save(model: VLBart, tokenizer, facts: dict, work: Path, out: Path) -> None:
    """Everything in one folder that appears at once."""
    shutil.rmtree(work / "checkpoints", ignore_errors=True)
    (work / "predictions.jsonl").unlink(missing_ok=True)
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    (work / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    work.rename(out)


if __name__ == "__main__":
    main()
