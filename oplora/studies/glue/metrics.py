"""Test scores of GLUE's tasks: each task's own metrics, and the loss."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_matthews_corrcoef
from tqdm import tqdm
from transformers import PreTrainedModel

from oplora.harness.predictions import PredictionFile
from oplora.studies.glue.tasks import Example

Metric = Callable[[Tensor, Tensor], Tensor]  # of predictions and labels, both (rows,)


def evaluate(
    model: PreTrainedModel,
    collator: Callable[[list[dict]], Mapping[str, Tensor]],
    rows: Sequence[Example],
    encoded: Sequence[dict],
    path: str | Path,
    *,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Predict every row: the likeliest class, or with one label the number.

    encoded: the inputs of `rows`. Rows of `path` have id, label, prediction, and loss: of classes
    the negative log-likelihood in nats, of numbers the squared error.
    """
    file = PredictionFile(path, {row.id for row in rows})
    todo = [n for n, row in enumerate(rows) if row.id not in file]
    device = model.device
    model.eval()
    for start in tqdm(range(0, len(todo), batch_size), desc="Scoring", unit="batch"):
        part = todo[start : start + batch_size]
        batch = {
            name: each.to(device) for name, each in collator([encoded[n] for n in part]).items()
        }
        labels = batch.pop("labels")
        with torch.inference_mode():
            logits = model(**batch).logits.float()
        found, losses = predicted(logits, labels)
        file.append(
            [
                {"id": rows[n].id, "label": rows[n].label, "prediction": p, "loss": round(loss, 6)}
                for n, p, loss in zip(part, found.tolist(), losses.tolist(), strict=True)
            ]
        )
    return [file.by_id[row.id] for row in rows]


def predicted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and losses, both (rows,), of logits (rows, classes) or (rows, 1)."""
    if logits.shape[1] == 1:
        found = logits[:, 0]
        return found, (found - labels).square()
    return logits.argmax(1), F.cross_entropy(logits, labels, reduction="none")


def scores(
    predictions: Sequence[dict[str, Any]], metrics: Mapping[str, Metric]
) -> dict[str, float]:
    """Metrics of an evaluation's rows by name, `score` (the first of them) and test_loss.

    A correlation of predictions that are all the same does not exist and is left out. Of classes
    also `majority`: the accuracy of always naming the most frequent one.
    """
    labels = [row["label"] for row in predictions]
    numbers = isinstance(labels[0], float)
    kind = torch.float64 if numbers else torch.long
    pair = [torch.tensor([row[key] for row in predictions], dtype=kind)
            for key in ("prediction", "label")]  # fmt: skip
    found = {name: metric(*pair).item() for name, metric in metrics.items()}
    found["score"] = found[next(iter(metrics))]
    found["test_loss"] = sum(row["loss"] for row in predictions) / len(predictions)
    if not numbers:
        found["majority"] = Counter(labels).most_common(1)[0][1] / len(labels)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def matthews(predictions: Tensor, labels: Tensor) -> Tensor:
    """Matthews' correlation of classes 0 and 1, both (rows,); 0 where either side has one alone.

    So GLUE's own script counts; torchmetrics returns something else there.
    """
    if min(len(predictions.unique()), len(labels.unique())) < 2:
        return torch.zeros(())
    return binary_matthews_corrcoef(predictions, labels)
