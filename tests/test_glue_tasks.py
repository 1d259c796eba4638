"""GLUE's data and metrics: what is on which side, and scores counted by hand."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tiny_roberta import COLUMNS, save_encoder, save_glue, save_packaged
from transformers import AutoTokenizer, DataCollatorWithPadding

from oplora.harness.entry import CONFIGS
from oplora.studies.glue.metrics import evaluate, scores
from oplora.studies.glue.model import load
from oplora.studies.glue.tasks import (
    Example,
    distinct,
    encode,
    hub_sides,
    packaged_sides,
    split_rows,
)

SHARES = {"train": 0.5, "validation": 0.2, "test": 0.3}


def metrics_of(task):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("glue", [f"task={task}"])
    assert list(cfg.task.columns) == COLUMNS[task]
    return instantiate(cfg.task.metrics)


def found(task, predictions, labels):
    rows = [{"prediction": p, "label": y, "loss": 0.5} for p, y in zip(predictions, labels)]
    return scores(rows, metrics_of(task))


def test_classes_by_hand():
    # two true positives, one true negative, a false one of each kind
    predictions, labels = [1, 1, 0, 0, 1], [1, 1, 1, 0, 0]
    mrpc, cola = found("mrpc", predictions, labels), found("cola", predictions, labels)
    assert mrpc["accuracy"] == mrpc["score"] == pytest.approx(3 / 5)
    assert mrpc["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    # (2 · 1 - 1 · 1) / √(3 · 3 · 2 · 2)
    assert cola["matthews"] == cola["score"] == pytest.approx(1 / 6)
    assert mrpc["majority"] == pytest.approx(3 / 5) and mrpc["test_loss"] == 0.5
    assert found("cola", [1, 1, 1], [1, 0, 1])["matthews"] == 0


def test_numbers_by_hand():
    # deviations (-2, -1, 0, 3) and (-1.5, 0.5, -0.5, 1.5); ranks (1, 2, 3, 4) and (1, 3, 2, 4)
    stsb = found("stsb", [1.0, 3.0, 2.0, 4.0], [0.0, 1.0, 2.0, 5.0])
    assert stsb["pearson"] == stsb["score"] == pytest.approx(7 / (14 * 5) ** 0.5)
    assert stsb["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert "majority" not in stsb


@pytest.mark.filterwarnings("ignore:The variance of predictions")
def test_a_correlation_that_does_not_exist_is_left_out():
    assert not {"pearson", "score"} & found("stsb", [1.0, 1.0], [0.0, 1.0]).keys()


@pytest.mark.parametrize("task", ["sst2", "mrpc", "rte"])
def test_packaged_rows_are_split_once_and_share_no_text(tmp_path, task):
    options = dict(task=task, columns=COLUMNS[task], classes=2, shares=SHARES)
    sides = packaged_sides(folder=save_packaged(tmp_path), **options)
    assert [len(sides[side]) for side in SHARES] == [20, 8, 12]
    assert sides == packaged_sides(folder=tmp_path, **options)
    other = packaged_sides(folder=tmp_path, split_seed=1, **options)
    assert {e.id for e in other["test"]} != {e.id for e in sides["test"]}
    texts = [{text for e in rows for text in e.texts} for rows in sides.values()]
    assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]
    for rows in sides.values():  # both classes alike
        assert sum(e.label for e in rows) * 2 == len(rows)


def test_rows_that_share_a_sentence_with_an_earlier_one_are_left_out():
    rows = [Example(str(n), texts, 0) for n, texts in enumerate(
        [("A cat.", "It sleeps"), ("A dog", "it  sleeps!"), ("a dog", "It runs"), ("An owl", "Hu")]
    )]  # fmt: skip
    assert [row.id for row in distinct(rows)] == ["0", "3"]


@pytest.mark.parametrize("shares", [{"train": 0.5, "test": 0.6}, {"train": 1.0, "test": 0.0}])
def test_shares_that_make_no_split_are_refused(shares):
    with pytest.raises(ValueError, match="above 0 and add up to 1"):
        split_rows([], shares, 0)


def test_rows_of_the_hub_and_what_is_held_out_of_them(tmp_path):
    source = str(save_glue(tmp_path / "glue"))
    options = dict(source=source, task="stsb", columns=COLUMNS["stsb"], classes=1)
    plain, held = hub_sides(**options), hub_sides(**options, validation=0.25)
    assert {side: len(rows) for side, rows in plain.items()} == {"train": 24, "test": 8}
    assert [len(held[side]) for side in ("train", "validation", "test")] == [18, 6, 8]
    assert {e.id for e in held["train"] + held["validation"]} == {e.id for e in plain["train"]}
    assert held["test"] == plain["test"] and isinstance(plain["test"][0].label, float)


def test_pairs_are_encoded_together_and_cut(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_encoder(tmp_path))
    rows = [Example("0", ("a cat", "a dog"), 1), Example("1", ("the sun " * 20, "is warm"), 0)]
    first, second = encode(rows, tokenizer, 16)
    assert first["labels"] == 1 and len(second["input_ids"]) == 16
    assert first["input_ids"] == tokenizer("a cat", "a dog")["input_ids"]


def test_an_evaluation_goes_on_where_it_was_cut(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_encoder(tmp_path))
    torch.manual_seed(0)
    model = load(pretrained_model_name_or_path=tmp_path, num_labels=2)
    rows = [Example(str(n), (f"text {n} " * (n + 1),), n % 2) for n in range(5)]
    inputs = (model, DataCollatorWithPadding(tokenizer), rows, encode(rows, tokenizer, 32))
    whole = evaluate(*inputs, tmp_path / "whole.jsonl", batch_size=2)
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join((tmp_path / "whole.jsonl").read_text().splitlines(True)[:3]) + '{"id"')
    assert evaluate(*inputs, cut, batch_size=5) == [
        {**row, "loss": pytest.approx(row["loss"], abs=1e-5)} for row in whole
    ]
    # by itself: padding changes nothing
    with torch.inference_mode():
        logits = model(**tokenizer(rows[3].texts[0], return_tensors="pt")).logits
    loss = -logits.log_softmax(1)[0, 1].item()
    assert json.loads(cut.read_text().splitlines()[3])["loss"] == pytest.approx(loss, abs=1e-5)
