"""Photographs that ship with scikit-image, as normalised image tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("astronaut", "chelsea", "coffee")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which all the models here were trained with


def photographs(size: int, device: torch.device) -> list[Tensor]:
    """One tensor ``[1, 3, size, size]`` per photograph: its central square, resampled and normalised."""
    from skimage import data

    images = []
    for name in NAMES:
        pixels = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)[None].float() / 255  # [1, 3, H, W]
        side = min(pixels.shape[-2:])
        top, left = (pixels.shape[-2] - side) // 2, (pixels.shape[-1] - side) // 2
        square = pixels[..., top : top + side, left : left + side]
        resampled = F.interpolate(square, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        images.append(((resampled - mean) / std).to(device))
    return images
