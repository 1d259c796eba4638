"""Two trajectories of training on the loss surface: the plane that holds most of both."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from oplora.studies.rotated_mnist.network import Layer


@dataclass(frozen=True)
class Surface:
    """The loss on a plane of weights through the frozen network, which is its origin."""

    paths: list[Tensor]  # a trajectory: (points, 2)
    x: Tensor
    y: Tensor
    loss: Tensor  # (y, x)
    explained: float  # share of the trajectories' squared distances that lies in the plane


def changes(layers: list[Layer], thetas: list[Tensor]) -> Tensor:
    """How far the merged weights of all layers are from the frozen ones, flat (points, weights)."""
    parts = [
        (layer.weight(theta) - layer.W).flatten(1)
        for layer, theta in zip(layers, thetas, strict=True)
    ]
    return torch.cat(parts, 1)


def plane(trajectories: list[Tensor]) -> tuple[Tensor, float]:
    """An orthonormal basis (2, weights) by PCA around the common start, and what it explains.

    trajectories: (points, weights) each, from zero. The last points have positive mean coordinates.
    """
    _, sigma, directions = torch.linalg.svd(torch.cat(trajectories), full_matrices=False)
    basis = directions[:2]
    ends = torch.stack([path[-1] for path in trajectories]).mean(0)
    signs = torch.where(basis @ ends < 0, -1.0, 1.0)
    energy = sigma.square()
    return basis * signs.unsqueeze(1), (energy[:2].sum() / energy.sum()).item()


@torch.no_grad()
def surface(
    layers: list[Layer],
    trajectories: list[list[Tensor]],
    images: Tensor,
    labels: Tensor,
    resolution: int = 25,
    margin: float = 0.3,
) -> Surface:
    """trajectories: the thetas of two members, a layer (points, P). margin: around both paths."""
    moved = [changes(layers, thetas) for thetas in trajectories]
    basis, explained = plane(moved)
    paths = [path @ basis.T for path in moved]
    every = torch.cat(paths)
    low, high = every.amin(0), every.amax(0)
    pad = margin * (high - low).clamp(min=1e-6 + 0.1 * (high - low).max())
    x, y = (torch.linspace(*ends, resolution) for ends in zip(low - pad, high + pad, strict=True))
    first, last = layers
    sizes = [layer.W.numel() for layer in layers]
    D1, D2 = (
        part.view(2, *layer.W.shape)
        for part, layer in zip(basis.split(sizes, 1), layers, strict=True)
    )
    start, along = images @ first.W.T + first.bias, images @ D1.mT  # linear in the coordinates
    loss = torch.empty(resolution, resolution)
    for row, b in enumerate(y):
        for column, a in enumerate(x):
            hidden = functional.relu(start + a * along[0] + b * along[1])
            scores = hidden @ (last.W + a * D2[0] + b * D2[1]).T + last.bias
            loss[row, column] = functional.cross_entropy(scores, labels)
    return Surface(paths, x, y, loss, explained)
