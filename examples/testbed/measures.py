"""How good the answers to scenes are. The digit is the unit: one of 12 pixels counts as much as one of 200."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .model import Answers
from .scenes import MARKED, Batch


def over_items(values: Tensor, owner: Tensor, items: int) -> Tensor:
    """Sums ``[B, N, …]`` over the patches of each item, ``[B, items, …]``; without an owner (−1) they count nowhere."""
    sums = values.new_zeros(len(values), items + 1, *values.shape[2:])
    index = (owner.flatten(1) + 1).view(*values.shape[:2], *[1] * (values.dim() - 2)).expand_as(values)
    return sums.scatter_add_(1, index, values)[:, 1:]


def extents(batch: Batch) -> Tensor:
    """Number of patches of each item, ``[B, items]``."""
    owner = batch.owner.flatten(1)
    return over_items(torch.ones_like(owner, dtype=torch.float32), owner, batch.classes.shape[1])


@dataclass
class Measures:
    """What was found of a model on scenes, batch by batch."""

    right: list[Tensor] = field(default_factory=list)  # for each digit
    heights: list[Tensor] = field(default_factory=list)  # of the digits
    recognised: list[Tensor] = field(default_factory=list)  # for each digit, whether the model tells which it is
    found: list[Tensor] = field(default_factory=list)  # and what its card asks for
    decisions: list[Tensor] = field(default_factory=list)  # [B, N]
    labels: list[Tensor] = field(default_factory=list)  # [B, N]
    counted: list[Tensor] = field(default_factory=list)  # marked digits, as the model has it
    counts: list[Tensor] = field(default_factory=list)  # and as it is

    def add(self, answers: Answers, batch: Batch) -> None:
        """Notes the answers to a batch."""
        judged, items = batch.judged, batch.classes.shape[1]
        is_marked = over_items(answers.margin, batch.owner, items) > 0
        classes, asked = (over_items(part, batch.owner, items).argmax(-1) for part in (answers.classes, answers.asked))
        self.right.append((is_marked == batch.marked)[judged])
        self.recognised.append((classes == batch.classes)[judged])
        self.found.append((asked == batch.asked)[judged])
        self.heights.append(batch.heights[judged])
        self.decisions.append(answers.decisions.to(torch.uint8))
        self.labels.append(batch.labels().to(torch.uint8))
        self.counted.append(answers.count)
        self.counts.append(batch.count)

    @property
    def digits(self) -> int:
        """Number of digits that were judged."""
        return sum(map(len, self.right))

    @property
    def accuracy(self) -> float:
        """Percentage of digits that are rightly marked or not; 50 by chance."""
        return 100 * float(torch.cat(self.right).float().mean())

    @property
    def recognition(self) -> float:
        """Percentage of digits whose class the model tells; 10 by chance."""
        return 100 * float(torch.cat(self.recognised).float().mean())

    @property
    def lookup(self) -> float:
        """Percentage of digits for which the model tells what the card of their colour asks for."""
        return 100 * float(torch.cat(self.found).float().mean())

    @property
    def iou(self) -> float:
        """Intersection over union of the marked patches, in percent."""
        ours, theirs = (torch.cat(parts) == MARKED for parts in (self.decisions, self.labels))
        return 100 * float((ours & theirs).sum() / (ours | theirs).sum())

    @property
    def count_accuracy(self) -> float:
        """Percentage of scenes whose number of marked digits is right, rounded."""
        return 100 * float((torch.cat(self.counted).round() == torch.cat(self.counts)).float().mean())

    def accuracy_between(self, low: float, high: float) -> float:
        """The accuracy for digits of so many pixels, ``low`` included."""
        heights = torch.cat(self.heights)
        return 100 * float(torch.cat(self.right)[(heights >= low) & (heights < high)].float().mean())

    def agreement(self, other: Measures) -> float:
        """Percentage of patches that another model decides alike."""
        return 100 * float((torch.cat(self.decisions) == torch.cat(other.decisions)).float().mean())


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[Batch], dtype: torch.dtype | None = torch.bfloat16) -> Measures:
    """Runs a model on scenes, under autocast unless ``dtype`` is None."""
    measures = Measures()
    for batch in batches:
        with torch.autocast(batch.images.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            logits = model(batch.images)
        measures.add(Answers.of(logits), batch)
    return measures
