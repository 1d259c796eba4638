"""How near drawings come to a subject's pictures (DreamBooth, arXiv 2208.12242, section 4.1)."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from oplora.studies.sdxl.images import Encoder, Picture, features


class Fidelity:
    """Mean cosines of features between sets of pictures, by the name of the encoder.

    encoders: image encoders (`oplora.studies.sdxl.images.Encoder`) by the name of the metric:
    dino, clip_i, …
    """

    def __init__(self, encoders: Mapping[str, Encoder]):
        self.encoders = dict(encoders)

    def features(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """Unit features (n, d) of each encoder."""
        return {
            name: torch.nn.functional.normalize(features(pictures, encoder), dim=1)
            for name, encoder in self.encoders.items()
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


class TransformersViT:
    """The class token (n, d) of a vision transformer and its own preprocessing; DINO's ViT-S/16."""

    def __init__(self, pretrained_model_name_or_path: str, revision: str | None = None):
        source = pretrained_model_name_or_path
        self.processor = AutoImageProcessor.from_pretrained(source, revision=revision)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModel.from_pretrained(source, revision=revision)
        self.model = model.eval().to(self.device)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        return self.model(pixels.to(self.device)).last_hidden_state[:, 0]
