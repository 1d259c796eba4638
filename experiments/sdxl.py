"""SDXL (section 5.1, Table 1): learn a style from captioned images, measure generated ones."""

import time
from functools import partial

import torch
from datasets import Dataset
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import default_data_collator

from oplora.harness.assets import cache_folder
from oplora.harness.finetuning import device, fine_tuning, finish, first_batches, train, validate
from oplora.harness.methods import apply_method
from oplora.harness.runs import Run
from oplora.studies.sdxl.diffusion import (
    DenoisingLoss,
    Snapshots,
    adapter_state,
    encode,
    export,
    held_out,
)
from oplora.studies.sdxl.generation import Evaluation, merge


@fine_tuning("sdxl", UNet2DConditionModel)
def main(cfg: DictConfig, run: Run) -> None:
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    # first, as they say at once which package is missing
    distance, side_metrics = instantiate(cfg.distance), instantiate(cfg.side_metrics)
    sides = ("train", "validation", "reference", "base_style")
    data = {side: instantiate(cfg.dataset[side]) for side in sides}
    if share := cfg.get("hold_out"):
        parts = data["train"].train_test_split(share, seed=0)
        data |= dict(train=parts["train"], reference=parts["train"], validation=parts["test"])
    pipeline = instantiate(cfg.pipeline).to(device())
    pipeline.unet.set_attn_processor(instantiate(cfg.attention))
    encoded = {
        side: encode(data[side], pipeline, cache_folder() / "sdxl-inputs", **cfg.encoding)
        for side in ("train", "validation")
        if data[side] is not None
    }
    images = Evaluation(
        pipeline,
        encoded["train"],
        data["reference"],
        run.path,
        generate=OmegaConf.to_container(cfg.generate, resolve=True),
        distance=distance,
        side_metrics=side_metrics,
    )
    dtype, scheduler = pipeline.unet.dtype, DDPMScheduler.from_config(pipeline.scheduler.config)
    validation = encoded.get("validation")
    validation = validation and held_out(validation, cfg.validation_draws)
    if cfg.fine_tune:
        metrics = fine_tune(cfg, run, pipeline, scheduler, encoded["train"], validation, images)
        merge(pipeline.unet)
    else:
        loss = DenoisingLoss(pipeline.unet, scheduler)
        metrics = validate(loss, cfg.training, run, eval_dataset=validation)
    pipeline.to(dtype=getattr(torch, cfg.measure_dtype) if cfg.measure_dtype else dtype)
    if cfg.measure:
        metrics |= measure(cfg, images, data["base_style"])
    finish(run, metrics)
    print(f"{run.path}: {metrics.get('images', 'trained, no images')}")


def fine_tune(
    cfg: DictConfig,
    run: Run,
    pipeline: StableDiffusionXLPipeline,
    scheduler: DDPMScheduler,
    data: Dataset,
    validation: Dataset | None,
    images: Evaluation,
) -> dict:
    """Train the method's adapter in the pipeline's U-Net and export it; the run's figures."""
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
    steps = cfg.images.steps if cfg.measure else []
    metrics = train(
        DenoisingLoss(unet, scheduler),
        create_optimizer,
        cfg.training,
        run,
        diagnostics=cfg.diagnostics,
        train_dataset=data,
        eval_dataset=validation,
        callbacks=[Snapshots(steps, partial(images.snapshot, count=cfg.images.at_steps))],
    )
    export(unet, run.path / "adapter", initial, create_optimizer.factors(unet))
    return metrics | {"snapshots": images.snapshots()}


def measure(cfg: DictConfig, images: Evaluation, base_style: Dataset | None) -> dict:
    """Generate and measure; for the model without fine-tuning also what to read it against."""
    start = time.perf_counter()
    metrics = {"images": images.measure(cfg.images.measured)}
    if base_style is not None and not cfg.fine_tune:
        metrics["yardsticks"] = images.yardsticks(base_style, cfg.images.measured)
    metrics["captions"] = images.show(cfg.images.shown)
    metrics["evaluate_seconds"] = round(time.perf_counter() - start, 1)
    return metrics


if __name__ == "__main__":
    main()
