"""Patterns of reach: a query attends to tiles all over the image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..token_grid import TokenGrid
from .base import Pattern, check_count, check_density, check_one_of
from .scoring import lowest, nearest_tile, patch_distance, tile_centres, tiles_for_density, with_own_tile


@dataclass(frozen=True)
class GlobalLocal(Pattern):
    """Global tiles, which see and are seen by everything, and the tiles nearest to each query tile.

    Args:
        density: fraction of block pairs, global tiles included.
        global_tiles: number of global tiles, spread evenly over the raster order.
    """

    density: float
    global_tiles: int = 1

    def __post_init__(self) -> None:
        check_density(self, self.density)
        check_count(self, "global_tiles", self.global_tiles, least=0)

    def image_blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        global_queries = _spread(min(self.global_tiles, query_grid.num_tiles), query_grid.num_tiles)
        global_keys = _spread(min(self.global_tiles, key_grid.num_tiles), key_grid.num_tiles)
        count = tiles_for_density(self.density, query_grid, key_grid, dense_tiles=len(global_queries))
        cost = patch_distance(query_grid, key_grid)
        cost[:, global_keys] = -1
        blocks = lowest(with_own_tile(cost, query_grid, key_grid), count)
        # They stay even where the density would not hold them all.
        blocks[:, global_keys] = True
        blocks[global_queries] = True
        return blocks[None]


@dataclass(frozen=True)
class Strided(Pattern):
    """Tiles at a constant stride over the raster order, starting from the query's own tile.

    Args:
        density: fraction of block pairs; the stride may then be a fraction, so that the count fits.
        stride: every ``stride``-th tile, instead of a density.
    """

    density: float | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        check_one_of(self, density=self.density, stride=self.stride)
        if self.density is not None:
            check_density(self, self.density)
        else:
            check_count(self, "stride", self.stride, least=1)

    def image_blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        own = nearest_tile(query_grid, key_grid)[:, None]
        tiles = key_grid.num_tiles
        if self.stride is not None:
            return ((torch.arange(tiles) - own) % self.stride == 0)[None]
        assert self.density is not None
        count = tiles_for_density(self.density, query_grid, key_grid)
        offsets = torch.arange(count) * tiles // count
        blocks = torch.zeros(query_grid.num_tiles, tiles, dtype=torch.bool)
        return blocks.scatter_(1, (own + offsets) % tiles, True)[None]


@dataclass(frozen=True)
class Random(Pattern):
    """Tiles drawn at random for every head and query tile, besides its own tile.

    Args:
        density: fraction of block pairs.
        seed: of the draw; masks of the same seed and geometry are equal.
    """

    density: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self, self.density)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"Random: seed must be an integer in [0, 2⁶³), got {self.seed!r}")

    def image_blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        shape = num_heads, query_grid.num_tiles, key_grid.num_tiles
        cost = torch.rand(shape, generator=generator, dtype=torch.float32)
        count = tiles_for_density(self.density, query_grid, key_grid)
        return lowest(with_own_tile(cost, query_grid, key_grid), count)


@dataclass(frozen=True)
class RegionFocused(Pattern):
    """The tiles nearest to given points, seen from everywhere, besides each query's own tile.

    Args:
        points: (y, x) positions as fractions of the image's height and width, each in [0, 1].
        density: fraction of block pairs.
    """

    points: tuple[tuple[float, float], ...]
    density: float

    def __post_init__(self) -> None:
        check_density(self, self.density)
        if not self.points:
            raise ValueError("RegionFocused: points must not be empty")
        if not all(isinstance(point, (tuple, list)) for point in self.points):
            raise ValueError(f"RegionFocused: points must be (y, x) pairs, got {self.points}")
        object.__setattr__(self, "points", tuple(tuple(point) for point in self.points))
        for point in self.points:
            if len(point) != 2 or not all(0 <= coordinate <= 1 for coordinate in point):
                raise ValueError(f"RegionFocused: points must be (y, x) fractions of the image in [0, 1], got {point}")

    def image_blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        size = torch.tensor([key_grid.height, key_grid.width], dtype=torch.float64)
        points = torch.tensor(self.points, dtype=torch.float64) * size
        distance = torch.cdist(tile_centres(key_grid), points).amin(-1)
        cost = distance.repeat(query_grid.num_tiles, 1)
        count = tiles_for_density(self.density, query_grid, key_grid)
        return lowest(with_own_tile(cost, query_grid, key_grid), count)[None]


@dataclass(frozen=True)
class Butterfly(Pattern):
    """Own tile and those whose index differs in one bit: log₂(tiles) layers reach every tile (arXiv:2112.00029)."""

    def image_blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        own = nearest_tile(query_grid, key_grid)[:, None]
        blocks = torch.zeros(query_grid.num_tiles, key_grid.num_tiles, dtype=torch.bool)
        blocks.scatter_(1, own, True)
        for bit in range(math.ceil(math.log2(key_grid.num_tiles)) if key_grid.num_tiles > 1 else 0):
            partner = own ^ (1 << bit)
            exists = partner < key_grid.num_tiles
            blocks.scatter_(1, torch.where(exists, partner, own), True)
        return blocks[None]


def _spread(count: int, total: int) -> Tensor:
    """``count`` indices spread evenly over ``range(total)``."""
    return (torch.arange(count) * 2 + 1) * total // (2 * max(count, 1))
