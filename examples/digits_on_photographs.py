"""A task for fine-tuning without a download: which digit is written all over a photograph?

The digits are scikit-learn's 1797 handwritten ones, the photographs are those that ship with scikit-image. An image is
a random crop of a photograph with digits of one class on it, each by another hand, at random places and in any size.
Handwritings of the validation images do not occur in training. A batch is a function of the seed and its number, so a
training run that is resumed sees what it would have seen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PHOTOGRAPHS = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "moon", "rocket")
MEAN, STD = 0.4, 0.25  # of pixels in [0, 1], about
_TRAINING_SHARE = 0.75
_MARGIN = 1.25  # side of the photographs over that of the crops


class DigitsOnPhotographs:
    """Batches of images and labels, made on the device.

    Args:
        size: side of the images in pixels.
        digit_sizes: smallest and largest side of a digit in pixels.
        copies: digits per image.
        device: where batches are made and returned.
        seed: of everything that is drawn.
    """

    num_classes = 10

    def __init__(
        self, size: int, digit_sizes: tuple[float, float], copies: int, device: torch.device, seed: int = 0
    ) -> None:
        self.size, self.digit_sizes, self.copies, self.device, self.seed = size, digit_sizes, copies, device, seed
        self._photographs = _photographs(round(_MARGIN * size)).movedim(1, -1).to(device)  # [P, S, S, 3]
        digits, labels = _digits()
        self._digits = digits.to(device)  # [1797, 1, 8, 8]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        count = round(_TRAINING_SHARE * len(labels))
        self._by_class = {
            split: [chosen[labels[chosen] == label] for label in range(self.num_classes)]
            for split, chosen in (("training", order[:count]), ("validation", order[count:]))
        }

    def batch(self, split: str, index: int, count: int) -> tuple[Tensor, Tensor]:
        """Images ``[count, 3, size, size]``, normalised, and labels ``[count]`` of one batch.

        Args:
            split: ``"training"`` or ``"validation"``.
            index: number of the batch.
            count: number of images.
        """
        generator = torch.Generator().manual_seed(hash((self.seed, split == "training", index)) % 2**63)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=generator)

        labels = torch.randint(self.num_classes, (count,), generator=generator)
        background = self._crops(generator, count)
        background = 0.35 + (background - 0.5) * uniform(0.3, 0.7, 1, 1, 1).to(self.device)
        ink = torch.zeros(count, 1, self.size, self.size, device=self.device)
        smallest, largest = (side / self.size for side in self.digit_sizes)
        for _ in range(self.copies):
            hands = [self._by_class[split][label] for label in labels.tolist()]
            drawn = uniform(0, 1).tolist()
            chosen = torch.stack([hand[int(part * len(hand))] for hand, part in zip(hands, drawn)])
            scale = smallest * (largest / smallest) ** uniform(0, 1)  # even on a logarithmic axis
            centre = uniform(-1, 1, 2) * (1 - scale[:, None])
            ink = torch.maximum(ink, self._placed(self._digits[chosen.to(self.device)], centre, scale))
        colour = uniform(0.7, 1, 3, 1, 1).to(self.device)
        images = background + ink * (colour - background)
        return (images - MEAN) / STD, labels.to(self.device)

    def _crops(self, generator: torch.Generator, count: int) -> Tensor:
        """Random crops of random photographs, some mirrored: ``[count, 3, size, size]`` in [0, 1]."""
        room = self._photographs.shape[1] - self.size
        photograph = torch.randint(len(self._photographs), (count, 1, 1), generator=generator)
        top, left = torch.randint(room + 1, (2, count, 1), generator=generator)
        pixels = torch.arange(self.size)
        is_mirrored = torch.rand(count, 1, generator=generator) < 0.5
        rows, columns = top + pixels, left + torch.where(is_mirrored, self.size - 1 - pixels, pixels)
        index = (photograph, rows[:, :, None], columns[:, None])
        return self._photographs[tuple(part.to(self.device) for part in index)].movedim(-1, 1)

    def _placed(self, digits: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
        """Digits ``[B, 1, 8, 8]`` at their places on an empty canvas, ``[B, 1, size, size]``."""
        turn = torch.eye(2) / scale[:, None, None]
        shift = -centre / scale[:, None]
        place = torch.cat([turn, shift[..., None]], dim=-1).to(self.device)  # [B, 2, 3]
        grid = F.affine_grid(place, [len(digits), 1, self.size, self.size], align_corners=False)
        return F.grid_sample(digits, grid, mode="bilinear", align_corners=False)


def _digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits ``[1797, 1, 8, 8]`` in [0, 1] and what they are."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return torch.from_numpy(loaded.images).float()[:, None] / 16, torch.from_numpy(loaded.target).long()


def _photographs(side: int) -> Tensor:
    """Square photographs ``[P, 3, side, side]`` in [0, 1]."""
    from skimage import data

    squares = []
    for name in PHOTOGRAPHS:
        pixels = torch.from_numpy(getattr(data, name)().copy()).float() / 255
        pixels = pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels.expand(3, -1, -1)  # [3, H, W]
        shorter = min(pixels.shape[-2:])
        top, left = (pixels.shape[-2] - shorter) // 2, (pixels.shape[-1] - shorter) // 2
        square = pixels[None, :, top : top + shorter, left : left + shorter]
        squares.append(F.interpolate(square, (side, side), mode="bilinear", antialias=True, align_corners=False))
    return torch.cat(squares).clamp(0, 1)
