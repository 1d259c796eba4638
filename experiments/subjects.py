"""Subjects (v2's abstract: DreamBench): an adapter of SDXL for each, from a few pictures."""

import json
import time

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from transformers import default_data_collator, set_seed

from oplora.harness.assets import cache_folder
from oplora.harness.distributed import process_count
from oplora.harness.finetuning import device, fine_tuning, finish, first_batches, train, validate
from oplora.harness.methods import apply_method
from oplora.harness.runs import Run
from oplora.studies.sdxl.diffusion import (
    DenoisingLoss,
    adapter_state,
    encode,
    encode_prompts,
    export,
    held_out,
)
from oplora.studies.sdxl.generation import generate, merge, strip
from oplora.studies.subjects.fidelity import Fidelity, over_subjects, score
from oplora.studies.subjects.subjects import Subject


@fine_tuning("subjects", UNet2DConditionModel)
def main(cfg: DictConfig, run: Run) -> None:
    if process_count() > 1:
        raise ValueError(
            "a subject is trained by one process: start one run for each GPU, as for seeds"
        )
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    fidelity, texts = Fidelity(instantiate(cfg.encoders)), instantiate(cfg.side_metrics)
    texts = {name: metric for name, metric in texts.items() if metric is not None}
    subjects = instantiate(cfg.dataset.subjects)
    real = {s.name: fidelity.features(s.images["image"]) for s in subjects} if cfg.measure else {}
    done: dict[str, dict] = {}
    for subject in tqdm(subjects, "Subjects"):
        part = run.part(f"subjects/{subject.name}")
        if not part.finished:
            set_seed(cfg.seed)  # whichever subjects were finished before a cut
            try:
                learn(cfg, part, subject)
            except FloatingPointError as error:
                finish(run, {"diverged": f"{subject.name}: {error}", "steps": 0})
                raise
        metrics = json.loads((part.path / "metrics.json").read_text())
        if cfg.measure:
            drawn = sorted((part.path / "images").glob("*.png"))
            metrics |= score(subject, drawn, fidelity, real, texts, yardsticks=not cfg.fine_tune)
        done[subject.name] = metrics
    if cfg.measure:
        drawn = [run.path / f"subjects/{s.name}/images/00000.png" for s in subjects]
        size = min(cfg.resolution, 256)
        strip(drawn, size).save(run.path / "samples.png")
        strip([s.images[0]["image"] for s in subjects], size).save(run.path / "reference.png")
    finish(run, over_subjects(done))
    print(f"{run.path}: {len(done)} subjects")


def learn(cfg: DictConfig, run: Run, subject: Subject) -> None:
    """Train an adapter for the subject and draw its prompts; finishes its part of the run."""
    pipeline = instantiate(cfg.pipeline).to(device())
    pipeline.unet.set_attn_processor(instantiate(cfg.attention))
    dtype, scheduler = pipeline.unet.dtype, DDPMScheduler.from_config(pipeline.scheduler.config)
    encoded = {
        side: encode(images, pipeline, cache_folder() / "sdxl-inputs", **cfg.encoding)
        for side, images in (("train", subject.images), ("validation", subject.held_out))
        if images is not None
    }
    validation = encoded.get("validation")
    validation = validation and held_out(validation, cfg.validation_draws)
    if cfg.fine_tune:
        metrics = fine_tune(cfg, run, pipeline, scheduler, encoded["train"], validation)
        merge(pipeline.unet)
    else:
        loss = DenoisingLoss(pipeline.unet, scheduler)
        metrics = validate(loss, cfg.training, run, eval_dataset=validation)
    pipeline.to(dtype=getattr(torch, cfg.measure_dtype) if cfg.measure_dtype else dtype)
    if cfg.measure:
        start = time.perf_counter()
        prompts = encode_prompts(subject.prompts, pipeline)
        options = OmegaConf.to_container(cfg.generate, resolve=True)
        numbers = list(range(cfg.pictures * len(subject.prompts)))
        drawn = generate(pipeline, prompts, numbers, run.path / "images", **options)
        strip(drawn[: cfg.shown], cfg.resolution).save(run.path / "samples.png")
        strip(subject.images["image"], cfg.resolution).save(run.path / "reference.png")
        metrics["evaluate_seconds"] = round(time.perf_counter() - start, 1)
    finish(run, metrics)


def fine_tune(
    cfg: DictConfig, run: Run, pipeline: StableDiffusionXLPipeline, scheduler, data, validation
) -> dict:
    """Train the method's adapter in the pipeline's U-Net and export it; the part's figures."""
    pipeline.unet.requires_grad_(False)
    unet, create_optimizer = apply_method(
        pipeline.unet,
        cfg.method,
        first_batches(data, default_data_collator, cfg.training),
        loss=lambda unet, batch: DenoisingLoss(unet, scheduler)(**batch)["loss"],
        direct_lr=cfg.direct_lr,
    )
    cast_training_params(unet)  # the adapter in float32 on a half-precision base
    initial = adapter_state(unet)
    loss = DenoisingLoss(unet, scheduler)
    options = dict(train_dataset=data, eval_dataset=validation, diagnostics=cfg.diagnostics)
    metrics = train(loss, create_optimizer, cfg.training, run, **options)
    export(unet, run.path / "adapter", initial, create_optimizer.factors(unet))
    return metrics


if __name__ == "__main__":
    main()
