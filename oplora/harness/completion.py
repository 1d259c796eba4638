"""Prompt and completion pairs as token ids and labels for the Hugging Face Trainer.

Two collators fit: `transformers.DataCollatorForSeq2Seq(tokenizer)` pads as the tokenizer's
`padding_side` and `pad_token` say, and labels with -100; `PackingCollator` does not pad.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, Protocol

from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorWithFlattening, PreTrainedTokenizerBase

IGNORED = -100  # label of positions without loss


class Completion(Protocol):
    """What is read of an example: the text to continue, and its continuation."""

    prompt: str
    target: str


def load_tokenizer(begins_with: str, **options: Any) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained(**options)`, which must begin every text with this token.

    A model that was trained with it is much worse without, and nothing fails. ValueError also
    where the files are sentencepiece's alone and packages that read them are missing.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(**options)
    except (ImportError, ValueError) as error:
        packages = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
        missing = [name for module, name in packages.items() if not _installed(module)]
        if not missing:
            raise
        raise ValueError(
            f"{options['pretrained_model_name_or_path']} may need {' and '.join(missing)} to be "
            f"read: pip install {' '.join(missing)} (part of '.[paper]')"
        ) from error
    begin = tokenizer.convert_ids_to_tokens(tokenizer("text")["input_ids"])[:1]
    if begin != [begins_with]:
        raise ValueError(
            f"{options['pretrained_model_name_or_path']}: texts begin with {begin} in place of "
            f"{begins_with!r}: set tokenizer.add_bos_token=true or correct tokenizer.begins_with"
        )
    return tokenizer


def completion_dataset(
    examples: Iterable[Completion],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cutoff: int = 256,
    train_on_inputs: bool = False,
    append_eos: bool = True,
) -> Dataset:
    """Data set with `input_ids` and `labels`; see `encode_completion`."""
    columns = {"prompt": [], "target": []}
    for example in examples:
        columns["prompt"].append(example.prompt)
        columns["target"].append(example.target)
    return Dataset.from_dict(columns).map(
        lambda row: encode_completion(
            tokenizer,
            row["prompt"],
            row["target"],
            cutoff=cutoff,
            train_on_inputs=train_on_inputs,
            append_eos=append_eos,
        ),
        remove_columns=["prompt", "target"],
        desc="Tokenising",
    )


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    target: str,
    *,
    cutoff: int = 256,
    train_on_inputs: bool = False,
    append_eos: bool = True,
) -> dict[str, list[int]]:
    """Token ids of prompt + target, cut at `cutoff`, and labels on the target or on everything.

    The end-of-sequence token is appended where there is room for it, as LLM-Adapters does.
    A token that reaches from the prompt into the target counts as the target's.
    """
    encoded = tokenizer(
        prompt + target, truncation=True, max_length=cutoff, return_offsets_mapping=True
    )
    ids = list(encoded["input_ids"])
    starts = 0 if train_on_inputs else target_start(encoded["offset_mapping"], len(prompt))
    if append_eos and len(ids) < cutoff and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    if starts >= len(ids):
        raise ValueError(
            f"cutoff={cutoff} leaves nothing of the target {target!r}: raise it or leave the"
            " example out"
        )
    return {"input_ids": ids, "labels": [IGNORED] * starts + ids[starts:]}


class PackingCollator:
    """All examples in one row, logits only where a label is: the same loss for less work.

    For causal models of transformers with `logits_to_keep` and eager or sdpa attention.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        # The tokenizer is not needed: the signature is that of transformers' collators.
        self.flatten = DataCollatorWithFlattening()

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        row = self.flatten(features, return_tensors="pt")
        following = row["labels"][0, 1:]
        kept = (following != IGNORED).nonzero()[:, 0]
        targets = following[kept][None]
        return {
            "input_ids": row["input_ids"],
            # Restarting positions tell the model where examples begin. It looks at them only
            # where it keeps no cache: with one, examples would see each other.
            "position_ids": row["position_ids"],
            "use_cache": False,
            "logits_to_keep": kept,
            "labels": targets,
            "shift_labels": targets,  # already those of the next token
        }


def target_start(offsets: list[tuple[int, int]], prompt_length: int) -> int:
    """Index of the first token that holds characters after the prompt."""
    return next((n for n, (_, end) in enumerate(offsets) if end > prompt_length), len(offsets))


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
