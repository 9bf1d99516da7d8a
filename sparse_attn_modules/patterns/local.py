"""Patterns of nearness: a query attends to the tiles around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..token_grid import TokenGrid
from .base import Pattern, check_count, check_density, check_one_of
from .scoring import gap_between_tiles, lowest, nearest_tile, patch_distance, tiles_for_density, with_own_tile


@dataclass(frozen=True)
class LocalWindow(Pattern):
    """The tiles around each query tile: by ``radius`` or by ``density``, nearest first.

    Args:
        radius: Chebyshev distance in patches. A block is active if any two of its patches are within it, so that every
            patch sees at least its window of ``(2 radius + 1)²`` patches.
        density: fraction of block pairs; the nearest tiles by distance between centres.

    Raises:
        ValueError: unless exactly one of the two is given, and in range.
    """

    density: float | None = None
    radius: float | None = None

    def __post_init__(self) -> None:
        check_one_of(self, density=self.density, radius=self.radius)
        if self.density is not None:
            check_density(self, self.density)
        elif not (isinstance(self.radius, (int, float)) and 0 <= self.radius < float("inf")):
            raise ValueError(f"LocalWindow: radius must be a distance in patches ≥ 0, got {self.radius!r}")

    def image_blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        if self.radius is not None:
            return (gap_between_tiles(query_grid, key_grid) <= self.radius)[None]
        assert self.density is not None
        count = tiles_for_density(self.density, query_grid, key_grid)
        return lowest(patch_distance(query_grid, key_grid), count)[None]


@dataclass(frozen=True)
class DilatedLocal(Pattern):
    """Tiles on a lattice around each query tile, at every dilation rate: near tiles densely, far ones thinly.

    Args:
        density: fraction of block pairs. Lattice points fewest steps away come first; other tiles, nearest first, fill
            up if the lattices do not hold enough.
        dilation_rates: steps of the lattices, in tiles. ``(1, 2, 4)`` is a hierarchy of three levels.
    """

    density: float
    dilation_rates: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self) -> None:
        check_density(self, self.density)
        object.__setattr__(self, "dilation_rates", tuple(self.dilation_rates))
        if not self.dilation_rates:
            raise ValueError("DilatedLocal: dilation_rates must not be empty")
        for rate in self.dilation_rates:
            check_count(self, "dilation_rates", rate, least=1)

    def image_blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        count = tiles_for_density(self.density, query_grid, key_grid)
        own = nearest_tile(query_grid, key_grid)[:, None]
        keys = torch.arange(key_grid.num_tiles)
        rows = (keys // key_grid.tile_columns - own // key_grid.tile_columns).abs()
        columns = (keys % key_grid.tile_columns - own % key_grid.tile_columns).abs()
        steps = torch.full(rows.shape, torch.inf, dtype=torch.float64)
        for rate in self.dilation_rates:
            on_lattice = (rows % rate == 0) & (columns % rate == 0)
            rate_steps = torch.maximum(rows, columns).double() / rate
            steps = torch.where(on_lattice, torch.minimum(steps, rate_steps), steps)
        distance = patch_distance(query_grid, key_grid)
        far = float(distance.max()) + 1
        # Steps decide, distance breaks ties; off the lattices distance alone decides, after every lattice point.
        cost = torch.where(steps.isinf(), 1e6 + distance, steps + distance / far)
        return lowest(cost, count)[None]


@dataclass(frozen=True)
class MultiScale(Pattern):
    """Local windows of another size in each group of heads, so that some heads look near and others far.

    Args:
        densities: one density per group of heads; the heads are split evenly, in order.
        radii: or one radius per group, in patches.
    """

    densities: tuple[float, ...] | None = None
    radii: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_one_of(self, densities=self.densities, radii=self.radii)
        name = "densities" if self.densities is not None else "radii"
        object.__setattr__(self, name, tuple(getattr(self, name)))
        if not getattr(self, name):
            raise ValueError(f"MultiScale: {name} must not be empty")
        self._windows()

    def _windows(self) -> list[LocalWindow]:
        if self.densities is not None:
            return [LocalWindow(density=density) for density in self.densities]
        return [LocalWindow(radius=radius) for radius in self.radii or ()]

    def image_blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        windows = self._windows()
        if len(windows) > num_heads:
            raise ValueError(f"MultiScale: heads must be at least as many as scales, {len(windows)}, got {num_heads}")
        blocks = torch.cat([window.image_blocks(query_grid, key_grid, num_heads) for window in windows])
        return blocks[torch.arange(num_heads) * len(windows) // num_heads]


@dataclass(frozen=True)
class Streaming(Pattern):
    """Sink tiles that every query sees, and the tiles nearest to it: StreamingLLM (arXiv:2309.17453) in two dimensions.

    Args:
        density: fraction of block pairs, sinks included.
        sink: number of sink tiles, the first in raster order.
        local: number of nearest tiles, instead of a density.
    """

    density: float | None = None
    sink: int = 1
    local: int | None = None

    def __post_init__(self) -> None:
        check_one_of(self, density=self.density, local=self.local)
        check_count(self, "sink", self.sink, least=0)
        if self.density is not None:
            check_density(self, self.density)
        else:
            check_count(self, "local", self.local, least=1)

    def image_blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        sinks = min(self.sink, key_grid.num_tiles)
        cost = patch_distance(query_grid, key_grid)
        if self.local is not None:
            blocks = lowest(cost, self.local)
            blocks[:, :sinks] = True
            return blocks[None]
        assert self.density is not None
        count = tiles_for_density(self.density, query_grid, key_grid)
        cost[:, :sinks] = -1
        blocks = lowest(with_own_tile(cost, query_grid, key_grid), count)
        # Sinks stay even where the density would not hold them all.
        blocks[:, :sinks] = True
        return blocks[None]
