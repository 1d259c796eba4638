"""Stanford Cars' folder, labelled pictures, their tensors, and emoji to be named."""

import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Images
from tiny_emoji import emoji_packages
from tiny_llava import CLASSES, PROMPT, SIDE, TOKENS, photo, tokenizer_with_image, write_cars
from transformers import LlavaImageProcessorPil

from oplora.studies.llava_cars import cars, emoji_names
from oplora.studies.llava_cars.naming import NamingCollator, Picture, Pictures, opened

SQUARE = {"height": SIDE, "width": SIDE}
PROCESSOR = LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE, do_pad=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def test_folder_of_cars(tmp_path):
    sides = cars.sides(str(write_cars(tmp_path / "cars")), validation=0.4)
    assert {side: len(rows) for side, rows in sides.items()} == {
        "train": 12, "validation": 8, "test": 8
    }  # fmt: skip
    shown = ["2012 Acura RL Sedan", "2007 Audi S4 Sedan", "2012 Audi S4 Sedan", "smart fortwo"]
    for rows in sides.values():
        assert rows.features["label"].names == shown
        assert set(rows["label"]) == {0, 1, 2, 3}
    assert not set(sides["train"]["id"]) & set(sides["validation"]["id"])
    assert sides["test"]["id"] == [f"test/{n}" for n in range(8)]
    plain = cars.sides(str(tmp_path / "cars"), year_first=False)
    assert plain["test"].features["label"].names == CLASSES and "validation" not in plain


def test_pictures_of_every_mode_have_three_channels(tmp_path):
    sides = cars.sides(str(write_cars(tmp_path / "cars")))
    pictures = Pictures(sides["train"], PROCESSOR)
    grey, transparent = pictures[0], pictures[5]
    assert grey.pixel_values.shape == transparent.pixel_values.shape == (3, SIDE, SIDE)
    assert pictures.labels.count("smart fortwo") == 5 and transparent.label == "2007 Audi S4 Sedan"
    assert len(list(pictures)) == len(pictures) == 20


def test_what_is_transparent_is_white():
    content = io.BytesIO()
    Images.new("RGBA", (4, 4), (200, 0, 0, 0)).save(content, "PNG")
    image = opened("x", {"bytes": content.getvalue(), "path": None})
    assert np.asarray(image).min() == 255


def test_truncated_jpeg_is_named(tmp_path):
    folder = write_cars(tmp_path / "cars")
    content = io.BytesIO()
    photo(1).resize((200, 200)).save(content, "JPEG")
    (folder / "train" / CLASSES[0] / "9.jpg").write_bytes(content.getvalue()[:-400])
    pictures = Pictures(cars.sides(str(folder))["train"], PROCESSOR)
    with pytest.raises(ValueError, match="train/5: the image is damaged"):
        pictures[5]


def stored(folder, train, test, label):
    """A copy of a data set with the labels given, as the hub has them."""
    features = Features(image=Image(), label=label)
    DatasetDict(
        {
            split: Dataset.from_dict(
                {"image": [photo(n) for n in range(len(labels))], "label": labels}, features
            )
            for split, labels in (("train", train), ("test", test))
        }
    ).save_to_disk(folder / "saved")
    for split in ("train", "test"):
        part = Dataset.load_from_disk(folder / "saved" / split)
        part.to_parquet(folder / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder / "hub")


def test_label_that_is_not_in_the_class_list_is_named(tmp_path):
    source = stored(tmp_path, ["a", "b"], ["b", "c"], Value("string"))
    with pytest.raises(ValueError, match="test/1: label 'c' is not among the 2 classes"):
        cars.sides(source)


def test_missing_label_is_named(tmp_path):
    source = stored(tmp_path, [0, 1, 1], [0, -1], ClassLabel(names=["a", "b"]))
    with pytest.raises(ValueError, match="test/1: label -1 is not among the 2 classes"):
        cars.sides(source)


def test_wrong_sources_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        cars.sides(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"validation=1\.5"):
        cars.sides(str(tmp_path), validation=1.5)
    source = stored(tmp_path, [0, 1], [0, 1], ClassLabel(names=["Cat", "cat"]))
    with pytest.raises(ValueError, match="'Cat' is there twice"):
        cars.sides(source)


@pytest.mark.parametrize(
    ("name", "front"),
    [
        ("Acura RL Sedan 2012", "2012 Acura RL Sedan"),
        ("2012 Acura RL Sedan", "2012 Acura RL Sedan"),
        ("smart fortwo", "smart fortwo"),
        ("2012", "2012"),
    ],
)
def test_year_to_front(name, front):
    assert cars.year_to_front(name) == front


def collator():
    return NamingCollator(tokenizer_with_image(), PROMPT, "<image>", TOKENS, cutoff=100)


def test_only_the_label_has_loss_and_ends_at_the_last_position():
    tokenizer = tokenizer_with_image()
    pictures = [
        Picture("1", "cat", torch.zeros(3, 2, 2)),
        Picture("2", "the sun", torch.ones(3, 2, 2)),
    ]
    batch = collator()(pictures)
    trained = [row[row != -100] for row in batch["labels"]]
    assert [tokenizer.decode(row) for row in trained] == [" cat<eos>", " the sun<eos>"]
    kept, length = batch["labels"].shape[1], batch["input_ids"].shape[1]
    assert kept == 1 + max(map(len, trained))
    assert batch["logits_to_keep"].tolist() == list(range(length - kept, length))
    whole = [row[mask == 1] for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
    assert tokenizer.decode(whole[0]) == "<image>" * TOKENS + " What is it? cat<eos>"
    for ids, row in zip(batch["input_ids"], trained):
        assert ids[-len(row) :].equal(row)
    assert batch["pixel_values"].shape == (2, 3, 2, 2)


def test_prompts_are_what_training_rows_begin_with():
    picture = Picture("1", "cat", torch.zeros(3, 2, 2))
    ids = collator().prompts([picture])["input_ids"][0]
    assert collator()([picture])["input_ids"][0, : len(ids)].equal(ids)


def test_prompt_without_the_image_is_refused():
    with pytest.raises(ValueError, match="exactly once"):
        NamingCollator(tokenizer_with_image(), "What is it?", "<image>", TOKENS, 100)


def test_emoji_sides(tmp_path, monkeypatch):
    emoji_packages(tmp_path / "cache")
    sides = emoji_names.sides(classes=5, copies=3, seed=0)
    assert {side: len(rows) for side, rows in sides.items()} == {
        "train": 5 * 2 * 3, "validation": 5, "test": 5
    }  # fmt: skip
    styles = {side: {id.split("/")[0] for id in rows["id"]} for side, rows in sides.items()}
    assert styles == {
        "train": {"google", "twemoji"}, "validation": {"google2017"}, "test": {"fluent"}
    }  # fmt: skip
    train = Pictures(sides["train"], PROCESSOR)
    assert sorted(train.labels[::3]) == sorted(2 * train.classes)
    first, second = train[0].pixel_values, train[1].pixel_values
    assert not first.equal(second)  # augmented
    again = emoji_names.sides(classes=5, copies=3, seed=0)
    assert again["train"][:]["image"] == sides["train"][:]["image"]
    other = emoji_names.sides(classes=5, copies=3, seed=1)["train"]
    assert other[0]["image"] == sides["train"][0]["image"] != other[1]["image"]


def test_the_base_model_is_not_told_the_names_of_the_classes(tmp_path):
    emoji_packages(tmp_path / "cache")
    names = emoji_names.class_names(5)
    rows = list(emoji_names.base_captions(5))
    assert {style for style, *_ in rows} == {"google", "google2020", "twemoji"}
    for _, id, _, caption in rows:
        assert (caption == "things others") == (id in names)
    with pytest.raises(ValueError, match="classes=5000: choose from 2 to "):
        emoji_names.class_names(5000)


def test_white_ground_stays_white():
    import random

    image = Images.new("RGB", (64, 64), "white")
    image.paste((200, 30, 30), (24, 24, 40, 40))
    for seed in range(5):
        pixels = np.asarray(emoji_names.augmented(image, random.Random(seed)))
        assert pixels.shape == (64, 64, 3) and (pixels[:3] == 255).all() and pixels.min() < 200
