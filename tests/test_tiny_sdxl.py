"""The tiny SDXL: a stock pipeline, its losses against literal ones, and its training script."""

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from processes import kill_once
from tiny_emoji import emoji_packages
from torch import nn
from transformers import CLIPTokenizer

from base_models.tiny_sdxl.losses import (
    AutoencoderLoss,
    PretrainingLoss,
    as_floats,
    encode_text,
    random_squares,
    round_trip_psnr,
    standardise,
)
from base_models.tiny_sdxl.pipeline import clip_tokenizer, tiny_sdxl

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = ["grinning face, face smiling", "red apple, food fruit", "cat face, animal mammal"]
SIZES = dict(
    image_size=16, vae_channels=(8, 8), latent_channels=4, unet_channels=(8, 16),
    transformer_layers=(1, 2), time_width=16, head_width=8, text_width=16, text_layers=2,
    text_length=12, vocabulary=560,
)  # fmt: skip


def tiny(**changed) -> StableDiffusionXLPipeline:
    return tiny_sdxl(CAPTIONS, **SIZES | changed)


def drawn(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    draws = [torch.Generator().manual_seed(n) for n in range(2)]
    options = dict(num_inference_steps=2, guidance_scale=3.0, generator=draws) | options
    return np.stack([np.array(x) for x in pipeline(CAPTIONS[:2], **options).images]).astype(int)


def test_it_survives_the_disk_as_fp16_in_stock_diffusers(tmp_path):
    pipeline = tiny()
    before = drawn(pipeline)
    assert before.shape == (2, 16, 16, 3) and before.std() > 1
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path)
    names = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors"}
    loaded = StableDiffusionXLPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    parts = [part for part in loaded.components.values() if isinstance(part, nn.Module)]
    assert len(parts) == 4 and {part.dtype for part in parts} == {torch.float32}
    assert np.abs(drawn(loaded) - before).max() <= 4
    texts = [*CAPTIONS, "quixotic zebra: 17!"]
    assert loaded.tokenizer(texts).input_ids == pipeline.tokenizer(texts).input_ids
    assert loaded.tokenizer_2(texts).input_ids == pipeline.tokenizer(texts).input_ids
    assert loaded.scheduler.to_json_string() == pipeline.scheduler.to_json_string()


def test_it_is_shaped_like_sdxl():
    pipeline = tiny()
    config = pipeline.unet.config
    assert config.addition_embed_type == "text_time" and config.cross_attention_dim == 2 * 16
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    linear = [n for n, m in pipeline.unet.named_modules() if n.endswith(targets)]
    # Transformer layers: 1 + 2 down, 2 in the middle, 2·2 + 2·1 up; each attends twice.
    assert len(linear) == 4 * 2 * (1 + 2 + 2 + 2 * 2 + 2 * 1)
    assert {name.split(".")[0] for name in linear} == {"down_blocks", "mid_block", "up_blocks"}
    training = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert training.config.prediction_type == "v_prediction"
    assert training.alphas_cumprod[-1] == 0  # the last step is pure noise


def test_the_seed_gives_the_weights_and_no_other_state_changes():
    before = torch.get_rng_state()
    first, again, other = tiny(), tiny(), tiny(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        weights = [dict(getattr(p, name).named_parameters()) for p in (first, again, other)]
        assert all(torch.equal(w, weights[1][key]) for key, w in weights[0].items())
        assert any(not torch.equal(w, weights[2][key]) for key, w in weights[0].items())


@pytest.mark.parametrize(
    "sizes, part",
    [
        (dict(transformer_layers=(1,)), r"transformer_layers \(1,\)"),
        (dict(image_size=18), "image_size 18"),
        (dict(unet_channels=(8, 12)), r"unet_channels \[12\]"),
        (dict(vocabulary=500), "vocabulary 500 .* at least 514"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, part):
    with pytest.raises(ValueError, match=part):
        tiny(**sizes)


def test_the_tokenizer_is_clips_and_learns_frequent_words():
    tokenizer = clip_tokenizer(CAPTIONS * 3, vocabulary=530, length=12)
    assert isinstance(tokenizer, CLIPTokenizer) and len(tokenizer) == 530
    assert tokenizer.tokenize("Face")[0] == "face</w>"
    ids = tokenizer("face", padding="max_length").input_ids
    assert len(ids) == 12 and ids[0] == 528 and ids[2:] == [529] * 10
    for text in ("zebra & co", "naïve 🍎"):
        assert 529 not in tokenizer(text).input_ids[1:-1]  # spelled, not unknown
    code = (
        "from base_models.tiny_sdxl.pipeline import clip_tokenizer as c;"
        f"print(c({CAPTIONS!r}, 700, 8).backend_tokenizer.to_str())"
    )
    spoken = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
              for _ in "ab"]  # fmt: skip
    assert spoken[0].stdout == spoken[1].stdout != ""  # the same in every process


def picture_bytes(count=6, side=16):
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=draw)


def test_autoencoder_loss_against_a_literal_one():
    vae, images = tiny().vae, picture_bytes(2)
    loss = AutoencoderLoss(vae, crop=8, edge_weight=0.5, kl_weight=0.1).eval()(images)["loss"]
    x = (images.double().numpy() - 127.5) / 127.5
    with torch.no_grad():
        posterior = vae.encode(torch.tensor(x).float()).latent_dist
        error = vae.decode(posterior.mean).sample.double().numpy() - x
    across = [error[..., i + 1] - error[..., i] for i in range(15)]
    down = [error[:, :, i + 1] - error[:, :, i] for i in range(15)]
    mean, variance = posterior.mean.double().numpy(), posterior.var.double().numpy()
    kl = 0.5 * (mean**2 + variance - 1 - np.log(variance)).mean()
    edges = np.abs(across).mean() + np.abs(down).mean()
    assert loss.item() == pytest.approx(np.abs(error).mean() + 0.5 * edges + 0.1 * kl, rel=1e-4)


def test_random_squares_are_parts_of_their_images():
    images = picture_bytes(40)
    torch.manual_seed(0)
    found = set()
    for image, square in zip(images, random_squares(images, 8)):
        places = [
            (top, left, flipped)
            for flipped in (False, True)
            for top in range(9)
            for left in range(9)
            if torch.equal(
                image[:, top : top + 8, left : left + 8], square.flip(-1) if flipped else square
            )
        ]
        assert len(places) == 1
        found |= set(places)
    assert len(found) > 25 and {flipped for *_, flipped in found} == {False, True}


def test_psnr_of_a_known_error():
    vae = tiny().vae
    images = torch.full((3, 3, 16, 16), 255, dtype=torch.uint8)
    with torch.no_grad():  # decodes everything to 0.9, off by 0.1 of a range of 2
        vae.decoder.conv_out.weight.zero_()
        vae.decoder.conv_out.bias.fill_(0.9)
    assert round_trip_psnr(vae, images) == pytest.approx(10 * np.log10(4 / 0.01), abs=1e-3)


def test_standardised_latents_decode_as_before():
    vae, images = tiny().vae, picture_bytes()
    with torch.no_grad():
        vae.quant_conv.bias.add_(torch.arange(8.0))
        before = vae.decode(vae.encode(as_floats(images)).latent_dist.mean).sample
        standardise(vae, images, batch_size=4)
        latents = vae.encode(as_floats(images)).latent_dist.mean
        after = vae.decode(latents).sample
    scaled = latents * vae.config.scaling_factor
    assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert scaled.std().item() == pytest.approx(1, abs=1e-3)
    assert torch.allclose(before, after, atol=1e-4)


def denoising(dropout=0.0):
    pipeline = tiny()
    loss = PretrainingLoss(pipeline, dropout, snr_gamma=5.0, average_decay=0.75)
    for unet in (loss.parts[0], loss.average.module[0]):
        draw = torch.Generator().manual_seed(0)
        for weight in unet.parameters():  # what starts at zero would hide the conditions
            if weight.ndim > 1 and not weight.any():
                nn.init.normal_(weight, std=0.2, generator=draw)
    tokens = pipeline.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    draw = torch.Generator().manual_seed(1)
    return pipeline, loss, {
        "latents": torch.randn(3, 4, 8, 8, generator=draw),
        "input_ids": tokens,
        "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16], [20, 20, 3, 1, 16, 16]] * 2)[:3],
    }  # fmt: skip


def test_pretraining_loss_against_a_literal_one():
    pipeline, loss, batch = denoising()
    loss.eval()
    with torch.no_grad():
        found = loss(**batch, noise_seed=torch.tensor([5, 6, 7]))["loss"].item()
    prompt, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    alphas = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod.double()
    terms = []
    for row, seed in enumerate((5, 6, 7)):
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(4, 8, 8, generator=draw).double()
        step = torch.randint(1000, (), generator=draw)
        clean, a = batch["latents"][row].double(), alphas[step]
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        velocity = a.sqrt() * noise - (1 - a).sqrt() * clean
        condition = {"text_embeds": pooled[row, None], "time_ids": batch["time_ids"][row, None]}
        with torch.no_grad():
            predicted = pipeline.unet(
                noisy[None].float(), step, prompt[row, None], added_cond_kwargs=condition
            ).sample[0]
        weight = min(1.0, 5.0 / (a / (1 - a) + 1).item())
        terms.append(weight * ((predicted - velocity) ** 2).mean().item())
    assert found == pytest.approx(np.mean(terms), rel=1e-4)


def test_dropped_captions_are_the_pipelines_empty_prompt():
    _, loss, batch = denoising(dropout=1.0)
    losses = []
    for tokens in (batch["input_ids"], batch["input_ids"].flip(0)):
        torch.manual_seed(0)
        losses.append(loss.train()(**batch | {"input_ids": tokens})["loss"].item())
    loss.caption_dropout = 0.0
    torch.manual_seed(0)
    assert losses[0] == losses[1] != loss(**batch)["loss"].item()


def test_text_is_encoded_as_by_the_pipeline():
    pipeline = tiny()
    tokens = pipeline.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    states, pooled = encode_text((pipeline.text_encoder, pipeline.text_encoder_2), tokens)
    prompt, _, expected, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    assert torch.equal(states, prompt) and torch.equal(pooled, expected)


def test_all_parts_learn_and_the_average_follows():
    _, loss, batch = denoising()
    optimizer = torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=0.1)
    values = []
    for _ in range(3):
        torch.manual_seed(0)
        loss.train()(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.average.update_parameters(loss.parts)
        values.append([p.detach().clone() for p in loss.parts.parameters()])
    moved = [any(not torch.equal(a, b) for a, b in zip(*pair)) for pair in
             zip(*[[list(part.parameters()) for part in side] for side in
                   (loss.parts, loss.averaged())])]  # fmt: skip
    assert moved == [True, True, True]  # U-Net and both text encoders
    for first, second, third, average in zip(*values, loss.average.module.parameters()):
        expected = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third
        assert torch.allclose(average, expected, atol=1e-6)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining")
    emoji_packages(folder / "cache")
    return folder


def command(folder):
    return [
        sys.executable, "base_models/tiny_sdxl/pretrain.py", f"runtime.runs_dir={folder / 'runs'}",
        f"out={folder / 'out'}", "runtime.threads=1", "autoencoder.model.vae_channels=[8,8,8,8]",
        "autoencoder.model.latent_channels=4",
        "autoencoder.stages=[{crop: 32, training: {max_steps: 3}}, {crop: 64, training: "
        "{max_steps: 3}}]",
        "denoiser.model.unet_channels=[8,16]", "denoiser.model.transformer_layers=[1,1]",
        "denoiser.model.head_width=8", "denoiser.model.text_width=16",
        "denoiser.model.vocabulary=560", "denoiser.variants.count=20",
        "denoiser.validation_draws=1", "denoiser.training.max_steps=16",
        "denoiser.training.per_device_train_batch_size=2", "training.warmup_steps=0",
        "+training.per_device_train_batch_size=2", "training.save_steps=2",
        "training.eval_steps=2", "training.logging_steps=2", "samples.count=3", "samples.steps=2",
    ]  # fmt: skip


def train(setting, folder):
    environment = {**os.environ, "OPLORA_CACHE": str(setting / "cache")}
    return subprocess.run(
        command(folder), cwd=ROOT, capture_output=True, text=True, env=environment
    )


def test_the_script_trains_a_pipeline_and_goes_on_after_a_kill(setting, tmp_path):
    done = train(setting, tmp_path / "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "whole" / "out"
    facts = json.loads((out / "pretraining.json").read_text())["metrics"]
    assert facts["denoiser"]["steps"] == 16 and len(facts["denoiser"]["held_out_loss"]) == 8
    assert [stage["steps"] for stage in facts["autoencoder"]["stages"]] == [3, 3]
    assert set(facts["autoencoder"]["held_out_psnr"]) == {"google", "twemoji", "fluent"}
    assert Image.open(out / "samples.png").width > 200 and (out / "README.md").exists()
    pipeline = StableDiffusionXLPipeline.from_pretrained(out, dtype=torch.float32)
    assert drawn(pipeline).shape == (2, 64, 64, 3) and pipeline.vae.config.scaling_factor != 1

    environment = {**os.environ, "OPLORA_CACHE": str(setting / "cache")}
    cut = tmp_path / "cut"
    kill_once(command(cut), cut, "runs/*/*/denoiser*/checkpoints/checkpoint-*", environment)
    assert not (tmp_path / "cut" / "out").exists()
    assert train(setting, tmp_path / "cut").returncode == 0
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        path = f"out/{name}.safetensors"
        assert filecmp.cmp(tmp_path / "whole" / path, tmp_path / "cut" / path, shallow=False)
