"""Geometry shared by the patterns: distances between tiles, and choosing as many tiles as a density allows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..token_grid import TokenGrid


def tile_centres(grid: TokenGrid) -> Tensor:
    """Centre of each tile in units of the grid's height and width: float64 ``[tiles, 2]`` as (y, x)."""
    centres = []
    for size, tile in ((grid.height, grid.tile[0]), (grid.width, grid.tile[1])):
        first = torch.arange(0, size, tile, dtype=torch.float64)
        last = torch.clamp(first + tile, max=size)
        centres.append((first + last) / 2)
    return torch.cartesian_prod(*centres).reshape(-1, 2)


def patch_distance(query_grid: TokenGrid, key_grid: TokenGrid) -> Tensor:
    """Distance between tile centres in patches of the query grid: float64 ``[query tiles, key tiles]``.

    A key grid of another size is laid over the query grid, so that both cover the same image.
    """
    stretch = torch.tensor(
        [query_grid.height / key_grid.height, query_grid.width / key_grid.width], dtype=torch.float64
    )
    return torch.cdist(tile_centres(query_grid), tile_centres(key_grid) * stretch)


def gap_between_tiles(query_grid: TokenGrid, key_grid: TokenGrid) -> Tensor:
    """Least Chebyshev distance, in patches, between two patches of a pair of tiles: ``[query tiles, key tiles]``."""
    axes = []
    for axis in (0, 1):
        bounds = []
        for grid in (query_grid, key_grid):
            size = (query_grid.height, query_grid.width)[axis] / (grid.height, grid.width)[axis]
            length, tile = (grid.height, grid.width)[axis], grid.tile[axis]
            first = torch.arange(0, length, tile, dtype=torch.float64)
            last = torch.clamp(first + tile, max=length) - 1
            bounds.append((first * size, last * size))
        (query_first, query_last), (key_first, key_last) = bounds
        gap = torch.maximum(key_first - query_last[:, None], query_first[:, None] - key_last)
        axes.append(gap.clamp(min=0))
    rows, columns = axes
    gap = torch.maximum(rows[:, None, :, None], columns[None, :, None, :])
    return gap.reshape(query_grid.num_tiles, key_grid.num_tiles)


def tiles_for_density(density: float, query_grid: TokenGrid, key_grid: TokenGrid, dense_tiles: int = 0) -> int:
    """Key tiles per query tile with which the whole mask has the density asked for, to the nearest tile.

    Blocks of extra tokens, and ``dense_tiles`` of the query tiles, see everything and count towards the density, as do
    the extra tokens that every query tile sees. At least one tile is left, which a very low density may exceed.
    """
    dense_rows = query_grid.num_blocks - query_grid.num_tiles + dense_tiles
    sparse_rows = query_grid.num_tiles - dense_tiles
    if sparse_rows <= 0:
        return key_grid.num_tiles
    wanted = density * key_grid.num_blocks * query_grid.num_blocks - dense_rows * key_grid.num_blocks
    extra = key_grid.num_blocks - key_grid.num_tiles
    return min(max(round(wanted / sparse_rows) - extra, 1), key_grid.num_tiles)


def lowest(cost: Tensor, count: int) -> Tensor:
    """True for the ``count`` entries of least cost in each row; of equal ones the first."""
    keep = torch.argsort(cost, dim=-1, stable=True)[..., :count]
    return torch.zeros(cost.shape, dtype=torch.bool).scatter_(-1, keep, True)


def nearest_tile(query_grid: TokenGrid, key_grid: TokenGrid) -> Tensor:
    """The key tile that lies over each query tile: int64 ``[query tiles]``; the tile itself on equal grids."""
    return patch_distance(query_grid, key_grid).argmin(-1)


def with_own_tile(cost: Tensor, query_grid: TokenGrid, key_grid: TokenGrid) -> Tensor:
    """The cost with each query tile's own key tile put before all others."""
    own = nearest_tile(query_grid, key_grid)[:, None].expand(*cost.shape[:-1], 1)
    return cost.scatter(-1, own, -torch.inf)
