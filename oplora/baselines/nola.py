"""NOLA's stored form (arXiv 2310.02556): a seed and coefficients, which give a plain LoRA."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from oplora.generators import NOLA, GeneratorOptimizer
from oplora.mlp import generator_for
from oplora.peft import adapter_blocks


def save_seeded(model: nn.Module, optimizer: GeneratorOptimizer, path: Path, seed: int) -> None:
    """The coefficients of the layers of a LoRA that started as PEFT's default does, and the seed.

    seed: that of the optimizer (`create_generator_optimizer(…, generator="nola", seed=…)`).
    ValueError: another generator, or values that the seed does not give back.
    """
    blocks, tensors, layers = adapter_blocks(model)[0], {}, []
    for number, (block, (_, module)) in enumerate(zip(blocks, optimizer.modules, strict=True)):
        if not isinstance(module, NOLA):
            raise ValueError(f"{block.names[0]} is predicted by {type(module).__name__}, not NOLA")
        shapes = [list(t.shape) for t in block.tensors]
        layers.append({"names": block.names, "shapes": shapes})
        found = {f"{number}.{k}": h.detach().cpu().clone() for k, h in enumerate(module.h)}
        drawn = _draw(seed, block.names, shapes, list(found.values()))
        if not all(torch.equal(a, b.cpu()) for a, b in zip(drawn, module(), strict=True)):
            raise ValueError(f"{block.names[0]} did not start from seed={seed} and PEFT's default")
        tensors |= found
    about = {"seed": str(seed), "layers": json.dumps(layers)}
    save_file(tensors, path, metadata=about)


def load_seeded(path: Path) -> dict[str, Tensor]:
    """The adapter's tensors by their names in the model, as `save_seeded` found them."""
    found = {}
    with safe_open(path, "pt") as file:
        about = file.metadata()
        for number, layer in enumerate(json.loads(about["layers"])):
            h = [file.get_tensor(f"{number}.{k}") for k in range(len(layer["names"]))]
            drawn = _draw(int(about["seed"]), layer["names"], layer["shapes"], h)
            found |= dict(zip(layer["names"], drawn, strict=True))
    return found


@torch.no_grad()
def _draw(seed: int, names: list[str], shapes: list[list[int]], h: list[Tensor]) -> list[Tensor]:
    zeros = [torch.zeros(shape, dtype=h[0].dtype) for shape in shapes]
    starts = ["random", *["still"] * (len(shapes) - 1)]
    stream = generator_for(seed, names[0])
    module = NOLA(zeros, len(h[0]), start=starts, generator=stream)
    for mine, value in zip(module.h, h, strict=True):
        mine.copy_(value)
    return module()
