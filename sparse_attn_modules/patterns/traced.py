"""Masks inside a compiled region: an opaque operator looks them up, so that building is never traced.

Under ``torch.compile`` a mask for a grid seen for the first time cannot be built by the tracer. The operator returns
copies of the cached tensors of :meth:`Pattern.mask`; its shapes depend on the geometry alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_mask import LISTS, BlockMask
from ..token_grid import TokenGrid
from .base import Dense, Pattern

_patterns: dict[str, Pattern] = {}
_names: dict[Pattern, str] = {}

_library = torch.library.Library("sparse_attn_modules", "FRAGMENT")
_library.define(
    "pattern_mask(str pattern, int[] query_grid, int[] key_grid, int num_heads, Device device) -> "
    "(Tensor blocks, Tensor key_counts, Tensor key_indices, Tensor query_counts, Tensor query_indices, "
    "Tensor row_order)"
)


def register_for_tracing(pattern: Pattern) -> str:
    """Makes a pattern known to the operator; returns the name it goes by there."""
    if pattern not in _names:
        # Two patterns may look alike, so the number tells them apart.
        name = f"{pattern!r} #{len(_names)}"
        _names[pattern], _patterns[name] = name, pattern
    return _names[pattern]


def traced_mask(
    name: str, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int, device: torch.device
) -> BlockMask:
    """The mask of a registered pattern, as part of the graph that is being traced."""
    blocks, *lists = torch.ops.sparse_attn_modules.pattern_mask.default(
        name, query_grid.pack(), key_grid.pack(), num_heads, device
    )
    is_dense = isinstance(_patterns[name], Dense)
    return BlockMask.from_lists(blocks, dict(zip(LISTS, lists)), query_grid, key_grid, is_dense)


@torch.library.impl(_library, "pattern_mask", "CompositeExplicitAutograd")
def _pattern_mask(
    name: str, query_grid: list[int], key_grid: list[int], num_heads: int, device: torch.device
) -> tuple[Tensor, ...]:
    grids = TokenGrid.unpack(query_grid), TokenGrid.unpack(key_grid)
    mask = _patterns[name].mask(grids[0], num_heads, key_grid=grids[1], device=device)
    tensors = (mask.blocks, *(getattr(mask, attribute) for attribute in LISTS))
    return tuple(
        tensor.expand(1, num_heads, *tensor.shape[2:]).clone(memory_format=torch.contiguous_format)
        for tensor in tensors
    )


@torch.library.register_fake("sparse_attn_modules::pattern_mask", lib=_library)
def _pattern_mask_fake(
    name: str, query_grid: list[int], key_grid: list[int], num_heads: int, device: torch.device
) -> tuple[Tensor, ...]:
    queries, keys = TokenGrid.unpack(query_grid).num_blocks, TokenGrid.unpack(key_grid).num_blocks

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(1, num_heads, *shape, dtype=dtype, device=device)

    return (
        new(queries, keys, dtype=torch.bool),
        new(queries),
        new(queries, keys),
        new(keys),
        new(keys, queries),
        new(queries),
    )
