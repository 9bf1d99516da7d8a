"""What scenes without a download are made of: scikit-learn's handwritten digits, scikit-image's photographs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_CLASSES = 10
_TRAINING_SHARE = 0.75


def handwritten_digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits ``[1797, 1, 8, 8]`` in [0, 1] and what they are, ``[1797]``."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return torch.from_numpy(loaded.images).float()[:, None] / 16, torch.from_numpy(loaded.target).long()


def handwritings_by_class(labels: Tensor) -> dict[str, list[Tensor]]:
    """For ``"training"`` and ``"validation"``, which share no digit: the indices of the digits of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    count = round(_TRAINING_SHARE * len(labels))
    return {
        split: [chosen[labels[chosen] == label] for label in range(NUM_CLASSES)]
        for split, chosen in (("training", order[:count]), ("validation", order[count:]))
    }


def square_photographs(names: Sequence[str], side: int) -> Tensor:
    """The central squares of photographs of ``skimage.data``, ``[P, 3, side, side]`` in [0, 1]."""
    from skimage import data

    squares = []
    for name in names:
        pixels = torch.from_numpy(getattr(data, name)().copy()).float() / 255
        pixels = pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels.expand(3, -1, -1)  # [3, H, W]
        shorter = min(pixels.shape[-2:])
        top, left = (pixels.shape[-2] - shorter) // 2, (pixels.shape[-1] - shorter) // 2
        square = pixels[None, :, top : top + shorter, left : left + shorter]
        squares.append(F.interpolate(square, (side, side), mode="bilinear", antialias=True, align_corners=False))
    return torch.cat(squares).clamp(0, 1)


def drawn(digits: Tensor, place: Tensor, size: int) -> Tensor:
    """Digits ``[B, 1, 8, 8]`` on an empty canvas, ``[B, 1, size, size]``.

    Args:
        digits: what is drawn.
        place: ``[B, 2, 3]``, takes (x, y, 1) of the canvas to (x, y) of the digit; both range from −1 to 1.
        size: side of the canvas in pixels.
    """
    grid = F.affine_grid(place, [len(digits), 1, size, size], align_corners=False)
    return F.grid_sample(digits, grid, mode="bilinear", align_corners=False)
