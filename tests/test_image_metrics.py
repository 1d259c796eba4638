"""CMMD against its formula, its interval's coverage, encoders, side columns, damaged images."""

import json
import math
import sys
import types
from functools import partial

import matplotlib
import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.multimodal import CLIPScore
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from oplora.harness.assets import AssetError, ChecksumError, fetch
from oplora.studies.sdxl.cmmd import mmd, mmd_interval
from oplora.studies.sdxl.images import (
    EfficientNetLite0,
    ImageDistance,
    OpenClip,
    TransformersClip,
    clip_and_processor,
    clip_pixels,
    features,
    open_rgb,
    side_metrics,
    square,
)

E = torch.eye(4)


def gaussian(n, d=8, shift=0.0, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def picture(colour=(200, 100, 50), size=(20, 16)):
    return Image.new("RGB", size, colour)


def noise_picture(seed, size=(20, 30)):
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def pictures(n, shift=0):
    return [noise_picture(seed + shift) for seed in range(n)]


def mean_colour(images):
    return torch.tensor(np.array([np.array(image).mean((0, 1)) for image in images]))


# The formula


@pytest.mark.parametrize(
    "x, y, value",
    [
        (E[:2], E[:2], 0.0),
        (E[:1], E[1:2], 19.900332502),
        (E[:1], -E[:1], 39.602653386),
        (E[:2], E[2:], 9.950166251),
    ],
)
def test_check_values_of_the_official_code(x, y, value):
    assert mmd(x, y) == pytest.approx(value, abs=1e-9)
    assert mmd(3 * x, 0.5 * y) == pytest.approx(value, abs=1e-9), "rows are normalised"


def slow_mmd(x, y, sigma, scale):
    """The formula of the paper, one pair at a time."""

    def mean_kernel(a, b):
        kernels = [
            math.exp(-sum((p / math.hypot(*u) - q / math.hypot(*v)) ** 2 for p, q in zip(u, v)) / c)
            for u in a
            for v in b
        ]
        return sum(kernels) / len(kernels)

    x, y, c = x.tolist(), y.tolist(), 2 * sigma**2
    return scale * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


@pytest.mark.parametrize("block", [1, 3, 7, 1024])
@pytest.mark.parametrize("sigma, scale", [(10.0, 1000.0), (0.5, 1.0)])
def test_blocks_equal_the_literal_formula(block, sigma, scale):
    x, y = gaussian(7).double(), gaussian(5, shift=1.0, seed=1).double()
    found = mmd(x, y, sigma=sigma, scale=scale, block=block)
    assert found == pytest.approx(slow_mmd(x, y, sigma, scale), abs=1e-10 * scale)


def test_memory_is_bounded_by_the_block(monkeypatch):
    shapes, expm1 = set(), torch.expm1
    monkeypatch.setattr(torch, "expm1", lambda x: shapes.add(tuple(x.shape)) or expm1(x))
    mmd(gaussian(250), gaussian(130), block=100)
    assert max(max(shape) for shape in shapes) == 100


@pytest.mark.parametrize(
    "x, y, message",
    [
        (gaussian(3), gaussian(3, d=9), r"\(3, 8\) and \(3, 9\)"),
        (gaussian(3), gaussian(3)[0], r"\(8,\)"),
        (gaussian(3), gaussian(0), "second set is empty"),
        (gaussian(3).index_fill(0, torch.tensor(2), math.nan), gaussian(3), "row 2 of the first"),
        (gaussian(3), gaussian(3).index_fill(0, torch.tensor(1), math.inf), "row 1 of the second"),
        (gaussian(3).index_fill(0, torch.tensor(0), 0.0), gaussian(3), "row 0 of the first"),
    ],
)
def test_wrong_embeddings_are_named(x, y, message):
    with pytest.raises(ValueError, match=message):
        mmd(x, y)


# The interval


def resample(rows, generator):
    return rows[torch.randint(len(rows), (len(rows),), generator=generator)]


def test_interval_equals_resampling_one_by_one():
    x, y = gaussian(12), gaussian(9, shift=0.7, seed=1)
    generator = torch.Generator().manual_seed(5)
    drawn = torch.tensor(
        [mmd(resample(x, generator), resample(y, generator)) for _ in range(2000)]
    ).double()
    ends = torch.tensor([0.025, 0.975]).double()
    expected = (drawn - drawn.mean() + mmd(x, y)).clamp(min=0).quantile(ends).tolist()
    low, high = mmd_interval(x, y, draws=2000)
    assert (low, high) == pytest.approx(expected, abs=0.06 * (expected[1] - expected[0]))
    assert (low, high) == mmd_interval(x, y, draws=2000), "repeatable"
    assert (low, high) == pytest.approx(mmd_interval(x, y, draws=2000, block=5), abs=1e-9)


@pytest.mark.parametrize("n, d, shift", [(40, 8, 1.0), (60, 64, 0.4)])
def test_interval_covers_the_expected_value(n, d, shift):
    """About 95% of the intervals hold the mean of all values, and they are not too wide.

    Percentiles of the same draws as they are hold it in a few per cent of cases at d = 64.
    """
    pairs = [(gaussian(n, d, 0.0, seed), gaussian(n, d, shift, 1000 + seed)) for seed in range(200)]
    values = torch.tensor([mmd(x, y) for x, y in pairs])
    ends = [mmd_interval(x, y, draws=200, seed=seed) for seed, (x, y) in enumerate(pairs)]
    low, high = torch.tensor(ends).T
    covered = ((low <= values.mean()) & (values.mean() <= high)).float().mean()
    assert 0.9 <= covered <= 0.99
    width = (high - low).mean().item()
    assert width == pytest.approx(2 * 1.96 * values.std().item(), rel=0.2)


def test_interval_needs_two_of_each():
    with pytest.raises(ValueError, match="3 and 1 images"):
        mmd_interval(gaussian(3), gaussian(1))


# Images as encoders see them


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_transparency_lies_on_white(tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    Image.new("RGBA", (4, 4), (255, 0, 0, 51)).save(path, lossless=True)  # a fifth of red
    rgb = open_rgb(path)
    assert rgb.mode == "RGB" and rgb.getpixel((1, 1)) == (255, 204, 204)


def test_every_mode_becomes_rgb():
    grey = Image.new("LA", (2, 2), (0, 0))
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30])
    assert open_rgb(grey).getpixel((0, 0)) == (255, 255, 255)
    assert open_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
    palette.info["transparency"] = 0
    assert open_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    assert open_rgb(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_square_keeps_the_centre():
    stripes = np.zeros((10, 31, 3), dtype=np.uint8)
    stripes[:, 10:20] = (0, 255, 0)
    wide = Image.fromarray(stripes)
    assert np.array(square(wide, 10)).tolist() == stripes[:, 10:20].tolist()
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    assert (np.array(square(tall, 5))[..., 1] > 0).all()


def test_clip_pixels_are_normalised_as_clip_was_trained():
    pixels = clip_pixels([picture((255, 0, 0))], 8)
    assert pixels.shape == (1, 3, 8, 8) and pixels.dtype == torch.float32
    expected = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, -0.40821073 / 0.27577711]
    assert pixels[0, :, 3, 3].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_file_is_named(tmp_path, suffix):
    good, cut, other = (tmp_path / f"{name}.{suffix}" for name in ("good", "cut", "other"))
    noise_picture(0).save(good)
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    other.write_text("not an image")
    assert features([good], mean_colour).shape == (1, 3)
    for bad in (cut, other):
        with pytest.raises(ValueError, match=bad.name):
            features([good, bad], mean_colour)
    with pytest.raises(FileNotFoundError, match="missing"):
        features([good, tmp_path / "missing.png"], mean_colour)


def test_images_without_finite_features_are_named(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("light", "dark", "grey")]
    for path, value in zip(paths, (255, 0, 128)):
        picture((value,) * 3).save(path)
    with pytest.raises(ValueError, match=r"image 1 \(.*dark\.png\).*NaN"):
        features(paths, lambda images: 1 / mean_colour(images), batch_size=2)
    with pytest.raises(ValueError, match="no images"):
        features([], mean_colour)


def test_a_column_of_a_data_set_is_read_in_batches():
    images, sizes = pictures(5), []
    column = Dataset.from_dict({"image": images}, Features({"image": ImageFeature()}))["image"]

    def encoder(batch):
        sizes.append(len(batch))
        return mean_colour(batch)

    assert torch.equal(features(column, encoder, batch_size=2), mean_colour(images).float())
    assert sizes == [2, 2, 1]


# Distances of sets


def test_distance_is_the_mmd_of_the_features(tmp_path):
    distance = ImageDistance("mmd_colour", mean_colour, batch_size=3)
    generated, reference = pictures(5), [picture(), picture((0, 9, 250)), *pictures(3, 100)]
    x, y = mean_colour(generated), mean_colour(reference)
    low, high = mmd_interval(x, y)
    expected = {"mmd_colour": mmd(x, y), "mmd_colour_low": low, "mmd_colour_high": high}
    assert distance(generated, reference) == pytest.approx(expected, rel=1e-4)
    once = distance.features(reference)
    assert distance(generated, once) == distance(generated, reference)


def test_floor_compares_disjoint_halves():
    """Rows e1 … e6: whatever the halves are, they share no image: 10 (1/3 + 1/3) less rounding."""
    distance = ImageDistance("m", encoder=None)
    kernel = 1000 * (1 - math.exp(-0.01))  # 1 - k of orthogonal rows
    assert distance.floor(torch.eye(6)) == pytest.approx(kernel * 2 / 3)
    rows = gaussian(20)
    assert distance.floor(rows) == distance.floor(rows) != distance.floor(rows, seed=1)


def test_too_few_images_are_refused():
    distance = ImageDistance("cmmd", mean_colour)
    with pytest.raises(ValueError, match=r"cmmd: 1 reference image\(s\), at least 2"):
        distance(pictures(2), pictures(1))
    with pytest.raises(ValueError, match=r"3 floor's image\(s\), at least 4"):
        distance.floor(pictures(3))


# Encoders


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP with its processor, on disk."""
    path = tmp_path_factory.mktemp("clip")
    letters = [chr(i) for i in range(97, 123)]
    tokens = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"))
    side = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ends = dict(bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1, pad_token_id=0)
    text = dict(**side, **ends, vocab_size=len(tokens), max_position_embeddings=16)
    vision = dict(**side, image_size=16, patch_size=8, projection_dim=8)
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(path)
    crop = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(CLIPImageProcessorPil(**crop), tokenizer).save_pretrained(path)
    return path


def test_both_clips_see_the_same_pixels(clip, monkeypatch):
    model = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    images = pictures(3)
    with torch.no_grad():
        expected = model(clip_pixels(images, 16)).image_embeds
    assert torch.equal(features(images, TransformersClip(clip), batch_size=8), expected)

    def create_model(name, pretrained, force_quick_gelu):
        assert (name, pretrained, force_quick_gelu) == ("ViT-L-14-336", "openai", True)
        module = nn.Module()
        module.visual = types.SimpleNamespace(image_size=(16, 16))
        module.encode_image = lambda pixels: model(pixels).image_embeds
        return module

    stub = types.SimpleNamespace(create_model=create_model)
    monkeypatch.setitem(sys.modules, "open_clip", stub)
    assert torch.equal(features(images, OpenClip(), batch_size=8), expected)


def test_missing_packages_name_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[paper\]'"):
        OpenClip()
    with pytest.raises(ImportError, match=r"pip install -e '\.\[small\]'"):
        EfficientNetLite0(tmp_path)


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch")
    try:
        return EfficientNetLite0(fetch("efficientnet-lite0"), size=224)
    except ChecksumError:
        raise
    except AssetError as error:
        pytest.skip(str(error))


@pytest.mark.assets
def test_efficientnet_recognises_a_photo_and_gets_its_inputs_as_in_training(efficientnet):
    photo = open_rgb(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg")
    model, seen = efficientnet.model, []
    hook = model._conv_stem.register_forward_hook(lambda *a: seen.append(a[-1]))
    pooled = features([photo], efficientnet)
    hook.remove()
    assert pooled.shape == (1, 1280)
    assert model._fc(pooled).argmax().item() == 652  # "military uniform"
    # The network knows how its inputs vary: ImageNet's mean and std would give a ratio of 5.
    norm = model._bn0
    ratio = seen[0].var((0, 2, 3)) / norm.running_var
    assert 0.7 < ratio[norm.running_var > 1e-3].median() < 1.4


# Side columns


class MeanColour(nn.Module):
    num_features = 3

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 299, 299)
        return images.float().mean((2, 3)) / 255


@pytest.mark.filterwarnings("ignore:Metric `Kernel")
def test_fid_and_kid(tmp_path):
    """Two sets of plain colours that differ by a constant: FID is its squared length."""
    colours = [(10, 20, 30), (60, 20, 90), (110, 120, 40), (0, 0, 0)]
    generated = [picture(colour, (9, 8 + i)) for i, colour in enumerate(colours)]
    reference = [picture(tuple(c + 51 for c in colour)) for colour in colours]
    metrics = {
        "fid": FrechetInceptionDistance(feature=MeanColour()),
        "kid": KernelInceptionDistance(feature=MeanColour(), subset_size=3, subsets=4),
    }
    found = side_metrics(generated, reference, ["x"] * 4, metrics, batch_size=3)
    assert found["fid"] == pytest.approx(3 * 0.2**2, rel=1e-3)
    assert set(found) == {"fid", "kid", "kid_std"} and found["kid_std"] > 0
    assert found == side_metrics(generated, reference, ["x"] * 4, metrics), "repeatable"


def test_clip_score_is_the_mean_cosine_with_the_captions(clip):
    images, captions = pictures(3), ["a cat", "b", "the dog"]
    _, processor = clip_and_processor(clip)
    metrics = {"clip_score": CLIPScore(partial(clip_and_processor, clip))}
    found = side_metrics(images, images, captions, metrics)
    cosines = []
    for image, caption in zip(images, captions):
        inputs = processor(images=image, text=caption, return_tensors="pt")
        outputs = CLIPModel.from_pretrained(clip).eval()(**inputs)
        cosines.append(torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds).item())
    assert max(cosines) - min(cosines) > 1e-3
    assert found["clip_score"] == pytest.approx(max(0, 100 * np.mean(cosines)), rel=1e-4)
    with pytest.raises(ValueError, match="3 generated images, but 2 captions"):
        side_metrics(images, images, captions[:2], metrics)
    assert side_metrics(["not read"], [], ["x"], {}) == {}
