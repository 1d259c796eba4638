"""Multitask training data: batches of one task each, and their tensors.

What Trainer takes for a row is a whole batch here (per_device_train_batch_size=1 and
train_sampling_strategy="sequential"), so that its own resume goes on in the middle of an epoch.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from oplora.harness.completion import IGNORED


@dataclass(frozen=True, slots=True)
class VLItem:
    """One question, statement or caption about images."""

    id: str  # begins with the task and the side
    task: str
    text: str  # without the task's prefix; empty for captions
    images: tuple[str, ...]
    answers: tuple[tuple[str, float], ...] = ()  # with scores in [0, 1]; drawn by them in training
    references: tuple[str, ...] = ()  # what an evaluation compares with: human answers, captions


class Draw(NamedTuple):
    """An item with the answer that is trained."""

    item: VLItem
    answer: str
    score: float


class Grids(Protocol):
    """Features (cells, size) of an image by its name (`oplora.studies.vl_bart.grids`)."""

    def __contains__(self, image: str) -> bool: ...
    def __call__(self, image: str) -> Tensor: ...


class MultitaskBatches(Dataset):
    """The batches of one epoch: one task per batch, every item once.

    As upstream, a task with more items has more batches, and their order is drawn anew for every
    epoch; here seed and epoch fix it, and the answer of every item. accelerate calls `set_epoch`.
    seed: None keeps the order, with the best answers (for a validation loss).
    """

    def __init__(
        self,
        items: Mapping[str, Sequence[VLItem]],
        batch_sizes: Mapping[str, int],
        seed: int | None,
    ):
        if empty := [task for task, each in items.items() if not each]:
            raise ValueError(f"task {empty[0]!r} has no items: give it some or leave it out")
        self.items, self.batch_sizes, self.seed = items, batch_sizes, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch."""
        self.epoch, self.batches = epoch, []
        for task, items in self.items.items():
            rows = list(range(len(items)))
            if self.seed is not None:
                random.Random(f"{self.seed} {epoch} {task}").shuffle(rows)
            size = self.batch_sizes[task]
            self.batches += [(task, rows[n : n + size]) for n in range(0, len(rows), size)]
        if self.seed is not None:
            random.Random(f"{self.seed} {epoch}").shuffle(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[Draw]:
        task, rows = self.batches[index]
        return [self._draw(self.items[task][row]) for row in rows]

    def _draw(self, item: VLItem) -> Draw:
        """One of the answers by its score; none of them counts: an empty one with score 0."""
        scores = [score for _, score in item.answers]
        if not any(scores):
            return Draw(item, "", 0.0)
        if self.seed is None:
            return Draw(item, *max(item.answers, key=lambda answer: answer[1]))
        chance = random.Random(f"{self.seed} {self.epoch} {item.id}")
        return Draw(item, *chance.choices(item.answers, scores)[0])


class VLCollator:
    """Tensors of a batch.

    tasks: for every task its `prefix`, and the most tokens of inputs and targets, `input_tokens`
    and `target_tokens` (None: no limit).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, grids: Grids, tasks: Mapping[str, Mapping]
    ):
        self.tokenizer, self.grids, self.tasks = tokenizer, grids, tasks

    def __call__(self, batches: Sequence[Sequence[Draw]]) -> dict[str, Tensor]:
        """What `VLBart.forward` takes, with labels (batch, tokens) and scores (batch,)."""
        if len(batches) != 1:
            raise ValueError(
                f"{len(batches)} batches of different tasks at once: a row is a batch already, "
                "set per_device_train_batch_size and per_device_eval_batch_size to 1"
            )
        items, answers, scores = zip(*batches[0], strict=True)
        targets = self._tokens(answers, self.tasks[items[0].task]["target_tokens"])
        labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, IGNORED)
        return {**self.inputs(items), "labels": labels, "scores": torch.tensor(scores).float()}

    def inputs(self, items: Sequence[VLItem]) -> dict[str, Tensor]:
        """What `VLBart.encode` takes, for items of one task.

        input_ids, attention_mask: (batch, tokens); grids: (batch, images, cells, size), missing
        where items have no image.
        """
        task = self.tasks[items[0].task]
        texts = [task["prefix"] + item.text for item in items]
        tokens = self._tokens(texts, task["input_tokens"])
        if not items[0].images:
            return tokens
        return {**tokens, "grids": torch.stack([self._grids(item) for item in items])}

    def _tokens(self, texts: Sequence[str], limit: int | None) -> dict[str, Tensor]:
        options: dict[str, Any] = dict(return_token_type_ids=False, return_tensors="pt")
        if limit is not None:
            options |= dict(truncation=True, max_length=limit)
        return dict(self.tokenizer(list(texts), padding=True, **options))

    def _grids(self, item: VLItem) -> Tensor:
        try:
            return torch.stack([self.grids(image) for image in item.images])
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{item.id}: {error}") from error


def check_images(items: Iterable[VLItem], grids: Grids) -> None:
    """FileNotFoundError naming the first item with an image without features: before training."""
    known: set[str] = set()
    for item in items:
        for image in item.images:
            if image not in known and image not in grids:
                raise FileNotFoundError(
                    f"{item.id}: image {image!r} has no features; extract them first"
                )
            known.add(image)
