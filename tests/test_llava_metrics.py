"""Answers searched for a class: labels that contain each other, resumed predictions."""

import json
import math

import pytest
import torch
from tiny_llava import PROMPT, SIDE, TOKENS, tiny_llava, tokenizer_with_image

from oplora.studies.llava_cars.metrics import (
    evaluate,
    exact_match,
    found_label,
    guesses,
    label_nll,
    summary,
)
from oplora.studies.llava_cars.naming import NamingCollator, Picture

LABELS = ["dog", "hot dog", "cat", "2012 Audi S4 Sedan", "2012 Audi S4", "ox"]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("hot dog", "hot dog"),  # contains dog: the longest wins
        ("It is a HOT DOG, not a cat.", "hot dog"),
        ("a dog that is hot", "dog"),
        ("a 2012 Audi S4 Sedan", "2012 Audi S4 Sedan"),
        ("a 2012 audi s4.", "2012 Audi S4"),
        ("a cat and a dog", "cat"),  # equally long: the first in the text
        ("a dog and a cat", "dog"),
        ("a fox", None),  # ox is no word of it
        ("dogs", None),
        ("", None),
    ],
)
def test_found_label(text, label):
    assert found_label(text, LABELS) == label


def test_exact_match_ignores_case_and_surrounding_space_only():
    assert exact_match(" Hot Dog\n", "hot dog")
    assert not exact_match("a hot dog", "hot dog") and not exact_match("hot dog.", "hot dog")


def test_summary_by_hand():
    rows = [
        {"label": "dog", "prediction": "a dog", "found": "dog", "nll": 1.0},
        {"label": "dog", "prediction": "hot dog", "found": "hot dog", "nll": 2.0},
        {"label": "cat", "prediction": "Cat", "found": "cat", "nll": 0.0},
        {"label": "ox", "prediction": "fox", "found": None, "nll": 5.0},
    ]
    assert summary(rows) == {"accuracy": 0.5, "exact_accuracy": 0.25, "test_nll": 2.0}
    with pytest.raises(ValueError, match="no predictions"):
        summary([])


def test_guesses_by_hand():
    train, test = ["a", "b", "b", "c"], ["b", "a", "a", "a"]
    assert guesses(train, test, ["a", "b", "c", "d"]) == {"chance": 0.25, "majority": 0.25}


@pytest.fixture
def parts():
    tokenizer = tokenizer_with_image()
    pictures = [
        Picture(f"test/{n}", label, torch.randn(3, SIDE, SIDE, generator=torch.manual_seed(n)))
        for n, label in enumerate(["cat", "the sun", "milk", "cat", "water"])
    ]
    collator = NamingCollator(tokenizer, PROMPT, "<image>", TOKENS, cutoff=100)
    return tiny_llava(), tokenizer, collator, pictures


def test_nll_of_a_batch_is_that_of_every_item_alone(parts):
    model, tokenizer, collator, pictures = parts
    losses = label_nll(model, collator, pictures)
    for picture, loss in zip(pictures, losses):
        batch = collator([picture])
        with torch.no_grad():
            logits = model(
                input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]
            ).logits[0].log_softmax(-1)  # fmt: skip
        target = tokenizer(f" {picture.label}<eos>")["input_ids"]
        first = batch["input_ids"].shape[1] - len(target)
        slow = [-logits[first + n - 1, id].item() for n, id in enumerate(target)]
        assert loss == pytest.approx(sum(slow) / len(slow), abs=1e-4)
        with torch.no_grad():  # and what training lowers, but for the weights of items
            assert model(**batch).loss.item() == pytest.approx(loss, abs=1e-4)


def test_evaluation_goes_on_and_equals_an_undisturbed_one(parts, tmp_path):
    model, tokenizer, collator, pictures = parts

    def scored(path):
        options = dict(batch_size=2, max_new_tokens=3)
        return evaluate(model, tokenizer, collator, pictures, ["cat", "milk"], path, **options)

    calm = scored(tmp_path / "calm.jsonl")
    lines = (tmp_path / "calm.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:3]) + lines[3][:10])
    assert scored(tmp_path / "cut.jsonl") == calm
    assert (tmp_path / "cut.jsonl").read_text() == "".join(lines)
    rows = [json.loads(line) for line in lines]
    assert [row["label"] for row in rows] == [p.label for p in pictures]
    assert calm["test_nll"] == pytest.approx(math.fsum(row["nll"] for row in rows) / 5)
    assert not model.training
