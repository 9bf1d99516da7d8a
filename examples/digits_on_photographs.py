"""A task for fine-tuning without a download: which digit is written all over a photograph?

The digits are scikit-learn's 1797 handwritten ones, the photographs are those that ship with scikit-image. An image is
a random crop of a photograph with digits of one class on it, each by another hand, at random places and in any size.
Handwritings of the validation images do not occur in training. A batch is a function of the seed and its number, so a
training run that is resumed sees what it would have seen.
"""

from __future__ import annotations

import torch
from scene_parts import NUM_CLASSES, drawn, handwritings_by_class, handwritten_digits, square_photographs
from torch import Tensor

PHOTOGRAPHS = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "moon", "rocket")
MEAN, STD = 0.4, 0.25  # of pixels in [0, 1], about
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

    num_classes = NUM_CLASSES

    def __init__(
        self, size: int, digit_sizes: tuple[float, float], copies: int, device: torch.device, seed: int = 0
    ) -> None:
        self.size, self.digit_sizes, self.copies, self.device, self.seed = size, digit_sizes, copies, device, seed
        self._photographs = square_photographs(PHOTOGRAPHS, round(_MARGIN * size)).movedim(1, -1).to(device)
        digits, labels = handwritten_digits()
        self._digits = digits.to(device)
        self._by_class = handwritings_by_class(labels)

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
            parts = uniform(0, 1).tolist()
            chosen = torch.stack([hand[int(part * len(hand))] for hand, part in zip(hands, parts)])
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
        return drawn(digits, place, self.size)
