"""Items of the four tasks: from upstream's files, and made from easy-vqa's images."""

import json
import random
import re
from collections import Counter, defaultdict
from itertools import chain

import pytest
from tiny_vl import CELLS, SIZE, TASKS, write_records

from oplora.harness.assets import AssetError, ChecksumError, fetch
from oplora.studies.vl_bart import easy_vqa
from oplora.studies.vl_bart.batches import VLItem, check_images
from oplora.studies.vl_bart.grids import H5Grids
from oplora.studies.vl_bart.shape_language import (
    COLORS,
    FAMILIES,
    SHAPES,
    Picture,
    draw,
    facts,
    vqa_family,
)
from oplora.studies.vl_bart.tasks import upstream_sides


@pytest.fixture
def upstream(tmp_path):
    write_records(tmp_path, rows=5)
    return tmp_path


def test_upstream_files(upstream):
    sides = upstream_sides(str(upstream), gqa_validation=0.3)
    train, validation, test = sides["train"], sides["validation"], sides["test"]
    features = "clip_features/data_clip_RN101_att"
    assert train["vqa"][0].answers == () and train["vqa"][1] == VLItem(
        "vqa/karpathy_train/1", "vqa", "is it red?",
        (f"COCO/{features}/COCO_val2014_000000000001",), (("red", 1), ("blue", 0.3)),
    )  # fmt: skip
    assert test["vqa"][0].references == ("red",) * 10
    held = {item.id for item in validation["gqa"]}
    assert held and len(train["gqa"]) + len(held) == 10
    assert not held & {item.id for item in train["gqa"]}
    assert test["gqa"][0].images == (f"GQA/{features}/testdev0",)
    assert train["nlvr"][1] == VLItem(
        "nlvr/train/nlvr2_train_1", "nlvr", "both are red.",
        (f"nlvr/{features}/train1-img0", f"nlvr/{features}/train1-img1"), (("true", 1.0),),
    )  # fmt: skip
    assert train["nlvr"][0].answers == (("false", 1.0),)
    # Two captions an image, restval's with training's; an image is one item of the test.
    assert len(train["caption"]) == 10 and len(validation["caption"]) == len(test["caption"]) == 5
    assert train["caption"][1].answers == (("a red circle 1.", 1.0),)
    assert test["caption"][0].references == ("a red circle 0.", "a red circle 1.")
    every = [i.id for tasks in sides.values() for each in tasks.values() for i in each]
    assert len(set(every)) == len(every)
    grids = H5Grids(str(upstream), CELLS, SIZE)
    check_images((i for tasks in sides.values() for each in tasks.values() for i in each), grids)
    few = upstream_sides(str(upstream), gqa_validation=0.3, items_per_task={"test": 2})
    assert {len(each) for each in few["test"].values()} == {2} and few["train"] == train


def test_without_a_share_of_gqa_for_validation_it_is_left_out_of_it(upstream):
    sides = upstream_sides(str(upstream), gqa_validation=0)
    assert set(sides["validation"]) == {"vqa", "nlvr", "caption"}
    assert len(sides["train"]["gqa"]) == 10 and "gqa" in sides["test"]


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("GQA/testdev.json", lambda r: r[3].update(label={}), r"testdev\.json, record 3.*empty"),
        ("GQA/train.json", lambda r: r[1].pop("img_id"), r"train\.json, record 1 has no 'img_id'"),
        ("nlvr/test.json", lambda r: r[2].update(label=2), r"test\.json, record 2: label 2"),
        ("vqa/karpathy_val.json", lambda r: r[4].update(question_id=9), r"record 4.*question 9"),
        (
            "vqa/v2_mscoco_val2014_annotations.json",
            lambda r: r["annotations"][11].update(answers=[]),
            r"karpathy_test\.json, record 1: question 2001 has no human answers",
        ),
        (
            "COCO/dataset_coco.json",
            lambda r: r["images"][6].update(sentences=[]),
            r"image 6 \(COCO_val2014_000000000001\): the list of captions is empty",
        ),
    ],
)
def test_wrong_records_are_named(upstream, file, edit, message):
    records = json.loads((upstream / file).read_text())
    edit(records)
    (upstream / file).write_text(json.dumps(records))
    with pytest.raises(ValueError, match=message):
        upstream_sides(str(upstream), gqa_validation=0.3)


def test_missing_and_damaged_files_are_named(upstream):
    (upstream / "nlvr/valid.json").write_text("[{")
    with pytest.raises(ValueError, match=r"nlvr/valid\.json is damaged"):
        upstream_sides(str(upstream))
    (upstream / "nlvr/valid.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"nlvr/valid\.json is missing.*VL-Adapter"):
        upstream_sides(str(upstream))


@pytest.mark.parametrize(
    ("question", "answer", "family", "known"),
    [
        ("what is the blue shape?", "circle", "shape", {"blue", "circle"}),
        ("what is the color of the triangle?", "red", "color", {"red", "triangle"}),
        ("is there a gray shape?", "yes", "exists", {"gray"}),
        ("is there a gray shape?", "no", "exists", set()),
        ("is there not a gray shape?", "no", "absent", {"gray"}),
        ("is no circle present?", "yes", "absent", set()),
    ],
)
def test_facts_of_a_question(question, answer, family, known):
    assert vqa_family(question) == family and facts(question, answer) == known


PICTURES = [
    Picture(f"train/{n}", shape, color)
    for n, (shape, color) in enumerate((s, c) for s in SHAPES for c in COLORS)
]
CORNER = {"circle": 0, "triangle": 3, "rectangle": 4}


def truth(family, text, shown):
    """The answer from the text's words, in a way of its own."""
    words = re.findall(r"\w+", text)
    left, right = shown[0], shown[-1]
    named_color = next((w for w in words if w in COLORS), None)
    named_shape = next((w for w in words if w in SHAPES), None)

    def has(picture):
        return named_color in (None, picture.color) and named_shape in (None, picture.shape)

    rules = {
        "choose_color": lambda: left.color,
        "choose_shape": lambda: left.shape,
        "both": lambda: has(left),
        "either": lambda: named_color == left.color or named_shape == left.shape,
        "neither": lambda: named_color != left.color and named_shape != left.shape,
        "corners": lambda: ("zero", "", "", "three", "four")[CORNER[left.shape]],
        "more_corners": lambda: CORNER[left.shape] > CORNER[named_shape],
        "side": lambda: has(left if "left" in words else right),
        "both_images": lambda: has(left) and has(right),
        "neither_image": lambda: not (has(left) or has(right)),
        "one_image": lambda: has(left) + has(right) == 1,
        "same": lambda: (left.color == right.color if "color" in words
                         else left.shape == right.shape),
    }  # fmt: skip
    return rules[family]()


@pytest.mark.parametrize("task", FAMILIES)
def test_made_questions_are_true_balanced_and_answerable(task):
    by_id = {picture.id: picture for picture in PICTURES}
    chance = random.Random(0)
    for family in FAMILIES[task]:
        answers = Counter()
        for _ in range(200):
            text, answer, images = draw(task, family, chance, PICTURES)
            assert len(images) == (2 if task == "nlvr" else 1)
            right = truth(family, text, [by_id[image] for image in images])
            if isinstance(right, bool):
                right = {("gqa", True): "yes", ("gqa", False): "no"}.get(
                    (task, right), str(right).lower()
                )
            assert answer == right, (family, text, images)
            if "choose" in family:
                assert answer in text
            answers[answer] += 1
        assert max(answers.values()) < 130, family


@pytest.fixture(scope="module")
def package():
    try:
        return fetch("easy-vqa")
    except ChecksumError:
        raise
    except AssetError as error:
        pytest.skip(str(error))


@pytest.mark.assets
def test_no_image_is_on_two_sides(package):
    sides = easy_vqa.sides({"train": 300, "validation": 100, "test": 200}, package)
    sides["pretraining"] = easy_vqa.pretraining_items(
        {"vqa": 300, "gqa": 300, "nlvr": 300, "caption": 300}, package
    )
    seen = defaultdict(set)
    for side, tasks in sides.items():
        for item in chain(*tasks.values()):
            for image in item.images:
                seen[image].add(side)
                assert (image.startswith("test/")) == (side == "test")
    assert len(seen) > 1000 and all(len(each) == 1 for each in seen.values())


@pytest.mark.assets
def test_the_base_model_sees_its_families_and_colors_only(package):
    counts = {"vqa": 200, "gqa": 200, "nlvr": 200, "caption": 200}
    made = easy_vqa.pretraining_items(counts, package)
    colors = {p.id: p.color for p in easy_vqa.pictures(package, "pretraining")}
    for task in easy_vqa.TASKS:
        assert len(made[task]) == 200
        for item in made[task]:
            assert {colors[image] for image in item.images} <= set(easy_vqa.SEEN_COLORS)
            words = re.findall(r"\w+", f"{item.text} {item.answers[0][0]}")
            assert not set(words) & set(COLORS) - set(easy_vqa.SEEN_COLORS)
            family = item.id.split("/")[-1 if task == "caption" else 2]
            assert family in easy_vqa.SEEN_FAMILIES[task]
    texts = " ".join(item.answers[0][0] for item in made["text"])
    assert not made["text"][0].images and "<mask>" in made["text"][0].text
    assert all(word in texts for word in (*COLORS, "neither", "exactly", "three corners"))
    assert made == easy_vqa.pretraining_items(counts, package)


@pytest.mark.assets
def test_packaged_items_are_repeatable_and_bounded(package):
    first = easy_vqa.sides({"validation": 50}, package)["validation"]
    assert first == easy_vqa.sides({"validation": 50}, package)["validation"]
    assert set(first) == set(TASKS) and {len(each) for each in first.values()} == {50}
    assert all(len(item.references) == 5 for item in first["caption"])
    with pytest.raises(ValueError, match=r"9999 items of caption for test.*880"):
        easy_vqa.task_items(package, "test", "caption", 9999)
