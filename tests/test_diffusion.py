"""SDXL's inputs, loss, export and generation, piece by piece."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDPMScheduler
from peft import LoraConfig
from PIL import Image
from tiny_diffusion import pictures, tiny_pipeline

from oplora.studies.sdxl.diffusion import (
    DenoisingLoss,
    adapter_state,
    crop,
    encode,
    export,
    held_out,
)
from oplora.studies.sdxl.generation import Evaluation, generate, merge, spread

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def images():
    return Dataset.from_dict({"image": pictures(4), "text": ["a", "b", "a b", "c"]})


@pytest.fixture(scope="module")
def encoded(images, tmp_path_factory):
    return encode(images, tiny_pipeline(), tmp_path_factory.mktemp("cache"), resolution=16)


def loss_of(pipeline):
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    return DenoisingLoss(pipeline.unet, scheduler)


def test_crop_scales_the_short_side_and_says_where_it_cut():
    image = Image.new("RGBA", (40, 20))
    square, ids = crop(image, 10)
    assert square.size == (10, 10) and square.mode == "RGB"
    assert ids == [20, 40, 0, 5, 10, 10]  # original size, top left, target size
    drawn = {tuple(crop(image, 10, (0, row))[1][2:4]) for row in range(50)}
    assert {top for top, _ in drawn} == {0} and {left for _, left in drawn} == set(range(11))
    assert crop(image, 10, (0, 3))[1] == crop(image, 10, (0, 3))[1]


def test_encoded_rows_are_what_the_pipeline_computes(images, encoded):
    pipeline = tiny_pipeline()
    row, image = encoded[1], crop(images[1]["image"], 16)[0]
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents = pipeline.vae.encode(pixels).latent_dist
        prompt, _, pooled, _ = pipeline.encode_prompt("b", do_classifier_free_guidance=False)
    factor = pipeline.vae.config.scaling_factor
    torch.testing.assert_close(row["latent_mean"], latents.mean[0] * factor)
    torch.testing.assert_close(row["latent_std"], latents.std[0] * factor)
    torch.testing.assert_close(row["prompt_embeds"], prompt[0])
    torch.testing.assert_close(row["pooled_prompt_embeds"], pooled[0])
    assert row["time_ids"].tolist() == crop(images[1]["image"], 16)[1]


def test_encoding_is_cached_by_content(images, tmp_path):
    pipeline = tiny_pipeline()
    encode(images, pipeline, tmp_path, resolution=16)
    (first,) = tmp_path.glob("*.arrow")
    written = first.stat().st_mtime_ns
    encode(images, pipeline, tmp_path, resolution=16)
    assert first.stat().st_mtime_ns == written and len(list(tmp_path.glob("*.arrow"))) == 1
    pipeline.vae.decoder.conv_out.bias.data.add_(1)
    encode(images, pipeline, tmp_path, resolution=16)
    encode(images.select([1, 0, 2, 3]), pipeline, tmp_path, resolution=16)
    assert len(list(tmp_path.glob("*.arrow"))) == 3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_the_literal_formula(encoded, prediction_type):
    pipeline = tiny_pipeline(prediction_type)
    loss = loss_of(pipeline).eval()
    batch = held_out(encoded, 1)[:2]
    alphas = loss.scheduler.alphas_cumprod
    expected = []
    for i, seed in enumerate(batch["noise_seed"]):
        generator = torch.Generator().manual_seed(int(seed))
        posterior, noise = torch.randn((2, 4, 8, 8), generator=generator)
        t = torch.randint(1000, (), generator=generator)
        x = batch["latent_mean"][i] + batch["latent_std"][i] * posterior
        a, s = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        conditions = {
            "text_embeds": batch["pooled_prompt_embeds"][i : i + 1],
            "time_ids": batch["time_ids"][i : i + 1],
        }
        with torch.no_grad():
            predicted = pipeline.unet(
                (a * x + s * noise)[None], t, batch["prompt_embeds"][i : i + 1],
                added_cond_kwargs=conditions,
            ).sample[0]  # fmt: skip
        target = noise if prediction_type == "epsilon" else a * noise - s * x
        expected.append((predicted - target).square().mean())
    with torch.no_grad():
        measured = loss(**batch)["loss"]
    torch.testing.assert_close(measured, torch.stack(expected).mean())


def test_held_out_rows_never_change_and_training_rows_do(encoded):
    rows = held_out(encoded, 3)
    assert len(rows) == 12 and rows["noise_seed"][:].tolist() == list(range(12))
    loss = loss_of(tiny_pipeline())
    batch = encoded[:4]
    with torch.no_grad():
        assert loss(**rows[:4])["loss"] == loss(**rows[:4])["loss"]
        assert loss(**rows[:4])["loss"] != loss(**rows[4:8])["loss"]
        assert loss(**batch)["loss"] != loss(**batch)["loss"]


def test_checkpoints_hold_what_is_trained_and_nothing_else():
    pipeline = tiny_pipeline()
    pipeline.unet.requires_grad_(False)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    loss = loss_of(pipeline)
    state = loss.state_dict()
    assert state and all("lora_" in name for name in state)
    first = min(state)
    expected = state[first] + 1
    loss.load_state_dict({**state, first: expected.clone()})
    assert torch.equal(loss.state_dict()[first], expected)
    del state[first]
    with pytest.raises(ValueError, match="lacks 1 tensors"):
        loss.load_state_dict(state)


def test_unknown_prediction_type_is_refused():
    pipeline = tiny_pipeline("sample")
    with pytest.raises(ValueError, match="sample"):
        loss_of(pipeline)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", [True, "pissa", "olora"])
def test_export_adds_to_the_untouched_base_what_was_learned(init, use_rslora, encoded, tmp_path):
    pipeline = tiny_pipeline()
    unet = pipeline.unet.requires_grad_(False)
    options = dict(init_lora_weights=init, use_rslora=use_rslora)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, **options))
    initial = adapter_state(unet)
    torch.manual_seed(0)
    for parameter in (p for p in unet.parameters() if p.requires_grad):
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    export(unet, tmp_path, initial)
    merge(unet)
    other = tiny_pipeline()
    other.load_lora_weights(tmp_path)
    conditions = {"text_embeds": torch.ones(1, 16), "time_ids": torch.ones(1, 6)}
    inputs = torch.ones(1, 4, 8, 8), 3, torch.ones(1, 5, 32)
    with torch.no_grad():
        merged, loaded, plain = (
            p.unet(*inputs, added_cond_kwargs=conditions).sample
            for p in (pipeline, other, tiny_pipeline())
        )
    torch.testing.assert_close(loaded, merged, atol=1e-5, rtol=1e-4)
    assert (plain - merged).abs().max() > 1e-2


def test_images_depend_on_their_row_alone_and_are_not_drawn_twice(encoded, tmp_path):
    pipeline = tiny_pipeline()
    options = dict(resolution=16, steps=2, guidance_scale=2.0)
    together = generate(pipeline, encoded, [0, 1, 3], tmp_path / "a", batch_size=3, **options)
    alone = generate(pipeline, encoded, [3], tmp_path / "b", batch_size=1, **options)
    assert [path.name for path in together] == ["00000.png", "00001.png", "00003.png"]
    difference = np.array(Image.open(together[2])).astype(int) - np.array(Image.open(alone[0]))
    assert np.abs(difference).max() <= 1
    Image.new("RGB", (16, 16), "red").save(together[1])
    generate(pipeline, encoded, [0, 1, 3], tmp_path / "a", batch_size=3, **options)
    assert Image.open(together[1]).getpixel((0, 0)) == (255, 0, 0)


def test_captions_and_references_must_match(images, encoded, tmp_path):
    with pytest.raises(ValueError, match="4 training captions but 3 reference"):
        Evaluation(
            tiny_pipeline(), encoded, images.select(range(3)), tmp_path, generate={}, distance=None
        )


def test_spread():
    assert spread(10, 3) == [0, 3, 6] and spread(3, None) == [0, 1, 2]
    assert spread(3, 7) == [0, 1, 2, 3, 4, 5, 6]  # captions 0, 1, 2, 0, 1, 2, 0
    with pytest.raises(ValueError, match="0 images wanted: at least 1"):
        spread(10, 0)
