"""Evaluation on VQA, GQA, NLVR and captions (Table 3): generated answers and their scores."""

import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback

from oplora.harness.predictions import PredictionFile

TASKS = ("vqa", "gqa", "nlvr", "caption")  # in the order of Table 3


class Item(Protocol):
    """What is read of an item."""

    id: str
    task: str
    answers: Sequence[tuple[str, float]]
    references: Sequence[str]


Sides = Mapping[str, Sequence[Item]]


def evaluate(
    model,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Callable[[Sequence[Item]], dict[str, Tensor]],
    items: Sides,
    path: str | Path,
    *,
    batch_size: int = 100,
    answer_tokens: int = 20,
    caption_tokens: int = 40,
    caption_beams: int = 5,
    caption_tokenizer: str = "ptb",
) -> dict[str, float | str]:
    """Metrics of the items by task (`summary`); every prediction is a row of `path`.

    model: a `VLBart`. inputs: items of one task to the arguments of its `encode`. VQA and GQA are
    answered greedily, captions by beam search, NLVR by the logits of "true" and "false". Rows
    have id, task and prediction, and but for captions the score in [0, 1]; those already in
    `path` are not computed again. *_tokens: upstream's limits, with begin and end.
    """
    ids = {item.id for each in items.values() for item in each}
    file = PredictionFile(path, ids)
    answer = partial(generate, num_beams=1, max_length=answer_tokens)
    predict = {
        "vqa": answer,
        "gqa": answer,
        "nlvr": true_or_false,
        "caption": partial(generate, num_beams=caption_beams, max_length=caption_tokens),
    }
    with (
        _evaluating(model),
        tqdm(total=len(ids), desc="Answering", unit="item", leave=False) as bar,
    ):
        for task, each in items.items():
            for first in range(0, len(each), batch_size):
                # The same batches after a kill: padding must not change a prediction.
                batch = each[first : first + batch_size]
                if any(item.id not in file for item in batch):
                    encoded = {k: v.to(model.device) for k, v in inputs(batch).items()}
                    texts = predict[task](model, tokenizer, encoded)
                    rows = [_row(item, text) for item, text in zip(batch, texts, strict=True)]
                    file.append([row for row in rows if row["id"] not in file])
                bar.update(len(batch))
    references = {i.id: i.references for each in items.values() for i in each if i.references}
    return summary([file.by_id[id] for id in sorted(ids)], references, caption_tokenizer)


@torch.inference_mode()
def generate(model, tokenizer, encoded: dict[str, Tensor], **options: Any) -> list[str]:
    """Generated texts for `VLBart.encode`'s arguments."""
    ids = model.generate(**model.encode(**encoded), do_sample=False, **options)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


@torch.inference_mode()
def true_or_false(model, tokenizer, encoded: dict[str, Tensor]) -> list[str]:
    """ "true" or "false", whichever has the higher logit as the first word of the answer."""
    true, false = (
        tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("true", "false")
    )
    if true == false:
        raise ValueError('the tokenizer does not tell "true" from "false"')
    start = [model.config.decoder_start_token_id, model.config.bos_token_id]
    rows = len(encoded["input_ids"])
    logits = model(
        **model.encode(**encoded),
        decoder_input_ids=torch.tensor([start] * rows, device=model.device),
    ).logits[:, -1]
    return ["true" if row[true] > row[false] else "false" for row in logits]


def summary(
    rows: Iterable[Mapping[str, Any]],
    references: Mapping[str, Sequence[str]],
    caption_tokenizer: str = "ptb",
) -> dict[str, float | str]:
    """vqa_accuracy, gqa_accuracy, nlvr_accuracy in [0, 1], cider in its own unit (the paper's
    are × 100), average of what there is, and average_without_captions.
    """
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    metrics: dict[str, float | str] = {}
    values = []
    for task in TASKS[:3]:
        if each := by_task.get(task):
            values.append(sum(row["score"] for row in each) / len(each))
            metrics[f"{task}_accuracy"] = values[-1]
    if values:
        metrics["average_without_captions"] = sum(values) / len(values)
    if each := by_task.get("caption"):
        predictions = {row["id"]: row["prediction"] for row in each}
        metrics["cider"], metrics["caption_tokenizer"] = cider(
            predictions, {id: references[id] for id in predictions}, caption_tokenizer
        )
        values.append(metrics["cider"])
    if not values:
        raise ValueError(f"nothing to summarise: no predictions for {', '.join(TASKS)}")
    return metrics | {"average": sum(values) / len(values)}


def vqa_score(prediction: str, humans: Sequence[str]) -> float:
    """Soft accuracy of VQA: mean over the humans of min(1, others who say the same / 3)."""
    if not humans:
        raise ValueError("the list of human answers is empty")
    said = normalised_answer(prediction)
    if len(set(humans)) > 1:  # as the official evaluation, which leaves unanimous ones alone
        humans = [without_punctuation(human) for human in humans]
    agreeing = [human == said for human in humans]
    return sum(min(1, (sum(agreeing) - own) / 3) for own in agreeing) / len(humans)


def normalised_answer(text: str) -> str:
    """VQA's official normalisation: punctuation, numbers, articles, contractions."""
    text = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def without_punctuation(text: str) -> str:
    """VQA's official rule: a mark beside a space vanishes, one inside a word becomes a space.

    In a text with a number such as 1,000 all marks vanish; periods do, unless a digit follows.
    """
    cleaned = text
    for mark in _MARKS:
        beside = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        cleaned = cleaned.replace(mark, "" if beside else " ")
    return re.sub(r"\.(?!\d)", "", cleaned)


def cider(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: str = "ptb",
) -> tuple[float, str]:
    """CIDEr-D by pycocoevalcap, and the tokenizer it was computed with.

    "ptb" is COCO's own (pycocoevalcap's PTBTokenizer, which runs a Java program); where there is
    no Java, and for "simple", `simple_tokens` are used. Values of the two differ slightly.
    """
    if tokenizer not in ("ptb", "simple"):
        raise ValueError(f"caption_tokenizer={tokenizer!r} is unknown: use 'ptb' or 'simple'")
    if tokenizer == "ptb" and shutil.which("java") is None:
        warnings.warn("CIDEr: no Java for the PTB tokenizer, using the simple one", stacklevel=2)
        tokenizer = "simple"
    split = _ptb if tokenizer == "ptb" else _simple
    texts = {id: [text] for id, text in predictions.items()}
    score, _ = Cider().compute_score(split(references), split(texts))
    return float(score), tokenizer


def simple_tokens(text: str) -> list[str]:
    """Lower-case words, hyphenated ones whole, "n't" and "'s" apart, no punctuation."""
    text = re.sub(r"n't\b", " n't", text.lower())
    return re.findall(r"n't|'(?:s|re|ve|ll|d|m)\b|\w+(?:-\w+)*", text)


class EpochScores(TrainerCallback):
    """Metrics before training and after every epoch (Figure 1d), in `folder`/epochs.jsonl.

    evaluate: a path for predictions to metrics. Asks Trainer for its validation loss too, with
    the epoch's last step: as opposed to eval_strategy="epoch" before any checkpoint of that step,
    so that a run that resumes from there lacks neither.
    """

    def __init__(self, folder: Path, epochs: int, evaluate: Callable[[Path], dict[str, Any]]):
        self.folder, self.epochs, self.evaluate = folder, epochs, evaluate
        ids = {f"epoch {n}" for n in range(epochs + 1)}
        self.file = PredictionFile(folder / "epochs.jsonl", ids)

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            self._record(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % (state.max_steps // self.epochs) == 0:
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, **kwargs):
        self._record(round(state.epoch))

    def history(self) -> list[list]:
        """[epoch, metrics], in order."""
        return [[row["epoch"], row["metrics"]] for row in self.file.by_id.values()]

    def _record(self, epoch: int) -> None:
        if (id := f"epoch {epoch}") not in self.file:
            predictions = self.folder / "validation.jsonl"
            metrics = self.evaluate(predictions)
            self.file.append([{"id": id, "epoch": epoch, "metrics": metrics}])
            predictions.unlink()


def _row(item: Item, prediction: str) -> dict[str, Any]:
    row = {"id": item.id, "task": item.task, "prediction": prediction}
    if item.task == "vqa":
        row["score"] = vqa_score(prediction, item.references)
    elif item.task != "caption":
        row["score"] = dict(item.answers).get(prediction, 0.0)
    return row


@contextmanager
def _evaluating(model) -> Iterator[None]:
    """Evaluation mode inside; afterwards the mode that the model was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _ptb(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return PTBTokenizer().tokenize(
        {id: [{"caption": text} for text in each] for id, each in texts.items()}
    )


def _simple(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {id: [" ".join(simple_tokens(text)) for text in each] for id, each in texts.items()}


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = ("a", "an", "the")
_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0", **{word: str(n) for n, word in enumerate(_COUNTED.split())}}
# What the official evaluation writes with all apostrophes where one is missing. (Its entries with
# a capital I never match: words are in lower case by then.)
_SHORTENED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
    you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word
    for word in _SHORTENED.split()
    for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}
