"""How near drawings come to a subject's pictures (DreamBooth, arXiv 2208.12242, section 4.1)."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from oplora.studies.sdxl.images import Encoder, Picture, features, side_metrics
from oplora.studies.subjects.subjects import Subject


def unit_features(
    pictures: Sequence[Picture], encoders: Mapping[str, Encoder]
) -> dict[str, Tensor]:
    """Features (n, d) of length 1 by each encoder, under the name of the metric: dino, clip_i, …"""
    return {
        name: torch.nn.functional.normalize(features(pictures, encoder), dim=1)
        for name, encoder in encoders.items()
    }


def between(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean cosine over all pairs of a row of x and a row of y: DINO, CLIP-I."""
    return {name: (x[name] @ y[name].T).mean().item() for name in x}


def within(x: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean cosine over all pairs of two rows of x, of at least two: real pictures' own."""
    found = {}
    for name, rows in x.items():
        pairs = len(rows) * (len(rows) - 1)
        found[name] = ((rows @ rows.T).sum() - len(rows)).item() / pairs
    return found


def score(
    subject: Subject, drawn: list, encoders: dict, real: dict, texts: dict, yardsticks: bool
) -> dict:
    """Subject fidelity and, where there are metrics for it, that to the prompts' texts.

    yardsticks: also the real pictures among themselves, and those of the other subjects.
    """
    mine = real[subject.name]
    captions = [subject.descriptions[n % len(subject.descriptions)] for n in range(len(drawn))]
    scores = between(unit_features(drawn, encoders), mine) | side_metrics(
        drawn, [], captions, texts
    )
    if yardsticks:
        others = [between(theirs, mine) for name, theirs in real.items() if name != subject.name]
        scores["yardsticks"] = {"same": within(mine)}
        if others:
            scores["yardsticks"]["others"] = mean_of(others)
    return scores


def over_subjects(done: dict[str, dict]) -> dict:
    """Means of scores and of curves over the subjects, sums of times; each subject's own scores."""
    every = list(done.values())
    curves = {
        name: [[step, fmean(m[name][n][1] for m in every)] for n, (step, _) in enumerate(curve)]
        for name, curve in every[0].items()
        if name in ("validation_loss", "train_loss")
    }
    folds: dict[str, Callable] = {"train_seconds": sum, "evaluate_seconds": sum}
    sizes = ("steps", "adapter_parameters", "mlp_parameters", "trained_parameters")
    folds |= dict.fromkeys((*sizes, "peak_memory_bytes"), max)
    there = [name for name in folds if name in every[0]]
    folded = {name: folds[name](m[name] for m in every) for name in there}
    scores = {
        subject: {n: v for n, v in m.items() if n not in folds and n not in curves}
        for subject, m in done.items()
    }
    return folded | curves | mean_of(list(scores.values())) | {"subjects": scores}


def mean_of(scores: list[dict]) -> dict:
    """The mean of numbers that all have, level by level."""
    found = {}
    for name, value in scores[0].items():
        values = [each[name] for each in scores if name in each]
        if isinstance(value, dict):
            found[name] = mean_of(values)
        elif isinstance(value, float):
            found[name] = fmean(values)
    return found
