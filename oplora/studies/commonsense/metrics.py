"""Evaluation on the commonsense tasks (Table 2): generated answers, or option likelihoods."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oplora.harness.predictions import PredictionFile
from oplora.studies.commonsense.choices import in_rows, pack, question_tree, row_logprobs

# What counts as an answer in a generated text, as in LLM-Adapters' evaluation.
ANSWERS = {
    "boolq": re.compile("true|false"),
    "piqa": re.compile("solution[12]"),
    "siqa": re.compile("answer[1-5]"),
    "hellaswag": re.compile("ending[1-4]"),
    "winogrande": re.compile("option[12]"),
    "arc_easy": re.compile("answer[1-5]"),
    "arc_challenge": re.compile("answer[1-5]"),
    "openbookqa": re.compile("answer[1-5]"),
}
RESPONSE = "### Response:"


class Question(Protocol):
    """What is read of an example; the text of choice k is `prompt + choices[k]`."""

    id: str
    task: str
    prompt: str
    choices: Sequence[str]
    answer: int  # index of the correct choice


def extract_answer(task: str, text: str) -> str:
    """The first allowed answer after the last "### Response:", case-sensitive; "" if none.

    Upstream looks for substrings, so "answer10" counts as "answer1".
    """
    if task not in ANSWERS:
        raise ValueError(f"no answers are known for task {task!r}: use one of {list(ANSWERS)}")
    found = ANSWERS[task].search(text.rpartition(RESPONSE)[2])
    return found.group() if found else ""


def evaluate_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    path: str | Path,
    *,
    num_beams: int = 4,
    max_new_tokens: int = 32,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Generate answers by beam search and compare what is extracted from them.

    Rows of `path` have id, task, answer and prediction ("" if none), correct, and the text.
    """
    answers = {q.id: extract_answer(q.task, q.choices[q.answer]) for q in questions}
    if unnamed := [id for id, answer in answers.items() if not answer]:
        raise ValueError(f"{unnamed[0]} has no answer to look for: use the paper's prompts")
    file = PredictionFile(path, answers)
    todo = [question for question in questions if question.id not in file]
    with (
        _evaluating(model),
        tqdm(
            total=len(questions), initial=len(questions) - len(todo), desc="Generating", unit="item"
        ) as bar,
    ):
        for first in range(0, len(todo), batch_size):
            batch = todo[first : first + batch_size]
            prompts = [question.prompt for question in batch]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
            outputs = model.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
            file.append(
                [_generated(q, answers[q.id], text) for q, text in zip(batch, texts, strict=True)]
            )
            bar.update(len(batch))
    return [file.by_id[question.id] for question in questions]


def evaluate_loglikelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    path: str | Path,
    *,
    length: str = "tokens",
    tokens_per_row: int = 256,
) -> list[dict[str, Any]]:
    """Predict the choice of the highest log-likelihood per unit of `length`.

    `length` is "tokens", "characters" or "none" (sum). Rows of `path` have id, task, answer and
    prediction (indices), correct, and for every choice the sum of log-probabilities and the
    number of tokens. Between two writes lies one row of at most `tokens_per_row` tokens.
    """
    if length not in ("tokens", "characters", "none"):
        raise ValueError(f"length={length!r} is unknown: use 'tokens', 'characters' or 'none'")
    if single := [question.id for question in questions if len(question.choices) < 2]:
        raise ValueError(f"{single[0]} has one choice only: score it with evaluate_generate")
    file = PredictionFile(path, {question.id for question in questions})
    todo = [question for question in questions if question.id not in file]
    trees = (question_tree(tokenizer, question.prompt, question.choices) for question in todo)
    left = iter(todo)
    with (
        _evaluating(model),
        tqdm(
            total=len(questions), initial=len(questions) - len(todo), desc="Scoring", unit="item"
        ) as bar,
    ):
        for group in in_rows(trees, tokens_per_row):
            scores = row_logprobs(model, pack(group))
            file.append([_chosen(next(left), choices, length) for choices in scores])
            bar.update(len(group))
    return [file.by_id[question.id] for question in questions]


def held_out_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    tokens_per_row: int = 256,
) -> float:
    """Mean negative log-likelihood of the correct choices' tokens, in nats per token.

    The number that `summary` gives, at the cost of one choice per question.
    """
    trees = (question_tree(tokenizer, q.prompt, [q.choices[q.answer]]) for q in questions)
    scored = []
    with (
        _evaluating(model),
        tqdm(total=len(questions), desc="Held-out loss", unit="item", leave=False) as bar,
    ):
        for group in in_rows(trees, tokens_per_row):
            scored += [choice for (choice,) in row_logprobs(model, pack(group))]
            bar.update(len(group))
    return -torch.cat(scored).mean().item()


def summary(predictions: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of an evaluation's rows, each also by task ("accuracy_piqa").

    accuracy: mean over tasks, as in Table 2. held_out_nll (from likelihoods only): mean negative
    log-likelihood of the correct choices' tokens over all items, in nats per token.
    """
    rows = list(predictions)
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    accuracies = {
        task: sum(row["correct"] for row in each) / len(each) for task, each in by_task.items()
    }
    metrics = {"accuracy": sum(accuracies.values()) / len(accuracies)}
    metrics |= {f"accuracy_{task}": accuracy for task, accuracy in accuracies.items()}
    if all("logprobs" in row for row in rows):
        metrics["held_out_nll"] = _nll(rows)
        metrics |= {f"held_out_nll_{task}": _nll(each) for task, each in by_task.items()}
    return metrics


def _nll(rows: Sequence[Mapping[str, Any]]) -> float:
    """Negative log-likelihood per token of the correct choices of all rows."""
    total = sum(row["logprobs"][row["answer"]] for row in rows)
    return -total / sum(row["tokens"][row["answer"]] for row in rows)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside; afterwards the mode that the model was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _generated(question: Question, answer: str, text: str) -> dict[str, Any]:
    prediction = extract_answer(question.task, text)
    return {
        "id": question.id,
        "task": question.task,
        "answer": answer,
        "prediction": prediction,
        "correct": prediction == answer,
        "text": text.rpartition(RESPONSE)[2].strip(),
    }


def _chosen(question: Question, choices: Sequence[torch.Tensor], length: str) -> dict[str, Any]:
    sums = [choice.sum().item() for choice in choices]
    tokens = [len(choice) for choice in choices]
    characters = [len(choice) for choice in question.choices]
    divisors = {"tokens": tokens, "characters": characters, "none": [1] * len(sums)}[length]
    rates = [total / divisor for total, divisor in zip(sums, divisors, strict=True)]
    prediction = rates.index(max(rates))
    return {
        "id": question.id,
        "task": question.task,
        "answer": question.answer,
        "prediction": prediction,
        "correct": prediction == question.answer,
        "logprobs": [round(total, 4) for total in sums],
        "tokens": tokens,
    }
