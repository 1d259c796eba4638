"""Grid features of images by CLIP RN101, for the paper preset of VL-BART.

python scripts/extract_clip_features.py IMAGES DATASETS/COCO/clip_features/data_clip_RN101_att

One file per image in VL-Adapter's format: <name>.h5 with the array "<name>/features" (49, 2048),
the 7×7 cells of the last block. Files that are there already are skipped, so a cut run goes on.
Needs `pip install -e '.[paper]'` (h5py, open_clip_torch and with it torchvision).
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from oplora.studies.vl_bart.grids import cells_of, layer_output

SIZE = 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ENDINGS = {".jpg", ".jpeg", ".png"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="a folder of images")
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    count = extract(arguments.images, arguments.out, clip_rn101(), arguments.batch_size)
    print(f"{count} new files in {arguments.out}")


def clip_rn101() -> Callable[[Tensor], Tensor]:
    """RGB pixels (n, 3, 224, 224) in 0…1 to cells (n, 49, 2048)."""
    try:
        import open_clip
    except ImportError as error:
        raise SystemExit(f"{error}: install it with `pip install -e '.[paper]'`") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = open_clip.create_model("RN101", pretrained="openai", force_quick_gelu=True)
    network = model.visual.eval().to(device)
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))

    def cells(pixels: Tensor) -> Tensor:
        return cells_of(layer_output(network, "layer4", (pixels.to(device) - mean) / std))

    return cells


def extract(
    images: Path, out: Path, cells: Callable[[Tensor], Tensor], batch_size: int = 64
) -> int:
    """Write the missing files below `out`; their number. A damaged image is an error by name."""
    if not images.is_dir():
        raise FileNotFoundError(f"{images} is no folder: give the folder of the images")
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in ENDINGS)
    if not files:
        raise ValueError(f"{images} holds no image ({', '.join(sorted(ENDINGS))})")
    todo = [path for path in files if not (out / f"{path.stem}.h5").exists()]
    for first in tqdm(range(0, len(todo), batch_size), desc="Features", unit="batch"):
        batch = todo[first : first + batch_size]
        features = cells(torch.stack([pixels(path) for path in batch])).float().cpu().numpy()
        for path, values in zip(batch, features, strict=True):
            write(out / f"{path.stem}.h5", path.stem, values)
    return len(todo)


def pixels(path: Path) -> Tensor:
    """An image squashed to 224×224, bicubic as upstream: (3, 224, 224) in 0…1."""
    try:
        image = Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    except OSError as error:
        raise ValueError(f"{path} is damaged or no image ({error}): replace it") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def write(path: Path, name: str, values: Sequence) -> None:
    """The file appears complete or not at all."""
    import h5py

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with h5py.File(temporary, "w") as file:
        file[f"{name}/features"] = values
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
