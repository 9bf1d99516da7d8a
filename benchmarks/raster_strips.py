"""The masks of systems whose blocks are 128 consecutive tokens in raster order: strips of the image, not tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_attn_modules import BlockMask, Dense, Pattern, TokenGrid, patch_model
from sparse_attn_modules.modules import SparseAttention


@dataclass(frozen=True)
class RasterStrips(Pattern):
    """A pattern on the sequence of all tokens, as if it were no image. On 64 × 64 patches a block is two rows of them.

    Args:
        pattern: chooses among the strips as it does among tiles, by their distance along the sequence.
    """

    pattern: Pattern

    def mask(
        self,
        query_grid: TokenGrid,
        num_heads: int,
        *,
        key_grid: TokenGrid | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        queries, keys = _sequences(query_grid, key_grid)
        return self.pattern.mask(queries, num_heads, key_grid=keys, device=device)

    def is_dynamic_on(self, query_grid: TokenGrid, key_grid: TokenGrid) -> bool:
        return self.pattern.is_dynamic_on(*_sequences(query_grid, key_grid))

    def select(
        self, query: Tensor, key: Tensor, query_grid: TokenGrid, key_grid: TokenGrid | None = None, **options: Any
    ) -> BlockMask:
        return self.pattern.select(query, key, *_sequences(query_grid, key_grid), **options)

    def blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        raise ValueError("RasterStrips: a mask has a grid of its own, got a call for the blocks of another")


def _sequences(query_grid: TokenGrid, key_grid: TokenGrid | None) -> tuple[TokenGrid, TokenGrid]:
    queries = TokenGrid.sequence(query_grid.num_tokens)
    return queries, queries if key_grid is None else TokenGrid.sequence(key_grid.num_tokens)


def patch_with_strips(model: nn.Module, pattern: Pattern) -> nn.Module:
    """``patch_model`` with masks of strips, which come with another grid than the layers have."""
    patch_model(model, Dense())
    for layer in model.modules():
        if isinstance(layer, SparseAttention):
            layer.pattern = RasterStrips(pattern)
    return model
