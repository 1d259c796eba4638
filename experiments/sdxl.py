"""SDXL (section 5.1, Table 1): learn a style from captioned images, measure generated ones."""

import time
from functools import partial

import torch
from datasets import Dataset
from diffusers import UNet2DConditionModel
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from oplora.harness.finetuning import fine_tuning, finish
from oplora.harness.runs import Run
from oplora.studies.sdxl.diffusion import Snapshots
from oplora.studies.sdxl.generation import Evaluation
from oplora.studies.sdxl.training import encode_sides, fine_tune, load_pipeline


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
    pipeline = load_pipeline(cfg)
    encoded, validation = encode_sides(cfg, pipeline, data["train"], data["validation"])
    images = Evaluation(
        pipeline,
        encoded,
        data["reference"],
        run.path,
        generate=OmegaConf.to_container(cfg.generate, resolve=True),
        distance=distance,
        side_metrics=side_metrics,
    )
    steps = cfg.images.steps if cfg.measure else []
    snapshots = Snapshots(steps, partial(images.snapshot, count=cfg.images.at_steps))
    metrics = fine_tune(cfg, run, pipeline, encoded, validation, [snapshots])
    if cfg.fine_tune:
        metrics["snapshots"] = images.snapshots()
    if cfg.measure:
        metrics |= measure(cfg, images, data["base_style"])
    finish(run, metrics)
    print(f"{run.path}: {metrics.get('images', 'trained, no images')}")


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
