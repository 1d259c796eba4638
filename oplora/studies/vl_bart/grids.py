"""Grid features of images: one vector per cell of a coarse grid, made once by a frozen network.

Two stores give them by the image's name: `H5Grids` reads VL-Adapter's files (paper),
`StoredGrids` one safetensors file (small preset).
"""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

REMEDY = "extract it again (scripts/extract_clip_features.py)"


def layer_output(network: nn.Module, layer: str, pixels: Tensor) -> Tensor:
    """What the layer of that name gives for the pixels: (n, channels, height, width)."""
    found = []
    hook = network.get_submodule(layer).register_forward_hook(
        lambda module, inputs, output: found.append(output)
    )
    try:
        with torch.no_grad():
            network(pixels)
    finally:
        hook.remove()
    return found[0]


def cells_of(maps: Tensor) -> Tensor:
    """Feature maps (n, channels, height, width) as cells, row by row: (n, cells, channels)."""
    return maps.flatten(2).transpose(1, 2)


def pooled(cells: Tensor, count: int) -> Tensor:
    """Max-pool a square grid (cells, features) to `count` cells (upstream: 7×7 to 6×6).

    ValueError if one of both is no square, or the grid is too coarse.
    """
    side, target = math.isqrt(len(cells)), math.isqrt(count)
    if target**2 != count:
        raise ValueError(f"cells={count} is no square grid: use 9, 16, 36, 49, …")
    if side**2 != len(cells) or side < target:
        raise ValueError(f"{len(cells)} cells are no square grid of at least {target}×{target}")
    if side == target:
        return cells
    if side == target + 1:  # then a cell is the maximum of its neighbours, much faster so
        grid = cells.float().view(side, side, -1)
        grid = torch.maximum(grid[:-1], grid[1:])
        return torch.maximum(grid[:, :-1], grid[:, 1:]).flatten(0, 1)
    maps = cells.float().T.unflatten(1, (side, side))
    return nn.functional.adaptive_max_pool2d(maps, target).flatten(1).T


class H5Grids:
    """VL-Adapter's features: `folder`/`image`.h5 with the array "<name>/features" (49, 2048).

    An image's name is a path below `folder`, as COCO/clip_features/data_clip_RN101_att/<img_id>.
    """

    def __init__(self, folder: str, cells: int = 36, feature_size: int = 2048):
        try:
            import h5py
        except ImportError as error:
            raise ImportError(f"{error}: H5Grids needs `pip install -e '.[paper]'`") from error
        self.open, self.folder = h5py.File, Path(folder)
        self.cells, self.feature_size = cells, feature_size

    def __contains__(self, image: str) -> bool:
        return self._path(image).is_file()

    def __call__(self, image: str) -> Tensor:
        """Features (cells, feature_size), float32."""
        path = self._path(image)
        if not path.is_file():
            raise FileNotFoundError(f"image {image!r} has no features: no {path}; {REMEDY}")
        try:
            with self.open(path, "r") as file:
                values = torch.from_numpy(file[f"{path.stem}/features"][...]).float()
        except (OSError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}): {REMEDY}") from error
        if values.ndim != 2 or values.shape[1] != self.feature_size:
            raise ValueError(
                f"{path} holds features {tuple(values.shape)} instead of (cells, "
                f"{self.feature_size}): {REMEDY}"
            )
        try:
            return pooled(values, self.cells)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {REMEDY}") from error

    def _path(self, image: str) -> Path:
        return self.folder / f"{image}.h5"


class StoredGrids:
    """Features of all images in memory: a safetensors file with (images, cells, size) per split.

    An image's name is "<split>/<row>", such as "test/17".
    """

    def __init__(self, file: str | Path):
        self.splits = load_file(file)

    def __contains__(self, image: str) -> bool:
        split, _, row = image.partition("/")
        return split in self.splits and row.isdigit() and int(row) < len(self.splits[split])

    def __call__(self, image: str) -> Tensor:
        """Features (cells, size), float32."""
        if image not in self:
            raise FileNotFoundError(f"image {image!r} has no features in this store")
        split, _, row = image.partition("/")
        return self.splits[split][int(row)].float()
