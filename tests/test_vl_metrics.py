"""VL metrics: official rules and CIDEr by hand, decoding against the plain forward, resumption."""

import json
import math
import shutil

import pytest
import torch
from tiny_vl import TASKS, TinyGrids, items, tiny_tokenizer, tiny_vl_bart

from oplora.studies.vl_bart import metrics as vl
from oplora.studies.vl_bart.batches import VLCollator
from oplora.studies.vl_bart.metrics import (
    cider,
    evaluate,
    normalised_answer,
    simple_tokens,
    summary,
    true_or_false,
    vqa_score,
    without_punctuation,
)

OPTIONS = dict(answer_tokens=6, caption_tokens=8, caption_beams=2, caption_tokenizer="simple")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Red Ball.", "red ball"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("ten a.m.", "10 am"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),  # two apostrophes missing: not in the official table
        ("somebody'd", "somebodyd"),  # a slip in the official table
        ("yes, it is", "yes it is"),  # beside a space a mark vanishes
        ("t-shirt", "t shirt"),  # inside a word it becomes a space
        ("1,000", "1000"),
        ("1,000 t-shirt", "1000 tshirt"),  # a comma in a number: all marks vanish
        ("3.5", "3.5"),
        ("an  apple\n", "apple"),
        ("it's", "it's"),
    ],
)
def test_official_normalisation(text, expected):
    assert normalised_answer(text) == expected


def test_without_punctuation_keeps_case_and_articles():
    assert without_punctuation("The U.S.A., (a)") == "The USA a "  # ")" is beside no space


@pytest.mark.parametrize(
    ("agreeing", "score"),
    # With n of 10 in agreement: n of them see n-1 others, 10-n see n.
    [
        (0, 0),
        (1, 9 * (1 / 3) / 10),
        (2, (2 * (1 / 3) + 8 * (2 / 3)) / 10),
        (3, (3 * (2 / 3) + 7) / 10),
        (4, 1),
        (10, 1),
    ],
)
def test_soft_accuracy(agreeing, score):
    humans = ["red"] * agreeing + [f"colour {n}" for n in range(10 - agreeing)]
    assert vqa_score("Red!", humans) == pytest.approx(score)


def test_humans_are_cleaned_only_where_they_disagree():
    assert vqa_score("t shirt", ["t-shirt"] * 9 + ["coat"]) == 1
    assert vqa_score("t shirt", ["t-shirt"] * 10) == 0
    with pytest.raises(ValueError, match="empty"):
        vqa_score("red", [])


def test_simple_tokens():
    assert simple_tokens("A dog's T-shirt, isn't RED!") == [
        *("a", "dog", "'s", "t-shirt", "is", "n't", "red")
    ]


def test_cider_by_hand():
    # Two images: an n-gram of one image weighs ln 2, a word of both weighs 0.
    references = {"a": ["a red circle", "a blue circle"], "b": ["the dog"]}
    value, name = cider({"a": "A red circle.", "b": "cat"}, references, "simple")
    first = (1 + 1 + 1 + 0) / 4  # the same 1-, 2- and 3-grams; there is no 4-gram
    second = (2 / 3 + 0 + 0 + 0) / 4  # "a" and "circle" of three words
    assert value == pytest.approx(10 * (first + second) / 2 / 2) and name == "simple"
    longer = {"a": ["a red circle here now"], "b": ["the dog"]}
    value, _ = cider({"a": "a red circle", "b": "cat"}, longer, "simple")
    cosines = 3 / math.sqrt(3 * 5) + 2 / math.sqrt(2 * 4) + 1 / math.sqrt(1 * 3)
    penalty = math.exp(-((2 - 4) ** 2) / (2 * 6**2))  # of the numbers of bigrams
    assert value == pytest.approx(10 * penalty * cosines / 4 / 2)
    with pytest.raises(ValueError, match=r"'nltk'.*'simple'"):
        cider({}, {}, "nltk")


def test_without_java_the_simple_tokenizer_is_taken_and_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="Java"):
        _, name = cider({"a": "x", "b": "y"}, {"a": ["x"], "b": ["y"]}, "ptb")
    assert name == "simple"


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java")
def test_ptb_tokenizer_agrees_on_plain_captions():
    references = {"a": ["A red circle.", "a dog's T-shirt"], "b": ["The dog isn't red!"]}
    predictions = {"a": "a red T-shirt", "b": "the dog is red"}
    ptb, name = cider(predictions, references, "ptb")
    assert (ptb, name) == (pytest.approx(cider(predictions, references, "simple")[0]), "ptb")


def test_summary_by_hand():
    rows = [
        {"id": "1", "task": "vqa", "prediction": "red", "score": 0.3},
        {"id": "2", "task": "vqa", "prediction": "blue", "score": 1.0},
        {"id": "3", "task": "gqa", "prediction": "no", "score": 0.0},
        {"id": "4", "task": "nlvr", "prediction": "true", "score": 1.0},
        {"id": "5", "task": "caption", "prediction": "a red circle"},
        {"id": "6", "task": "caption", "prediction": "cat"},
    ]
    references = {"5": ["a red circle"], "6": ["the dog"]}
    metrics = summary(rows, references, "simple")
    assert metrics["vqa_accuracy"] == pytest.approx(0.65)
    assert metrics["average_without_captions"] == pytest.approx((0.65 + 0 + 1) / 3)
    assert metrics["cider"] == pytest.approx(3.75)
    assert metrics["average"] == pytest.approx((0.65 + 0 + 1 + 3.75) / 4)
    assert "cider" not in summary(rows[:4], {})
    with pytest.raises(ValueError, match="nothing"):
        summary([], {})


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_vl_bart()


@pytest.fixture(scope="module")
def collator(tokenizer):
    return VLCollator(tokenizer, TinyGrids(), TASKS)


def test_nlvr_is_read_where_training_has_the_answer(model, tokenizer, collator):
    statements = items({"nlvr": 6})["nlvr"]
    words = [tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("true", "false")]
    batch = collator([[(item, "true", 1.0) for item in statements]])
    position = batch["labels"][0].tolist().index(words[0])
    logits = model(**batch).logits[:, position]
    expected = ["true" if row[words[0]] > row[words[1]] else "false" for row in logits]
    assert true_or_false(model, tokenizer, collator.inputs(statements)) == expected
    for word, answer in zip(words, ("true", "false")):
        model.final_logits_bias[0, word] = 100.0
        assert true_or_false(model, tokenizer, collator.inputs(statements)) == [answer] * 6
        model.final_logits_bias[0, word] = 0.0


def test_greedy_answers_are_the_most_likely_tokens(model, tokenizer, collator):
    questions = items({"gqa": 2})["gqa"]
    inputs = collator.inputs(questions)
    ids = torch.tensor([[2]] * 2)
    while ids.shape[1] < 6:  # without a cache, token by token
        logits = model(**inputs, decoder_input_ids=ids).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    ids[:, -1] = 2  # BART's forced end
    texts = vl.generate(model, tokenizer, inputs, num_beams=1, max_length=6)
    until = [row.tolist()[: row[1:].tolist().index(2) + 1] for row in ids]
    assert texts == [tokenizer.decode(row, skip_special_tokens=True).strip() for row in until]


def test_killed_evaluation_goes_on(model, tokenizer, collator, tmp_path, monkeypatch):
    given = items({"vqa": 5, "gqa": 3, "nlvr": 4, "caption": 3})
    arguments = (model, tokenizer, collator.inputs, given)
    whole = evaluate(*arguments, tmp_path / "whole.jsonl", batch_size=2, **OPTIONS)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 15
    path = tmp_path / "killed.jsonl"
    path.write_text("".join(lines[:3]) + lines[3][:10])  # killed in the second batch
    answered, row = [], vl._row
    monkeypatch.setattr(vl, "_row", lambda item, text: answered.append(item) or row(item, text))
    assert evaluate(*arguments, path, batch_size=2, **OPTIONS) == whole
    assert len(answered) == 15 - 2  # the batch that was cut is done again as a whole
    assert sorted(path.read_text().splitlines()) == sorted("".join(lines).splitlines())
    scores = [json.loads(line) for line in lines]
    assert all(("score" in row) == (row["task"] != "caption") for row in scores)
