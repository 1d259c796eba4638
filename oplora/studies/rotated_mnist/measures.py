"""What is measured of a method's members once they are trained."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from oplora.studies.rotated_mnist.curvature import along_top, condition_numbers
from oplora.studies.rotated_mnist.network import Layer
from oplora.studies.rotated_mnist.surface import surface
from oplora.studies.rotated_mnist.training import Trained, evaluate

Digits = tuple[Tensor, Tensor]  # images and labels


def final(trained: Trained, layers: list[Layer], sides: dict[str, Digits]) -> dict[str, Tensor]:
    """Loss on all training digits and accuracy on those held out, (rates, seeds) each.

    A member that ends no better than the frozen network counts as diverged, too: its loss is NaN.
    """
    loss, _ = evaluate(layers, trained.thetas, *sides["train"])
    _, accuracy = evaluate(layers, trained.thetas, *sides["test"])
    start = [theta[0, :1, :1] for theta in trained.snapshots]
    base, _ = evaluate(layers, start, *sides["train"])
    diverged = trained.diverged | ~(loss < base)
    return {
        "final_loss": torch.where(diverged, torch.nan, loss),
        "test_accuracy": torch.where(diverged, torch.nan, accuracy),
        "diverged": diverged,
        "base_loss": base[0, 0],
    }


def chosen(rates: Sequence[float], loss: Tensor, low: float = 1.0) -> list[int]:
    """Indices of the best rate (lowest mean over seeds) and of that nearest to `low` times it."""
    best = int(loss.nan_to_num(torch.inf).mean(1).argmin())
    wanted = math.log(low * rates[best])
    return [best, min(range(len(rates)), key=lambda i: abs(math.log(rates[i]) - wanted))]


def has_hessian(layers: list[Layer]) -> bool:
    """DoRA's gradient leaves out the norm's: it is no loss's, and has no symmetric derivative."""
    return all(len(layer.shapes) == 2 for layer in layers)


def curvature(
    layers: list[Layer],
    trained: Trained,
    at: list[int],
    digits: Digits,
    images: int,
    seeds: int,
    iterations: int,
    every: int,
) -> dict[str, Tensor]:
    """`along_top` at these rates over training, on the first images, of the first seeds.

    Arrays (rates, seeds, points) and the points' steps: every so many snapshots.
    """
    x, labels = (part[:images] for part in digits)
    steps = trained.snapshot_steps[::every]
    found = torch.empty(3, len(at), min(seeds, trained.diverged.shape[1]), len(steps))
    for i, r in enumerate(at):
        for p in range(len(steps)):
            thetas = [each[p * every, r, :seeds] for each in trained.snapshots]
            found[:, i, :, p] = along_top(layers, thetas, x, labels, iterations)
    names = ("projection", "top_eigenvalue", "gradient_norm")
    return dict(zip(names, found, strict=True)) | {"curvature_steps": torch.tensor(steps)}


def conditions(
    layers: list[Layer],
    trained: Trained,
    rate: int,
    digits: Digits,
    images: int,
    seeds: int,
    damping: float,
) -> dict[str, list[float]]:
    """`condition_numbers` of the output layer at the end, on the first images, per seed."""
    x, labels = (part[:images] for part in digits)
    first, last = layers
    found = []
    for s in range(min(seeds, trained.diverged.shape[1])):
        of_first, of_last = (theta[rate, s] for theta in trained.thetas)
        hidden = functional.relu(first(of_first, x))
        found.append(condition_numbers(last, of_last, hidden, labels, damping))
    return {name: [each[name] for each in found] for name in found[0]}


def surfaces(
    layers: list[Layer],
    runs: list[tuple[Trained, list[int]]],
    digits: Digits,
    images: int,
    resolution: int,
) -> dict[str, Tensor]:
    """Arrays of the planes through the first seed's trajectories of two runs.

    runs: with the indices of their rates, at the best and at the low one, a plane each.
    """
    arrays, (x, labels) = {}, (part[:images] for part in digits)
    for name, places in zip(
        ("best", "low"), zip(*(at for _, at in runs), strict=True), strict=True
    ):
        paths = [
            [each[:, rate, 0] for each in trained.snapshots]
            for (trained, _), rate in zip(runs, places, strict=True)
        ]
        found = surface(layers, paths, x, labels, resolution)
        arrays |= {f"{name}_{key}": getattr(found, key) for key in ("x", "y", "loss")}
        arrays[f"{name}_paths"] = torch.stack(found.paths)
        arrays[f"{name}_explained"] = torch.tensor(found.explained)
    return arrays


def lists(x):
    """Tensors, lists and dictionaries as JSON has them: None where a number does not exist."""
    if isinstance(x, dict):
        return {name: lists(part) for name, part in x.items()}
    if isinstance(x, list) or (isinstance(x, Tensor) and x.ndim):
        return [lists(part) for part in x]
    value = x.item() if isinstance(x, Tensor) else x
    return value if math.isfinite(value) else None
