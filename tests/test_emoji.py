"""Captioned emoji: aligned over styles, split by id, and varied for pretraining."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from tiny_emoji import emoji_packages

from base_models.tiny_sdxl.variants import FILTERS, framed, recoloured, tinted, variants
from oplora.harness.emoji import (
    ALIGNED,
    PICTURES,
    STYLES,
    caption,
    distinct,
    drawn,
    emoji,
    split_of,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    emoji_packages(folder)
    return folder


@pytest.fixture(autouse=True)
def chosen_cache(request, monkeypatch):
    if "assets" not in request.keywords:
        monkeypatch.setenv("OPLORA_CACHE", str(request.getfixturevalue("cache")))


def plain(colour, side=64):
    return Image.new("RGB", (side, side), colour)


def test_styles_share_ids_order_and_captions():
    google = emoji("google", categories=PICTURES)
    assert len(google) > 60 and google.column_names == ["id", "category", "text", "image"]
    assert google[0]["text"] == "thing number 82, things others"  # the lowest sort_order
    for style in ALIGNED[1:]:
        other = emoji(style, categories=PICTURES)
        assert other["id"][:] == google["id"][:] and other["text"][:] == google["text"][:]
        different = [np.any(np.array(a) != np.array(b)) for a, b in zip(*both(google, other))]
        assert all(different)
    assert {image.size for image in google["image"]} == {(64, 64)}
    assert {image.mode for image in google["image"]} == {"RGB"}


def both(first, second):
    return first["image"][:], second["image"][:]


def test_splits_and_categories_partition_the_rows():
    everything = emoji("fluent", categories=PICTURES)["id"][:]
    assert len(set(everything)) == len(everything)
    parts = [
        emoji("fluent", split, [category])["id"][:]
        for split in ("train", "validation")
        for category in PICTURES
    ]
    assert sorted(id for part in parts for id in part) == sorted(everything)
    assert set(emoji("google", "validation")["category"]) <= set(PICTURES[:3])


def test_an_id_is_held_out_by_its_hash():
    expected = {id: hashlib.sha256(id.encode()).hexdigest()[:2] < "1a" for id in ("1f600", "2764")}
    assert {id: split_of(id) == "validation" for id in expected} == expected
    held_out = [split_of(f"id{number}") for number in range(5000)].count("validation")
    assert 420 < held_out < 600  # 26/256 of 5000 is 508


def test_emoji_that_a_style_lacks_are_in_no_aligned_style(tmp_path, monkeypatch):
    records = emoji_packages(tmp_path, per_category=2)
    monkeypatch.setenv("OPLORA_CACHE", str(tmp_path))
    (missing,) = [r for r in records if r["name"] == "THING NUMBER 1"]
    next(tmp_path.glob(f"emoji-fluent-*/**/{missing['unified'].lower()}.webp")).unlink()
    next(tmp_path.glob("emoji-google-2017-*/**/1f002-fe0f.png")).unlink()
    counts = {style: len(emoji(style, categories=PICTURES)) for style in STYLES}
    assert counts == {s: 10 if s == "google2017" else 11 for s in STYLES}
    assert missing["unified"].lower() not in emoji("google", categories=PICTURES)["id"][:]
    shared = emoji("google", categories=PICTURES, also_in="google2017")["id"][:]
    assert shared == emoji("google2017", categories=PICTURES)["id"][:]


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("apple",), "no style is called 'apple'"),
        (("google", "test"), "no split is called 'test'"),
        (("google", None, ["Flags"]), "no category is called 'Flags'"),
        (("google", None, []), "no categories"),
    ],
)
def test_unknown_choices_are_named_with_the_known_ones(arguments, part):
    with pytest.raises(ValueError, match=part):
        emoji(*arguments)


def test_captions_are_name_and_subcategory_in_plain_words():
    record = {"name": "RESCUE WORKER’S HELMET", "subcategory": "arts & crafts"}
    assert caption(record) == "rescue worker's helmet, arts crafts"
    record = {"name": "HEAR-NO-EVIL MONKEY", "subcategory": "monkey-face"}
    assert caption(record) == "hear no evil monkey, monkey face"


def test_images_are_flattened_on_white_and_scaled_with_antialiasing(tmp_path):
    pixels = np.zeros((256, 256, 4), np.uint8)
    pixels[..., 1] = 255  # green, but transparent
    pixels[:, 128:] = (255, 0, 0, 255)
    pixels[:, 192:, :3] = (np.indices((256, 64)).sum(0) % 2 * 255)[..., None]
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True)
    result = np.array(drawn(tmp_path / "a.webp")).astype(int)
    assert (result[:, :28] == 255).all() and (result[:, 36:44] == (255, 0, 0)).all()
    assert (np.abs(result[:, 52:60] - 127) <= 2).all()  # a checkerboard becomes grey
    assert (result[:, 28:36, 1] <= result[:, 28:36, 0]).all()  # hidden green stays hidden
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    half.save(tmp_path / "half.png")
    assert drawn(tmp_path / "half.png").getpixel((5, 5)) == (127, 127, 127)


def test_a_damaged_image_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    with pytest.raises(ValueError, match=r"bad\.png is damaged .* delete"):
        drawn(tmp_path / "bad.png")


def test_near_duplicates_in_any_style_go_like_in_the_slow_reference():
    rng = np.random.default_rng(0)
    rows = [[Image.fromarray(rng.integers(0, 40, (8, 8, 3), np.uint8)) for _ in "ab"]
            for _ in range(30)]  # fmt: skip
    rows[7][1] = rows[3][1]  # the same in the second style only
    kept = []
    for index, row in enumerate(rows):
        distances = [
            np.sqrt(np.mean((np.array(row[style], float) - np.array(rows[k][style], float)) ** 2))
            for k in kept
            for style in (0, 1)
        ]
        if all(distance >= 16.0 for distance in distances):
            kept.append(index)
    assert distinct(rows, least=16.0) == kept and 7 not in kept and len(kept) < 29


SHARES = {"google": 0.3, "google2020": 0.2, "google2017": 0.1, "filtered": 0.2, "others": 0.2}
STILL = dict(coloured=0, mirrored=0, scaled=0, vague=0)


def test_variants_name_their_style_and_depend_on_seed_and_number_only():
    first = list(variants(300, SHARES, **STILL))
    words = [v.text.partition(": ")[0] if ":" in v.text else "" for v in first]
    assert set(words) <= {"", "flat", "blob", *FILTERS}
    for word, share in {"": 0.5, "flat": 0.2, "blob": 0.1}.items():
        assert words.count(word) / 300 == pytest.approx(share, abs=0.08)
    again = list(variants(100, SHARES, **STILL))
    assert all(a.text == b.text and a.image == b.image for a, b in zip(again, first[:100]))
    moved = list(variants(100, SHARES, **STILL, seed=1))
    assert [v.text for v in moved] != [v.text for v in again]
    validation = set(emoji("google", "validation", PICTURES)["text"])
    assert validation and not validation & {v.text for v in first}
    google = emoji("google")
    originals = {text: image.tobytes() for text, image in zip(google["text"], google["image"])}
    unchanged = [v for v in first if v.text in originals]
    assert unchanged and all(originals[v.text] == v.image.tobytes() for v in unchanged)


def test_scaled_variants_carry_their_micro_conditioning():
    options = STILL | {"scaled": 1.0}
    sides = set()
    for variant in variants(60, {"google": 1.0}, **options):
        height, width, top, left, *target = variant.time_ids
        assert height == width and target == [64, 64]
        assert max(top, left) <= max(0, height - 64) and min(top, left) >= 0
        sides.add(height)
    assert min(sides) < 56 and max(sides) > 74
    vague = [v.text for v in variants(5, {"google": 1.0}, **STILL | {"vague": 1.0})]
    assert vague == ["things others"] * 5


def test_framed_crops_or_centres():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    assert framed(image, 64).tobytes() == image.tobytes()
    large = image.resize((70, 70), Image.Resampling.LANCZOS)
    assert framed(image, 70, 6, 1).tobytes() == large.crop((1, 6, 65, 70)).tobytes()
    small = np.array(framed(plain("black"), 60))
    assert (small[2:62, 2:62] == 0).all() and small.sum() == 255 * 3 * (64 * 64 - 60 * 60)


@pytest.mark.parametrize("name", FILTERS)
def test_filters_change_the_image_but_not_the_white_ground(name):
    image = plain("white")
    for n in range(8):
        image.paste((200 - 20 * n, 120, 20 * n), (16 + 4 * n, 16, 20 + 4 * n, 48))
    result = FILTERS[name](image)
    assert result.size == (64, 64) and result.mode == "RGB"
    assert min(result.getpixel((2, 2))) >= 250
    assert result.tobytes() != image.tobytes()


def test_tints_and_colours():
    half = tinted("red")(plain((0, 0, 0)))  # black becomes red, mixed with the original
    assert half.getpixel((0, 0)) == (127, 0, 0)
    draw = np.random.default_rng(0)
    assert recoloured(plain((90, 90, 90)), draw).getpixel((0, 0)) == (90, 90, 90)
    assert recoloured(plain((250, 160, 30)), draw).getpixel((0, 0)) != (250, 160, 30)


def test_wrong_shares_are_refused():
    with pytest.raises(ValueError, match="'ggl'"):
        next(variants(1, {"ggl": 1.0}, **STILL))
    with pytest.raises(ValueError, match=r"sum to 0\.9"):
        next(variants(1, {"google": 0.9}, **STILL))


@pytest.mark.assets
def test_the_real_emoji():
    styles = {style: emoji(style) for style in STYLES}
    google = styles["google"]
    assert 400 < len(google) < 450
    for style in ALIGNED:
        assert styles[style]["id"][:] == google["id"][:]
    assert set(styles["google2017"]["id"][:]) < set(google["id"][:])
    texts = google["text"][:]
    assert len(set(texts)) == len(texts) and texts[0] == "grinning face, face smiling"
    for word in ("google", "fluent", "twemoji", "microsoft", "3d", "flag", "skin tone", "family"):
        assert not any(word in text for text in texts)
    with_white_ground = [image.getpixel((0, 0)) == (255, 255, 255) for image in google["image"]]
    assert np.mean(with_white_ground) > 0.95
    assert json.dumps(texts).isascii()
