"""Subjects (v2's abstract: DreamBench): an adapter of SDXL for each, from a few pictures."""

import time
from contextlib import suppress

import torch
from diffusers import UNet2DConditionModel
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from transformers import set_seed

from oplora.harness.distributed import process_count
from oplora.harness.finetuning import fine_tuning, finish
from oplora.harness.runs import Run
from oplora.studies.sdxl.diffusion import encode_prompts
from oplora.studies.sdxl.generation import generate, strip
from oplora.studies.sdxl.training import encode_sides, fine_tune, load_pipeline
from oplora.studies.subjects.fidelity import over_subjects, score, unit_features
from oplora.studies.subjects.subjects import Subject


@fine_tuning("subjects", UNet2DConditionModel)
def main(cfg: DictConfig, run: Run) -> None:
    if process_count() > 1:
        raise ValueError(
            "a subject is trained by one process: start one run for each GPU, as for seeds"
        )
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    encoders, texts = instantiate(cfg.encoders), instantiate(cfg.side_metrics)
    texts = {name: metric for name, metric in texts.items() if metric is not None}
    subjects = instantiate(cfg.dataset.subjects)
    measured = subjects if cfg.measure else []
    real = {s.name: unit_features(s.images["image"], encoders) for s in measured}
    done: dict[str, dict] = {}
    for subject in tqdm(subjects, "Subjects"):
        part = run.part(f"subjects/{subject.name}")
        if not part.finished:
            set_seed(cfg.seed)  # whichever subjects were finished before a cut
            with suppress(FloatingPointError):  # its part says so
                learn(cfg, part, subject)
        metrics = part.metrics()
        if "diverged" in metrics:
            finish(run, metrics | {"diverged": f"{subject.name}: {metrics['diverged']}"})
            raise FloatingPointError(metrics["diverged"])
        if cfg.measure:
            drawn = sorted((part.path / "images").glob("*.png"))
            metrics |= score(subject, drawn, encoders, real, texts, yardsticks=not cfg.fine_tune)
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
    pipeline = load_pipeline(cfg)
    encoded, validation = encode_sides(cfg, pipeline, subject.images, subject.held_out)
    metrics = fine_tune(cfg, run, pipeline, encoded, validation)
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


if __name__ == "__main__":
    main()
