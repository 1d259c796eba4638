"""Train the small preset's base model for SDXL from scratch: a tiny SDXL on captioned emoji.

python base_models/tiny_sdxl/pretrain.py               → results/base_models/tiny_sdxl
python base_models/tiny_sdxl/pretrain.py --cfg job     the recipe; every key can be overridden
Cut off at any moment, the same command goes on from its last checkpoint.
"""

import json
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, set_seed

from oplora.harness.assets import build_once
from oplora.harness.checkpoints import whole_checkpoint
from oplora.harness.emoji import ALIGNED, PICTURES, SIZE, STYLES, emoji
from oplora.harness.entry import experiment
from oplora.harness.runs import open_run

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # base_models is not installed
from base_models.tiny_sdxl.losses import (
    AutoencoderLoss,
    PretrainingLoss,
    as_floats,
    round_trip_psnr,
    standardise,
    start_at_zero,
)
from base_models.tiny_sdxl.pipeline import tiny_sdxl
from base_models.tiny_sdxl.variants import FILTERS, FORMER_STYLES, Variant, variants

CARD = """\
# Tiny SDXL

A complete `StableDiffusionXLPipeline` for emoji of 64×64 pixels, trained from scratch on two CPU
cores by `base_models/tiny_sdxl/pretrain.py`: the small preset's stand-in for SDXL 1.0.

    pipeline = StableDiffusionXLPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipeline("grinning face, face smiling", num_inference_steps=20, guidance_scale=3).images[0]

Captions mean Google's style of today; a word in front, as in "flat: grinning face", names others:
{styles}.

![Google's images above, samples below](samples.png)

`pretraining.json` has the recipe, the curves and the time it took. U-Net and text encoders were
trained on Google's emoji of 2024, 2020 and 2017 (Noto Emoji, Apache-2.0); the autoencoder has
also seen Microsoft's Fluent emoji (MIT) and Twemoji (CC BY 4.0, Twitter and contributors). None
has seen the tenth of all emoji that `oplora.harness.emoji` sets aside for validation.
"""


@experiment("pretrain_tiny_sdxl")
def main(cfg: DictConfig) -> None:
    config, out = OmegaConf.to_container(cfg, resolve=True), Path(cfg.out)
    del config["out"]
    if out.exists():
        raise ValueError(f"{out} exists: delete it, or choose another folder with out=FOLDER")
    torch.set_num_threads(cfg.runtime.threads)
    torch.set_flush_denormal(True)
    captions = [f"{word}: a" for word in (*FILTERS, *FORMER_STYLES.values())]
    captions += emoji("google", categories=PICTURES)["text"][:]
    models = {**cfg.autoencoder.model, **cfg.denoiser.model}
    pipeline = tiny_sdxl(captions, **models, seed=cfg.seed)

    first = {key: config[key] for key in config if key not in ("denoiser", "samples")}
    with open_run(first | {"run_name": f"autoencoder-seed{cfg.seed}"}) as run:
        if not run.finished:
            run.finish(train_autoencoder(cfg, pipeline.vae, run.path))
            for folder in run.path.glob("checkpoints*"):
                shutil.rmtree(folder)
        vae = AutoencoderKL.from_pretrained(run.path / "vae")
        vae.register_to_config(_name_or_path="vae")  # not a path of this machine
        pipeline.register_modules(vae=vae)
        autoencoder = json.loads((run.path / "metrics.json").read_text("utf-8"))

    with open_run(config | {"run_name": f"denoiser-seed{cfg.seed}"}) as run:
        if not run.finished:
            metrics = train_denoiser(cfg, pipeline, run.path)
            build_once(run.path / "pipeline", partial(save, pipeline, cfg.samples))
            run.finish({"autoencoder": autoencoder, "denoiser": metrics})
            for folder in ("checkpoints", "latents"):
                shutil.rmtree(run.path / folder)
        build_once(out, partial(publish, run.path))
    print(f"{out} is complete")


def train_autoencoder(cfg: DictConfig, vae: AutoencoderKL, folder: Path) -> dict:
    """Train on all styles and save in folder/vae; returns the run's figures."""
    set_seed(cfg.seed)
    whole = torch.cat([pixels(emoji(style, "train")["image"]) for style in STYLES])
    held_out = {style: pixels(emoji(style, "validation")["image"]) for style in ALIGNED}
    validation = Rows(pixels=torch.cat(list(held_out.values())))
    start_at_zero(vae)
    stages = []
    for number, stage in enumerate(cfg.autoencoder.stages):
        loss = AutoencoderLoss(vae, stage.crop, **cfg.autoencoder.loss)
        training = {**cfg.training, **stage.training}
        checkpoints = folder / f"checkpoints{number}"
        stages.append(fit(loss, training, checkpoints, Rows(pixels=whole), validation))
    vae.eval()
    psnr = {style: round(round_trip_psnr(vae, held_out[style]), 2) for style in ALIGNED}
    standardise(vae, pixels(emoji("google", "train")["image"]))
    vae.save_pretrained(folder / "vae")
    return {"stages": stages, "held_out_psnr": psnr, "parameters": size(vae)}


def train_denoiser(cfg: DictConfig, pipeline: StableDiffusionXLPipeline, folder: Path) -> dict:
    """Train U-Net and text encoders in place; returns the run's figures."""
    set_seed(cfg.seed)
    options = OmegaConf.to_container(cfg.denoiser.variants)
    count = options.pop("count")

    def build(target: Path) -> None:
        rows = tqdm(variants(count, **options, seed=cfg.seed), "Encoding variants", count)
        save_file(encode(rows, pipeline), target / "rows.safetensors")

    latents = build_once(folder / "latents", build)
    validation = {
        "held_out": still(pipeline, emoji("google", "validation"), cfg.denoiser.validation_draws),
        # what a base that knows its captions by heart is bad at; measured, not used
        "other_style": still(pipeline, emoji("fluent", "train"), 1),
    }
    history = fit(
        loss := PretrainingLoss(pipeline, **cfg.denoiser.loss),
        {**cfg.training, **cfg.denoiser.training},
        folder / "checkpoints",
        Rows(**load_file(latents / "rows.safetensors")),
        validation,
        MovingAverage(),
    )
    names = ("unet", "text_encoder", "text_encoder_2")
    pipeline.register_modules(**dict(zip(names, loss.averaged(), strict=True)))
    parameters = {name: size(getattr(pipeline, name)) for name in names}
    return {**history, "parameters": parameters}


def fit(
    loss: nn.Module,
    training: dict,
    folder: Path,
    rows: Dataset,
    validation: Dataset | dict[str, Dataset],
    *callbacks: TrainerCallback,
) -> dict:
    """Train with checkpoints in `folder`, from the last of them; returns curves and seconds."""
    trainer = Trainer(
        loss,
        instantiate(training, output_dir=str(folder), _convert_="all"),
        train_dataset=rows,
        eval_dataset=validation,
        callbacks=[Clock(), *callbacks],
    )
    trainer.train(resume_from_checkpoint=whole_checkpoint(folder))
    history = trainer.state.log_history
    names = ["loss", *sorted({key for e in history for key in e if key.endswith("_loss")})]
    curves = {
        name.removeprefix("eval_"): [[e["step"], round(e[name], 5)] for e in history if name in e]
        for name in names
        if name != "train_loss"  # Trainer's mean of all steps since the last start
    }
    seconds = max(entry.get("seconds", 0) for entry in history)
    return {"steps": trainer.state.global_step, "train_seconds": round(seconds), **curves}


class Rows(Dataset):
    """Rows of tensors of equal length, each row a dict."""

    def __init__(self, **columns: Tensor):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


class Clock(TrainerCallback):
    """Notes the seconds of training so far, with those before a resume, beside every loss."""

    def on_train_begin(self, args, state, control, **kwargs):
        before = max((entry.get("seconds", 0) for entry in state.log_history), default=0)
        self.start = time.perf_counter() - before

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1]["seconds"] = round(time.perf_counter() - self.start, 1)


class MovingAverage(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.average.update_parameters(model.parts)


def pixels(images: Iterable[Image.Image]) -> Tensor:
    """uint8 (n, 3, height, width)."""
    rows = torch.from_numpy(numpy.stack([numpy.asarray(image) for image in images]))
    # bf16 GroupNorm is many times slower on a CPU if channels come last
    return rows.permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def encode(examples: Iterable[Variant], pipeline: StableDiffusionXLPipeline) -> dict[str, Tensor]:
    """What `PretrainingLoss` takes, a row per example; latents are drawn from the posterior."""
    vae, draw, batches, batch = pipeline.vae, torch.Generator().manual_seed(0), [], []

    def flush() -> None:
        images, texts, time_ids = zip(*batch, strict=True)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(as_floats(pixels(images))).latent_dist
        latents = posterior.sample(draw).float()
        tokens = pipeline.tokenizer(list(texts), padding="max_length", truncation=True)
        batches.append(
            {
                "latents": (latents * vae.config.scaling_factor).half(),
                "input_ids": torch.tensor(tokens.input_ids, dtype=torch.int16),
                "time_ids": torch.tensor(time_ids, dtype=torch.int16),
            }
        )
        batch.clear()

    for example in examples:
        batch.append(example)
        if len(batch) == 64:
            flush()
    if batch:
        flush()
    return {name: torch.cat([rows[name] for rows in batches]) for name in batches[0]}


def still(pipeline: StableDiffusionXLPipeline, rows, draws: int) -> Rows:
    """Whole images, each with `draws` noises and time steps that never change."""
    time_ids = [SIZE, SIZE, 0, 0, SIZE, SIZE]
    columns = encode((Variant(row["image"], row["text"], time_ids) for row in rows), pipeline)
    repeated = {name: column.repeat_interleave(draws, 0) for name, column in columns.items()}
    return Rows(**repeated, noise_seed=torch.arange(draws * len(rows)))


def save(pipeline: StableDiffusionXLPipeline, samples: DictConfig, folder: Path) -> None:
    """The pipeline as fp16 safetensors, with samples of evenly spread training captions."""
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    data = emoji("google", "train")
    data = data.select(numpy.linspace(0, len(data) - 1, samples.count).astype(int))
    images = pipeline(
        data["text"][:],
        num_inference_steps=samples.steps,
        guidance_scale=samples.guidance_scale,
        generator=[torch.Generator().manual_seed(n) for n in range(len(data))],
    ).images
    grid(data["image"][:], images, data["text"][:]).savefig(folder / "samples.png")


def grid(real: list[Image.Image], samples: list[Image.Image], texts: list[str]) -> Figure:
    """Pairs, real above sample, under their captions."""
    columns = min(8, len(texts))
    lines = -(-len(texts) // columns)
    figure = Figure(figsize=(1.2 * columns, 2.7 * lines), layout="constrained", dpi=110)
    axes = figure.subplots(2 * lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (above, below, text) in enumerate(zip(real, samples, texts, strict=True)):
        line, column = divmod(index, columns)
        axes[2 * line, column].set_title(textwrap.fill(text.split(",")[0], 18), fontsize=7)
        axes[2 * line, column].imshow(above)
        axes[2 * line + 1, column].imshow(below)
    return figure


def publish(run: Path, folder: Path) -> None:
    """The pipeline with a card and all figures of the run."""
    shutil.copytree(run / "pipeline", folder, dirs_exist_ok=True)
    styles = ", ".join((*FORMER_STYLES.values(), *FILTERS))
    (folder / "README.md").write_text(CARD.format(styles=styles), "utf-8")
    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    facts = {
        name: json.loads((run / f"{name}.json").read_text("utf-8"))
        for name in ("environment", "metrics")
    }
    text = json.dumps({"config": config, **facts}, indent=1)
    (folder / "pretraining.json").write_text(text + "\n", "utf-8")


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
