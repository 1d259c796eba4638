"""Naming what an image shows (Table 4): generated answers, searched for a class."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from oplora.harness.predictions import PredictionFile

IGNORED = -100  # label of positions without loss


class Picture(Protocol):
    """What is read of an image."""

    id: str
    label: str


class Collator(Protocol):
    """`oplora.studies.llava_cars.naming.NamingCollator`."""

    def __call__(self, pictures: Sequence[Any]) -> dict[str, Any]: ...
    def prompts(self, pictures: Sequence[Any]) -> dict[str, Tensor]: ...


def exact_match(text: str, label: str) -> bool:
    """Upstream's score: the answer is the label, but for case and white space around it."""
    return text.strip().lower() == label.strip().lower()


def found_label(text: str, labels: Iterable[str]) -> str | None:
    """The paper's score: the class that an answer names, None if it names none.

    Whole words count, without case. Of several classes the longest wins, so that "hot dog" is no
    dog; of equally long ones that which comes first in the text.
    """
    found = [
        (-len(label), match.start(), label)
        for label in labels
        if (match := _pattern(label.strip().lower()).search(text.lower()))
    ]
    return min(found)[2] if found else None


@cache
def _pattern(label: str) -> re.Pattern:
    return re.compile(rf"(?<!\w){re.escape(label)}(?!\w)")


def evaluate(
    model,
    tokenizer: PreTrainedTokenizerBase,
    collator: Collator,
    pictures: Sequence[Picture],
    classes: Sequence[str],
    path: str | Path,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """Metrics of greedy answers (`summary`); every prediction is a row of `path`.

    Rows have id, label, prediction, the class found in it (or null) and nll, the label's in nats
    per token; those already in `path` are not computed again.
    """
    ids = [picture.id for picture in pictures]
    file = PredictionFile(path, ids)
    training = model.training
    model.eval()
    with tqdm(total=len(ids), desc="Naming", unit="image", leave=False) as bar:
        for first in range(0, len(ids), batch_size):
            last = min(first + batch_size, len(ids))
            # The same batches after a kill: padding must not change a prediction.
            if any(id not in file for id in ids[first:last]):
                batch = [pictures[n] for n in range(first, last)]
                texts = answers(model, tokenizer, collator, batch, max_new_tokens)
                losses = label_nll(model, collator, batch)
                rows = [
                    {
                        "id": picture.id,
                        "label": picture.label,
                        "prediction": text,
                        "found": found_label(text, classes),
                        "nll": loss,
                    }
                    for picture, text, loss in zip(batch, texts, losses, strict=True)
                ]
                file.append([row for row in rows if row["id"] not in file])
            bar.update(last - first)
    model.train(training)
    return summary([file.by_id[id] for id in ids])


@torch.inference_mode()
def answers(
    model, tokenizer, collator: Collator, pictures: Sequence[Picture], max_new_tokens: int
) -> list[str]:
    """What the model says, greedily, without the prompt."""
    inputs = _on(model, collator.prompts(pictures))
    ids = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    said = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]


@torch.inference_mode()
def label_nll(model, collator: Collator, pictures: Sequence[Picture]) -> list[float]:
    """Mean negative log-likelihood of every label's tokens, with its end."""
    batch = _on(model, collator(pictures))
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].float()
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels)
    return (losses.sum(1) / (labels != IGNORED).sum(1)).tolist()


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """accuracy (search for the label) and exact_accuracy in [0, 1], test_nll in nats per token."""
    if not rows:
        raise ValueError("nothing to summarise: no predictions")
    return {
        "accuracy": sum(row["found"] == row["label"] for row in rows) / len(rows),
        "exact_accuracy": sum(exact_match(r["prediction"], r["label"]) for r in rows) / len(rows),
        "test_nll": sum(row["nll"] for row in rows) / len(rows),
    }


def guesses(train: Sequence[str], test: Sequence[str], classes: Sequence[str]) -> dict[str, float]:
    """Accuracies without looking: of a random class, and of the training images' most frequent."""
    most = max(sorted(set(train)), key=train.count)
    return {"chance": 1 / len(classes), "majority": test.count(most) / len(test)}


def _on(model, batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
