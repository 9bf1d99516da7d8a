"""Queries and keys in brief: a few features per part of a block, whose products estimate the logits between the parts.

Every block is cut into a few parts, compact ones on a grid of patches. For a query q the mean of exp(q · k) over the
keys of a part is about exp(q · mean + |q|² variance / 2), as if they scattered evenly around their mean. So what a part
draws is a product of a few features of queries and keys; the number of keys and a relative position are features too.
Pooled means alone miss the blocks that differ much within: the README of this folder has the measurements.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..token_grid import TokenGrid

PARTS = 4  # of a block
NO_KEYS = -1e30  # logarithm of no keys: finite, so that its product with 0 is 0

Cut = tuple[int, int]


def cut_of(grid: TokenGrid, parts: int = PARTS) -> Cut:
    """Number of parts along the height and the width of a tile, found by halving its longer side again and again."""
    height, width = grid.tile
    rows = columns = 1
    while rows * columns < parts:
        if width % 2 == 0 and (width > height or height % 2):
            width, columns = width // 2, columns * 2
        elif height % 2 == 0:
            height, rows = height // 2, rows * 2
        else:
            break
    return rows, columns


def part_sizes(grid: TokenGrid, cut: Cut, device: torch.device) -> Tensor:
    """Number of tokens that exist in each part: float32 ``[blocks, parts]``."""
    rows, columns = cut
    along_y = _lengths(grid.height, grid.tile[0] // rows, grid.tile_rows * rows, device)
    along_x = _lengths(grid.width, grid.tile[1] // columns, grid.tile_columns * columns, device)
    image = along_y.view(-1, 1, rows, 1) * along_x.view(1, -1, 1, columns)  # [tile rows, tile columns, rows, columns]
    run = grid.block_size // (rows * columns)
    prefix, suffix = (
        _lengths(tokens, run, blocks * rows * columns, device).view(blocks, rows * columns)
        for tokens, blocks in ((grid.prefix, grid.num_prefix_blocks), (grid.suffix, grid.num_suffix_blocks))
    )
    return torch.cat([prefix, image.flatten(0, 1).flatten(1), suffix])


def part_centres(grid: TokenGrid, device: torch.device) -> Tensor:
    """Centre of each part of the tiles, in fractions of the image's height and width: ``[tiles · parts, 2]``."""
    rows, columns = cut_of(grid)
    along = []
    for size, tile, number, tiles in (
        (grid.height, grid.tile[0], rows, grid.tile_rows),
        (grid.width, grid.tile[1], columns, grid.tile_columns),
    ):
        length = tile // number
        along.append(((torch.arange(tiles * number, device=device) + 0.5) * length / size).view(tiles, number))
    y, x = along[0][:, None, :, None], along[1][None, :, None, :]  # [tile rows, tile columns, rows, columns]
    return torch.stack(torch.broadcast_tensors(y, x), dim=-1).flatten(0, 3)


def part_sums(tensor: Tensor, grid: TokenGrid, cut: Cut) -> Tensor:
    """Sums over the tokens of each part: ``[B, H, N, W]`` -> ``[B, H, blocks · parts, W]``, at least float32."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    rows, columns = cut
    prefix, patches, suffix = tensor.split([grid.prefix, grid.num_patches, grid.suffix], dim=2)
    image = patches.unflatten(2, (grid.height, grid.width))
    missing = [grid.tile_rows * grid.tile[0] - grid.height, grid.tile_columns * grid.tile[1] - grid.width]
    if any(missing):
        image = F.pad(image, (0, 0, 0, missing[1], 0, missing[0]))
    image = image.unflatten(3, (grid.tile_columns, columns, -1)).unflatten(2, (grid.tile_rows, rows, -1))
    # [B, H, tile rows, rows, y, tile columns, columns, x, W] -> [B, H, tile rows, tile columns, rows, columns, W]
    image = image.sum((4, 7), dtype=dtype).transpose(3, 4)
    parts = [image.flatten(2, 5)]
    for extra, blocks, place in ((prefix, grid.num_prefix_blocks, 0), (suffix, grid.num_suffix_blocks, 2)):
        if blocks:
            extra = F.pad(extra, (0, 0, 0, blocks * grid.block_size - extra.shape[2]))
            parts.insert(place, extra.unflatten(2, (blocks * rows * columns, -1)).sum(3, dtype=dtype))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def is_sampled(grid: TokenGrid, cut: Cut, device: torch.device) -> Tensor:
    """The tokens by which parts are judged: bool ``[N]``.

    A quarter of the tokens of a whole part, spread evenly, and all of a part that an edge cuts off: means and variances
    over a quarter serve as well, and reading is most of the cost.
    """
    rows, columns = cut
    height, width = grid.tile[0] // rows, grid.tile[1] // columns
    y, x = torch.arange(grid.height, device=device)[:, None], torch.arange(grid.width, device=device)
    place = y % height * width + x % width
    is_cut_off = (y // height * height + height > grid.height) | (x // width * width + width > grid.width)
    image = ((x % width + 2 * (y % height)) if width >= 4 else place) % 4 == 0
    run = grid.block_size // (rows * columns)
    prefix, suffix = (
        (token % run % 4 == 0) | (token // run * run + run > token.shape[0])
        for token in (torch.arange(grid.prefix, device=device), torch.arange(grid.suffix, device=device))
    )
    return torch.cat([prefix, (image | is_cut_off).flatten(), suffix])


def query_features(query: Tensor, grid: TokenGrid, scale: float) -> Tensor:
    """``[B, H, blocks · parts, D + 2]``: the scaled mean of the queries, half its squared length, and 1."""
    cut = cut_of(grid)
    sampled = is_sampled(grid, cut, query.device)[:, None]
    mean = part_sums(query * sampled, grid, cut) / part_sums(sampled[None, None], grid, cut).clamp(min=1) * scale
    return torch.cat([mean, mean.square().sum(-1, keepdim=True) / 2, torch.ones_like(mean[..., :1])], dim=-1)


def key_features(key: Tensor, grid: TokenGrid, key_padding_mask: Tensor | None = None) -> Tensor:
    """``[B, H, blocks · parts, D + 2]``: the mean of the keys, their variance per channel, and the log of their number.

    Padded keys do not count; where there may be some, all others do.
    """
    cut = cut_of(grid)
    if key_padding_mask is None:
        counted = is_sampled(grid, cut, key.device)[None, None, :, None]
        sizes = part_sizes(grid, cut, key.device).flatten()[:, None]
    else:
        counted = ~key_padding_mask[:, None, :, None]
        sizes = part_sums(counted, grid, cut)  # [B, 1, blocks · parts, 1]
    samples = part_sums(counted, grid, cut).clamp(min=1)
    squares = key.to(torch.promote_types(key.dtype, torch.float32)).square().sum(-1, keepdim=True)
    mean = part_sums(key * counted, grid, cut) / samples
    length = part_sums(squares * counted, grid, cut) / samples
    variance = (length - mean.square().sum(-1, keepdim=True)).clamp(min=0) / key.shape[-1]
    number = torch.where(sizes > 0, sizes.clamp(min=1).log(), NO_KEYS).to(mean.dtype).expand_as(variance)
    return torch.cat([mean, variance, number], dim=-1)


def with_relative_position(
    queries: Tensor, keys: Tensor, relative_position: tuple[Tensor, Tensor], query_grid: TokenGrid, key_grid: TokenGrid
) -> tuple[Tensor, Tensor]:
    """The features, and those whose products are the relative position between parts: its means over both."""
    query_cut, key_cut = cut_of(query_grid), cut_of(key_grid)
    sizes = part_sizes(query_grid, query_cut, queries.device).flatten()[:, None].clamp(min=1)
    blocks = torch.arange(key_grid.num_tiles, device=keys.device)
    parts = torch.arange(key_cut[0] * key_cut[1], device=keys.device)
    extra_queries, extra_keys = [queries], [keys]
    for axis, relative in enumerate(relative_position):
        number = (key_grid.tile_rows, key_grid.tile_columns)[axis] * key_cut[axis]
        length = key_grid.tile[axis] // key_cut[axis]
        mean = part_sums(relative, query_grid, query_cut) / sizes  # [B, H, query parts, height | width]
        present = _lengths(relative.shape[-1], length, number, queries.device).clamp(min=1)
        mean = F.pad(mean, (0, number * length - mean.shape[-1])).unflatten(-1, (number, length)).sum(-1) / present
        extra_queries.append(mean)
        # The row, or column, of parts that each part lies in.
        if axis == 0:
            place = (blocks // key_grid.tile_columns)[:, None] * key_cut[0] + parts // key_cut[1]
        else:
            place = (blocks % key_grid.tile_columns)[:, None] * key_cut[1] + parts % key_cut[1]
        is_there = place.flatten()[:, None] == torch.arange(number, device=keys.device)
        outside = (key_grid.num_prefix_blocks * len(parts), key_grid.num_suffix_blocks * len(parts))
        is_there = F.pad(is_there, (0, 0, *outside)).to(keys.dtype)
        extra_keys.append(is_there.expand(*keys.shape[:2], -1, -1))
    return torch.cat(extra_queries, dim=-1), torch.cat(extra_keys, dim=-1)


def _lengths(total: int, length: int, number: int, device: torch.device) -> Tensor:
    """Of ``number`` runs of ``length``, how much of each lies within ``total``: float32 ``[number]``."""
    first = torch.arange(number, device=device, dtype=torch.float32) * length
    return (total - first).clamp(min=0, max=length)
