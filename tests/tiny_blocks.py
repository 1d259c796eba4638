"""Blocks of tensors like those of three small adapters, and a loss of them."""

import math

import torch

SHAPES = [[(4, 10), (7, 4)], [(4, 10), (7, 4), (7,)], [(3, 5), (6, 3)]]
EVEN = [[(4, 8), (8, 4)], [(4, 16), (32, 4), (32,)], [(2, 8), (8, 2)]]
WIDTH = 16


def blocks(dtype=torch.float64, start="paper", layers=SHAPES):
    """Three adapters with A random, B zero (or not), one with a DoRA-like vector."""
    torch.manual_seed(0)
    result = []
    for shapes in layers:
        tensors = [torch.randn(shape, dtype=dtype) / math.sqrt(shape[-1]) for shape in shapes]
        if start == "paper":
            tensors[1].zero_()
        result.append([torch.nn.Parameter(t) for t in tensors])
    return result


def starts(start):
    if start != "paper":
        return start
    return [["random", "still", "keep"][: len(shapes)] for shapes in SHAPES]


def losses(all_blocks, target=1.0):
    """A loss with curvature and coupling between the tensors of a block."""
    total = 0
    for tensors in all_blocks:
        product = tensors[1] @ tensors[0]
        if len(tensors) == 3:
            product = product * tensors[2][:, None]
        x = torch.linspace(-1, 1, product.numel(), dtype=product.dtype).view_as(product)
        total = total + ((product - target * torch.sin(3 * x)) ** 2).mean()
    return total
