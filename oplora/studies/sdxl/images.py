"""Distances between sets of images (Table 1) and the encoders whose features they compare.

An encoder is called on a list of RGB PIL images and returns their features (n, d).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.multimodal import CLIPScore
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModelWithProjection,
)

from oplora.harness.efficientnet import efficientnet_lite0, normalized
from oplora.harness.finetuning import device
from oplora.studies.sdxl.cmmd import mmd, mmd_interval

Picture = str | Path | Image.Image
Encoder = Callable[[Sequence[Image.Image]], Tensor]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
INCEPTION_SIZE = 299


class ImageDistance:
    """MMD between two sets of images with its 95% interval, under the name of what it compares.

    name: the metric's column, "cmmd" for CLIP ViT-L/14@336 only.
    """

    def __init__(self, name: str, encoder: Encoder, batch_size: int = 32):
        self.name, self.encoder, self.batch_size = name, encoder, batch_size

    def features(self, images: Sequence[Picture]) -> Tensor:
        """Features (n, d) of the images: give them in place of images that are compared often."""
        return features(images, self.encoder, self.batch_size)

    def __call__(
        self, generated: Sequence[Picture] | Tensor, reference: Sequence[Picture] | Tensor
    ) -> dict[str, float]:
        """Distance of two sets, of at least 2 images each; they may differ in size.

        Keys: name, name_low, name_high (`oplora.studies.sdxl.cmmd.mmd_interval`).
        """
        x, y = self._rows(generated, "generated"), self._rows(reference, "reference")
        low, high = mmd_interval(x, y)
        return {self.name: mmd(x, y), f"{self.name}_low": low, f"{self.name}_high": high}

    def floor(self, images: Sequence[Picture] | Tensor, seed: int = 0) -> float:
        """Distance of a random half of the images to the other half: what equality looks like.

        It falls as 1/n, so two full sets of this size have about half of it.
        """
        rows = self._rows(images, "floor's", least=4)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        half = len(rows) // 2
        return mmd(rows[order[:half]], rows[order[half:]])

    def _rows(self, images: Sequence[Picture] | Tensor, which: str, least: int = 2) -> Tensor:
        if len(images) < least:
            raise ValueError(
                f"{self.name}: {len(images)} {which} image(s), at least {least} are needed"
            )
        return images if isinstance(images, Tensor) else self.features(images)


def features(images: Sequence[Picture], encoder: Encoder, batch_size: int = 32) -> Tensor:
    """Features (n, d), float32, of image files or PIL images.

    ValueError names the file that is damaged or whose features are not finite.
    """
    if not len(images):
        raise ValueError("no images: give at least one")
    found = []
    with tqdm(total=len(images), desc="Image features", unit="image", leave=False) as bar:
        for batch in _batches(images, batch_size):
            with torch.no_grad():
                rows = encoder([open_rgb(image) for image in batch]).float().cpu()
            if len(bad := (~rows.isfinite().all(1)).nonzero()):
                place = bad[0].item()
                raise ValueError(
                    f"image {bar.n + place} ({batch[place]}) has NaN or infinite features"
                )
            found.append(rows)
            bar.update(len(batch))
    return torch.cat(found)


def side_metrics(
    generated: Sequence[Picture],
    reference: Sequence[Picture],
    captions: Sequence[str],
    metrics: Mapping[str, Metric],
    batch_size: int = 32,
) -> dict[str, float]:
    """Columns beside the MMD: torchmetrics' FID, KID and CLIPScore, by the name of the column.

    captions: of the generated images. FID and KID see centre crops at 299 pixels, CLIPScore
    whole images. A metric of two values (KID) gives `name` and `name_std`.
    """
    if len(generated) != len(captions):
        raise ValueError(f"{len(generated)} generated images, but {len(captions)} captions")
    if not metrics:
        return {}
    for metric in metrics.values():
        metric.to(device()).reset()
    scores = [metric for metric in metrics.values() if isinstance(metric, CLIPScore)]
    distances = [metric for metric in metrics.values() if not isinstance(metric, CLIPScore)]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)  # KID draws subsets
        for images, real in ((generated, False), (reference, True)):
            for batch in _batches(images, batch_size):
                crops = _pixels([square(open_rgb(image), INCEPTION_SIZE) for image in batch])
                for metric in distances:
                    metric.update(crops.to(metric.device), real=real)
        for image, caption in zip(generated, captions, strict=True):
            whole = _pixels([open_rgb(image)])[0]
            for metric in scores:
                metric.update(whole.to(metric.device), caption)
        values = {name: metric.compute() for name, metric in metrics.items()}
    result = {}
    for name, value in values.items():
        mean, *std = value if isinstance(value, tuple) else (value,)
        result[name] = mean.item()
        result |= {f"{name}_std": each.item() for each in std}
    return result


class OpenClip:
    """CLIP's image embeddings through open_clip (CMMD: ViT-L-14-336 with OpenAI's weights)."""

    def __init__(self, model: str = "ViT-L-14-336", pretrained: str = "openai"):
        try:
            import open_clip
        except ImportError as error:
            raise ImportError(f"{error}: OpenClip needs `pip install -e '.[paper]'`") from error
        # OpenAI trained with QuickGELU; without the flag open_clip only warns of the mismatch.
        quick = pretrained == "openai"
        model = open_clip.create_model(model, pretrained=pretrained, force_quick_gelu=quick)
        self.model = model.eval().to(device())
        self.size = model.visual.image_size[0]

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        return self.model.encode_image(clip_pixels(images, self.size).to(device()))


class TransformersClip:
    """The same embeddings through transformers (CMMD: openai/clip-vit-large-patch14-336)."""

    def __init__(self, pretrained_model_name_or_path: str, revision: str | None = None):
        model = CLIPVisionModelWithProjection.from_pretrained(
            pretrained_model_name_or_path, revision=revision
        )
        self.model = model.eval().to(device())
        self.size = model.config.image_size

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        return self.model(clip_pixels(images, self.size).to(device())).image_embeds


class TransformersViT:
    """The class token (n, d) of a vision transformer after its own preprocessing (DINO)."""

    def __init__(self, pretrained_model_name_or_path: str, revision: str | None = None):
        self.processor, model = (
            kind.from_pretrained(pretrained_model_name_or_path, revision=revision)
            for kind in (AutoImageProcessor, AutoModel)
        )
        self.model = model.eval().to(device())

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        return self.model(pixels.to(device())).last_hidden_state[:, 0]


class EfficientNetLite0:
    """ImageNet features (n, 1280) of EfficientNet-Lite0: its last feature map, averaged.

    folder, size: `oplora.harness.efficientnet.efficientnet_lite0`.
    """

    def __init__(self, folder: str | Path, size: int = 112):
        self.model = efficientnet_lite0(folder, size).to(device())
        self.size = size

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = _pixels([square(image, self.size) for image in images]).to(device())
        return self.model.extract_features(normalized(pixels)).mean((2, 3))


class _TensorClip(CLIPModel):
    """CLIP as torchmetrics 1.9 calls it: from transformers 5 on, features come wrapped."""

    def get_image_features(self, *args, **kwargs) -> Tensor:
        return super().get_image_features(*args, **kwargs).pooler_output

    def get_text_features(self, *args, **kwargs) -> Tensor:
        return super().get_text_features(*args, **kwargs).pooler_output


def clip_and_processor(
    pretrained_model_name_or_path: str, revision: str | None = None
) -> tuple[CLIPModel, CLIPProcessor]:
    """What torchmetrics' CLIPScore takes (as a partial) for its `model_name_or_path`."""
    return tuple(
        cls.from_pretrained(pretrained_model_name_or_path, revision=revision)
        for cls in (_TensorClip, CLIPProcessor)
    )


def open_rgb(image: Picture) -> Image.Image:
    """The image in RGB, what is transparent on white; ValueError names a file that is damaged."""
    if not isinstance(image, Image.Image):
        try:
            with Image.open(image) as file:
                file.load()
                image = file.copy()
        except FileNotFoundError:
            raise
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{image} is damaged or no image ({error}): delete it and make it again"
            ) from error
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def clip_pixels(images: Sequence[Image.Image], size: int) -> Tensor:
    """CLIP's input (n, 3, size, size): centre crop, bicubic, CLIP's normalisation."""
    pixels = _pixels([square(image, size) for image in images]).float() / 255
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def square(image: Image.Image, size: int) -> Image.Image:
    """Centre crop to the short side, then bicubic (with antialiasing) to size × size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    crop = image.crop((left, top, left + side, top + side))
    return crop.resize((size, size), Image.Resampling.BICUBIC)


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size as uint8 (n, 3, height, width)."""
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    """One after the other: a column of a data set decodes its images when it is sliced."""
    for first in range(0, len(items), size):
        yield items[first : first + size]
