"""Patterns made of patterns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..token_grid import TokenGrid
from .base import Pattern, check_count, check_pattern
from .local import LocalWindow


@dataclass(frozen=True)
class Hybrid(Pattern):
    """Some heads one pattern, the rest another: ``Hybrid(Dense(), LocalWindow(0.1), heads=2)`` keeps two heads dense.

    Args:
        first: pattern of the heads named.
        rest: pattern of all other heads.
        heads: the number of leading heads, or the head indices, that take ``first``. Groups of more than two patterns
            are made by nesting.
    """

    first: Pattern
    rest: Pattern
    heads: int | tuple[int, ...]

    def __post_init__(self) -> None:
        check_pattern(self, "first", self.first)
        check_pattern(self, "rest", self.rest)
        if not isinstance(self.heads, int):
            object.__setattr__(self, "heads", tuple(self.heads))
        for head in (self.heads,) if isinstance(self.heads, int) else self.heads:
            check_count(self, "heads", head, least=0)

    def blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        heads = range(self.heads) if isinstance(self.heads, int) else self.heads
        if any(head >= num_heads for head in heads):
            raise ValueError(f"Hybrid: heads must lie below the number of heads, {num_heads}, got {self.heads}")
        takes_first = torch.zeros(num_heads, 1, 1, dtype=torch.bool)
        takes_first[list(heads)] = True
        first = self.first.blocks(query_grid, key_grid, num_heads)
        return torch.where(takes_first, first, self.rest.blocks(query_grid, key_grid, num_heads))


@dataclass(frozen=True)
class ImageToPrompt(Pattern):
    """Prompt tokens, the suffix, see and are seen by everything; among patches a pattern of its own holds.

    Args:
        image: pattern among the patches.

    Raises:
        ValueError: when a mask is asked for on grids of which neither has a suffix.
    """

    image: Pattern = field(default_factory=lambda: LocalWindow(density=0.25))

    def __post_init__(self) -> None:
        check_pattern(self, "image", self.image)

    def blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        if query_grid.suffix == 0 and key_grid.suffix == 0:
            raise ValueError(f"ImageToPrompt: grid must have suffix tokens, which are the prompts, got {query_grid}")
        blocks = self.image.blocks(query_grid, key_grid, num_heads).clone()
        blocks[:, query_grid.tile_blocks.stop :] = True
        blocks[:, :, key_grid.tile_blocks.stop :] = True
        return blocks
