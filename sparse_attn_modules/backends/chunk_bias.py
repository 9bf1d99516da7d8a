"""Relative position on the keys of a chunk: a tile needs height + width values per query, not height × width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..token_grid import TokenGrid
from .row_chunks import RowChunk


def chunk_bias(rel_h: Tensor, rel_w: Tensor, grid: TokenGrid, chunk: RowChunk) -> Tensor:
    """``rel_h [U, R, M, height]`` and ``rel_w [U, R, M, width]`` added up on the chunk's keys: ``[U, R, M, L]``."""
    if chunk.key_blocks is None:
        image = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)  # [U, 1, M, patches]
        return F.pad(image, (grid.prefix, grid.suffix)) if grid.prefix or grid.suffix else image
    rows, columns = _tile_positions(grid, chunk.key_blocks)
    tiles = _look_up(rel_h, rows)[..., :, None] + _look_up(rel_w, columns)[..., None, :]  # [U, R, M, K', th, tw]
    slots = tiles.flatten(-3)
    if chunk.key_slots is None:
        return slots
    return slots.gather(-1, chunk.key_slots[None, :, None].expand(*slots.shape[:-1], -1))


def sums_over_keys(grad_logits: Tensor, grid: TokenGrid, chunk: RowChunk) -> tuple[Tensor, Tensor]:
    """The transpose of :func:`chunk_bias`: gradients ``[U, R, M, height]`` and ``[U, R, M, width]``."""
    if chunk.key_blocks is None:
        patches = grad_logits[..., grid.prefix : grid.prefix + grid.num_patches]
        image = patches.unflatten(-1, (grid.height, grid.width))
        return image.sum(-1), image.sum(-2)
    slots = grad_logits
    if chunk.key_slots is not None:
        # Absent keys share the slot of a present one, and add nothing: their gradient is zero.
        shape = (*grad_logits.shape[:-1], chunk.key_blocks.shape[1] * grid.block_size)
        index = chunk.key_slots[None, :, None].expand(grad_logits.shape)
        slots = grad_logits.new_zeros(shape).scatter_add_(-1, index, grad_logits)
    tiles = slots.unflatten(-1, (-1, *grid.tile))  # [U, R, M, K', th, tw]
    rows, columns = _tile_positions(grid, chunk.key_blocks)
    return _add_up(tiles.sum(-1), rows, grid.height), _add_up(tiles.sum(-2), columns, grid.width)


def _tile_positions(grid: TokenGrid, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Image rows and columns that tiles cover, ``[R, K', th]`` and ``[R, K', tw]``.

    Blocks of extra tokens, and what lies beyond the image, get the position one past the last.
    """
    tile = blocks - grid.num_prefix_blocks
    is_tile = ((tile >= 0) & (tile < grid.num_tiles))[..., None]
    positions = []
    for first, size, length in (
        (tile // grid.tile_columns * grid.tile[0], grid.tile[0], grid.height),
        (tile % grid.tile_columns * grid.tile[1], grid.tile[1], grid.width),
    ):
        position = first[..., None] + torch.arange(size, device=blocks.device)
        positions.append(torch.where(is_tile, position, length).clamp(max=length))
    return positions[0], positions[1]


def _look_up(rel: Tensor, positions: Tensor) -> Tensor:
    """``[U, R, M, S]`` at positions ``[R, K', t]``, 0 one past the last: ``[U, R, M, K', t]``."""
    index = positions.flatten(1)[None, :, None].expand(*rel.shape[:-1], -1)
    return F.pad(rel, (0, 1)).gather(-1, index).unflatten(-1, positions.shape[1:])


def _add_up(values: Tensor, positions: Tensor, size: int) -> Tensor:
    """The transpose of :func:`_look_up`."""
    flat = values.flatten(-2)
    index = positions.flatten(1)[None, :, None].expand(flat.shape)
    return values.new_zeros(*flat.shape[:-1], size + 1).scatter_add_(-1, index, flat)[..., :size]
