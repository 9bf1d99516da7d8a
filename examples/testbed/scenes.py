"""Scenes on which fidelity of attention can be measured: mark the digits that the card of their colour asks for.

Each corner of a scene holds a card in one of four colours with a digit on it. Over a photograph lie digits in these
colours, rotated, 12 to 200 pixels high. Those are to be marked whose class is that of the card of their colour, which
is drawn by another hand. Half of them are. Most of the others are of the class of another card, so that it does not
help to know which classes are asked for without the colours. Digits are told by detail, and their cards are far away.

The digits are scikit-learn's, the photographs scikit-image's; those of the validation do not occur in training. A
batch is a function of the seed and its number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scene_parts import NUM_CLASSES, drawn, handwritings_by_class, handwritten_digits, square_photographs
from torch import Tensor

PHOTOGRAPHS = {
    "training": (
        "astronaut", "brick", "camera", "cell", "clock", "coins", "grass", "immunohistochemistry", "moon", "retina",
        "rocket",
    ),
    "validation": ("chelsea", "coffee", "gravel", "hubble_deep_field"),
}  # fmt: skip
COLOURS = ((1.0, 0.3, 0.25), (0.3, 0.95, 0.3), (0.35, 0.55, 1.0), (1.0, 0.9, 0.2))  # red, green, blue, yellow
CARDS = len(COLOURS)
NOTHING, OTHER, MARKED = range(3)  # labels of a patch

MEAN, STD = 0.4, 0.25  # of pixels in [0, 1], about
_PHOTOGRAPH_SIDE = 512
_LARGEST_TURN = math.radians(25)  # of digits
_TRIES = 24  # places that are tried for a digit
_FROM_OTHER_CARDS = 0.75  # share of the unmarked digits whose class is that of another card


@dataclass(frozen=True)
class Setting:
    """Sizes of scenes.

    Args:
        size: side of the image in pixels.
        patch: side of a patch in pixels.
        digits: digits per scene; those that find no place are left out.
        digit_sizes: smallest and largest height of a digit in pixels, even on a logarithmic axis in between. A digit
            of 1.5 patches or more covers the centre of a patch wherever it lies.
        card: side of a card in pixels.
    """

    size: int = 512
    patch: int = 8
    digits: int = 12
    digit_sizes: tuple[float, float] = (12.0, 200.0)
    card: int = 64

    @property
    def side(self) -> int:
        """Patches per row and per column."""
        return self.size // self.patch


@dataclass(frozen=True)
class Batch:
    """Scenes and what is in them. Items are the cards' digits, then those to be judged, largest first.

    Args:
        images: normalised, ``[B, 3, size, size]``.
        owner: the item whose square covers the centre of each patch, −1 for none: ``[B, side, side]``.
        classes: what digit each item is, ``[B, items]``.
        colours: index of each item's colour, ``[B, items]``.
        asked: class that the card of an item's colour shows, ``[B, items]``.
        present: which items are in the scene; cards' always are.
        heights: of items in pixels, ``[B, items]``.
        place: ``[B, items, 2, 3]``, from (x, y, 1) of the scene to (x, y) of the item's square; x and y range from −1
            to 1 in both.
    """

    images: Tensor
    owner: Tensor
    classes: Tensor
    colours: Tensor
    asked: Tensor
    present: Tensor
    heights: Tensor
    place: Tensor

    @property
    def judged(self) -> Tensor:
        """Items that are to be marked or not: digits in the scene, not on cards; bool ``[B, items]``."""
        judged = self.present.clone()
        judged[:, :CARDS] = False
        return judged

    @property
    def marked(self) -> Tensor:
        """Items that are to be marked, bool ``[B, items]``."""
        return self.judged & (self.classes == self.asked)

    @property
    def count(self) -> Tensor:
        """The label of the whole scene: how many digits are to be marked, ``[B]``."""
        return self.marked.sum(-1)

    def labels(self) -> Tensor:
        """``NOTHING``, ``OTHER`` or ``MARKED`` for each patch, ``[B, side · side]``."""
        of_items = torch.where(self.judged, torch.where(self.marked, MARKED, OTHER), NOTHING)
        owner = self.owner.flatten(1)
        return torch.where(owner < 0, NOTHING, of_items.gather(1, owner.clamp(min=0)))


class Scenes:
    """Batches of scenes, made on the device.

    Args:
        setting: sizes.
        device: where batches are made and returned.
        seed: of everything that is drawn.
    """

    def __init__(self, setting: Setting, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.setting, self.device, self.seed = setting, torch.device(device), seed
        digits, labels = handwritten_digits()
        self._digits = digits.to(self.device)
        self._photographs = {
            split: square_photographs(names, _PHOTOGRAPH_SIDE).to(self.device) for split, names in PHOTOGRAPHS.items()
        }
        self._hands, self._num_hands = {}, {}
        for split, hands in handwritings_by_class(labels).items():
            self._hands[split] = torch.nn.utils.rnn.pad_sequence(hands, batch_first=True)  # [10, most]
            self._num_hands[split] = torch.tensor([len(hand) for hand in hands])

    def batch(self, split: str, index: int, count: int) -> Batch:
        """Batch number ``index`` of ``count`` scenes.

        Args:
            split: ``"training"`` or ``"validation"``.
        """
        # What is in the scenes is drawn on the CPU, so that it is the same on every device.
        generator = torch.Generator().manual_seed(hash((self.seed, split == "training", index)) % 2**63)
        classes, colours, asked = _contents(count, self.setting.digits, generator)
        hands = self._hands_of(classes, split, generator)
        heights, centres, present = _layout(count, self.setting, generator)
        turns = _LARGEST_TURN * (2 * torch.rand(heights.shape, generator=generator) - 1)
        place = _place(heights, centres, turns, self.setting.size)
        ink = torch.tensor(COLOURS)[colours] * (0.85 + 0.15 * torch.rand(*colours.shape, 1, generator=generator))
        theta, level, contrast = _background(count, generator)
        photograph = torch.randint(len(self._photographs[split]), (count,), generator=generator)
        shade = 0.35 + 0.1 * torch.rand(count, CARDS, 1, generator=generator)

        send = self._send
        images = self._photographed(self._photographs[split][send(photograph)], send(theta))
        images.mul_(send(contrast)).add_(send(level))
        place, present, ink = send(place), send(present), send(ink)
        self._lay_cards(images, ink[:, :CARDS] * send(shade))
        self._draw(images, self._digits[send(hands)], place, ink, present)
        return Batch(
            images.sub_(MEAN).div_(STD),
            _owner(place, present, self.setting.side),
            send(classes),
            send(colours),
            send(asked),
            present,
            send(heights),
            place,
        )

    def _send(self, part: Tensor) -> Tensor:
        """The tensor on the device, which does not wait for it."""
        return part.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else part

    def _hands_of(self, classes: Tensor, split: str, generator: torch.Generator) -> Tensor:
        """Which handwritten digit each item is, ``[B, items]``; never the one on the card of the same class."""
        of_cards = torch.rand(len(classes), NUM_CLASSES, generator=generator).gather(1, classes)
        other = torch.rand(classes.shape, generator=generator)
        numbers = self._num_hands[split][classes]
        chosen = (of_cards * numbers).long()
        chosen[:, CARDS:] += 1 + (other * (numbers - 1)).long()[:, CARDS:]
        return self._hands[split][classes, chosen % numbers]

    def _photographed(self, photographs: Tensor, theta: Tensor) -> Tensor:
        """Photographs, turned and cropped: ``[B, 3, size, size]``."""
        size = self.setting.size
        grid = F.affine_grid(theta, [len(theta), 3, size, size], align_corners=False)
        return F.grid_sample(photographs, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def _lay_cards(self, images: Tensor, colours: Tensor) -> None:
        """Paints the cards into the corners, in the plain colours ``[B, cards, 3]``."""
        card = self.setting.card
        for corner in range(CARDS):
            rows = slice(-card, None) if corner // 2 else slice(card)
            columns = slice(-card, None) if corner % 2 else slice(card)
            images[:, :, rows, columns] = colours[:, corner, :, None, None]

    def _draw(self, images: Tensor, digits: Tensor, place: Tensor, ink: Tensor, present: Tensor) -> None:
        """Paints the items into the images."""
        for item in range(digits.shape[1]):
            opacity = drawn(digits[:, item], place[:, item], self.setting.size) * present[:, item, None, None, None]
            images.lerp_(ink[:, item, :, None, None], opacity)


def _contents(count: int, digits: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Classes, colours and asked classes of the items, ``[B, items]`` each."""
    shuffled = torch.rand(count, NUM_CLASSES, generator=generator).argsort(-1)  # those of the cards first
    on_card = torch.rand(count, CARDS, generator=generator).argsort(-1)  # colour of the card in each corner
    card_of = on_card.argsort(-1)  # corner of the card of each colour
    colour = torch.randint(CARDS, (count, digits), generator=generator)
    card = card_of.gather(1, colour)
    other_card = (card + torch.randint(1, CARDS, (count, digits), generator=generator)) % CARDS
    not_asked = torch.randint(CARDS, NUM_CLASSES, (count, digits), generator=generator)
    is_marked, is_other_card = torch.rand(2, count, digits, generator=generator) < torch.tensor(
        [0.5, _FROM_OTHER_CARDS]
    ).view(2, 1, 1)
    position = torch.where(is_marked, card, torch.where(is_other_card, other_card, not_asked))
    classes = torch.cat([shuffled[:, :CARDS], shuffled.gather(1, position)], 1)
    asked = torch.cat([shuffled[:, :CARDS], shuffled.gather(1, card)], 1)
    return classes, torch.cat([on_card, colour], 1), asked


def _layout(count: int, setting: Setting, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Heights ``[B, items]`` and centres ``[B, items, 2]`` of the items in pixels, and which found a place."""
    smallest, largest = setting.digit_sizes
    heights = smallest * (largest / smallest) ** torch.rand(count, setting.digits, generator=generator)
    heights = heights.sort(-1, descending=True).values  # the largest first, while there is room
    radii = heights / 2**0.5  # of the circle around a square, however it is turned
    tries = torch.rand(count, setting.digits, _TRIES, 2, generator=generator)
    tries = radii[..., None, None] + tries * (setting.size - 2 * radii[..., None, None])
    near_edge = setting.size / 2 - (tries - setting.size / 2).abs()  # distance to the nearer edge, along each axis
    gap = (near_edge - setting.card).clamp(min=0).norm(dim=-1)  # to the nearest card
    is_free = (gap >= radii[..., None]) & (2 * radii[..., None] <= setting.size)  # [B, digits, tries]
    centres = torch.zeros(count, setting.digits, 2)
    present = torch.zeros(count, setting.digits, dtype=torch.bool)
    for item in range(setting.digits):
        apart = torch.cdist(tries[:, item], centres[:, :item])  # [B, tries, items placed]
        collides = (apart < radii[:, item, None, None] + radii[:, None, :item]) & present[:, None, :item]
        fits = is_free[:, item] & ~collides.any(-1)
        present[:, item] = fits.any(-1)
        centres[:, item] = tries[torch.arange(count), item, fits.int().argmax(-1)]
    low, high = setting.card / 2, setting.size - setting.card / 2
    corners = torch.tensor([(x, y) for y in (low, high) for x in (low, high)])
    return (
        torch.cat([torch.full((count, CARDS), 0.6 * setting.card), heights], 1),
        torch.cat([corners.expand(count, -1, -1), centres], 1),
        torch.cat([torch.ones(count, CARDS, dtype=torch.bool), present], 1),
    )


def _place(heights: Tensor, centres: Tensor, turns: Tensor, size: int) -> Tensor:
    """The affine maps from the scene to the items' squares, ``[B, items, 2, 3]``."""
    cos, sin = turns.cos(), turns.sin()
    turn = torch.stack([cos, sin, -sin, cos], -1).unflatten(-1, (2, 2)) * (size / heights)[..., None, None]
    centres = 2 * centres / size - 1
    return torch.cat([turn, -turn @ centres[..., None]], -1)


def _owner(place: Tensor, present: Tensor, side: int) -> Tensor:
    """The item whose square covers the centre of each patch, −1 for none: ``[B, side, side]``."""
    axis = (2 * torch.arange(side, device=place.device) + 1) / side - 1
    x, y = axis.expand(side, side), axis[:, None].expand(side, side)
    where = torch.stack([x, y, torch.ones_like(x)]).flatten(1)  # [3, side · side]
    is_inside = ((place @ where).abs() < 1).all(-2) & present[..., None]  # [B, items, side · side]
    owner = torch.where(is_inside.any(1), is_inside.int().argmax(1), -1)
    return owner.unflatten(-1, (side, side))


def _background(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """How photographs are turned, cropped and toned down: maps ``[B, 2, 3]``, level and contrast ``[B, 3, 1, 1]``."""
    turn = 2 * math.pi * torch.rand(count, generator=generator)
    zoom = 0.4 + 0.6 * torch.rand(count, generator=generator)
    mirror = 1.0 - 2.0 * torch.randint(2, (count,), generator=generator)
    shift = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - zoom[:, None])
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    theta = torch.stack([mirror * cos, -sin, shift[:, 0], mirror * sin, cos, shift[:, 1]], -1).unflatten(-1, (2, 3))
    contrast = 0.3 + 0.3 * torch.rand(count, 1, 1, 1, generator=generator)
    contrast = contrast * (0.8 + 0.4 * torch.rand(count, 3, 1, 1, generator=generator))
    return theta, 0.33 - 0.5 * contrast, contrast
