"""What learning a style and learning a subject share: from a config to a fine-tuned U-Net."""

from collections.abc import Sequence

import torch
from datasets import Dataset
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import cast_training_params
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import TrainerCallback, default_data_collator

from oplora.harness.assets import cache_folder
from oplora.harness.finetuning import device, first_batches, train, validate
from oplora.harness.methods import apply_method
from oplora.harness.runs import Run
from oplora.studies.sdxl.diffusion import DenoisingLoss, adapter_state, encode, export, held_out
from oplora.studies.sdxl.generation import merge


def load_pipeline(cfg: DictConfig) -> StableDiffusionXLPipeline:
    pipeline = instantiate(cfg.pipeline).to(device())
    pipeline.unet.set_attn_processor(instantiate(cfg.attention))
    return pipeline


def encode_sides(
    cfg: DictConfig,
    pipeline: StableDiffusionXLPipeline,
    images: Dataset,
    validation: Dataset | None,
) -> tuple[Dataset, Dataset | None]:
    """Inputs of the training images (`encode`) and of those for validation (`held_out`)."""
    folder = cache_folder() / "sdxl-inputs"
    encoded = encode(images, pipeline, folder, **cfg.encoding)
    if validation is None:
        return encoded, None
    return encoded, held_out(
        encode(validation, pipeline, folder, **cfg.encoding), cfg.validation_draws
    )


def fine_tune(
    cfg: DictConfig,
    run: Run,
    pipeline: StableDiffusionXLPipeline,
    encoded: Dataset,
    validation: Dataset | None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict:
    """Train the method's adapter in the pipeline's U-Net, export it, and fold it in for measuring.

    With cfg.fine_tune=false the model stays as it is. Returns the run's figures.
    """
    unet, dtype = pipeline.unet, pipeline.unet.dtype
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    if cfg.fine_tune:
        unet.requires_grad_(False)
        unet, create_optimizer = apply_method(
            unet,
            cfg.method,
            first_batches(encoded, default_data_collator, cfg.training),
            loss=lambda unet, batch: DenoisingLoss(unet, scheduler)(**batch)["loss"],
            direct_lr=cfg.direct_lr,
        )
        cast_training_params(unet)  # the adapter in float32 on a half-precision base
        initial = adapter_state(unet)
        metrics = train(
            DenoisingLoss(unet, scheduler),
            create_optimizer,
            cfg.training,
            run,
            diagnostics=cfg.diagnostics,
            train_dataset=encoded,
            eval_dataset=validation,
            callbacks=callbacks,
        )
        export(unet, run.path / "adapter", initial, create_optimizer.factors(unet))
        merge(pipeline.unet)
    else:
        loss = DenoisingLoss(unet, scheduler)
        metrics = validate(loss, cfg.training, run, eval_dataset=validation)
    pipeline.to(dtype=getattr(torch, cfg.measure_dtype) if cfg.measure_dtype else dtype)
    return metrics
