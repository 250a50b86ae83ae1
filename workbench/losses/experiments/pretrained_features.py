"""What a network trained on photographs sees in handwritten digits."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from workbench.lab import data, pretrained


def available() -> bool:
    """Whether the weights of EfficientNet-Lite0 are on this machine."""
    return data.find("efficientnet_lite0") is not None


@torch.no_grad()
def digit_features(
    seed: int = 0, *, rows: int = 5000, side: int = 56, batch_size: int = 100
) -> dict[str, Any]:
    """EfficientNet-Lite0's 1,280 features of MNIST-5000, enlarged and grey in three channels.

    Args:
        seed: which rows are taken, as of `lab.data.Arrays.sample`.
        rows: how many images.
        side: pixels a side after bilinear enlargement.
        batch_size: images passed through together.

    Returns:
        ``features`` (rows, 1280) in half precision, ``y`` (rows,).
    """
    images, y = data.mnist5000().sample(rows, seed).tensors()
    network = pretrained.efficientnet_lite0()
    parts = []
    for batch in images.split(batch_size):
        large = F.interpolate(batch, size=(side, side), mode="bilinear")
        parts.append(network.features(large.expand(-1, 3, -1, -1)).half())
    return {"features": torch.cat(parts).numpy(), "y": y.numpy()}
