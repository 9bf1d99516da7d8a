"""Geometry: which tokens form a block.

A block is the unit that attention computes or skips. On a grid of patches it is a 2-D tile, so that a block
covers a compact neighbourhood; on a plain sequence it is a run of consecutive tokens. Extra tokens (class,
register, prompt) lie before or after the patches and form blocks of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from .shared_tensors import building_shared_tensors, outside_graphs, resolve_device

DEFAULT_TILE = (8, 16)
SEQUENCE_TILE = (1, 128)

Device = torch.device | str | None


def _derived() -> Any:
    return field(init=False, repr=False, compare=False)


@dataclass(frozen=True)
class TokenGrid:
    """Tokens of one image: ``prefix`` extra tokens, the patches in raster order, ``suffix`` extra tokens.

    Blocks are numbered in the same order: blocks of prefix tokens, tiles in raster order, blocks of suffix tokens.
    Tiles at the lower and right edge may be smaller than ``tile``, as may the last block of extra tokens.

    Args:
        height, width: patches per column and per row.
        prefix, suffix: number of extra tokens before and after the patches.
        tile: height and width of a block, in patches. Its area is the block size in tokens.

    Raises:
        ValueError, TypeError: if a number is not an integer in range.
    """

    height: int
    width: int
    prefix: int = 0
    suffix: int = 0
    tile: tuple[int, int] = DEFAULT_TILE

    # Derived sizes are fields, not properties, because torch.compile reads only the fields of a frozen dataclass.
    block_size: int = _derived()  # tokens in a full block
    num_patches: int = _derived()
    num_tokens: int = _derived()
    tile_rows: int = _derived()
    tile_columns: int = _derived()
    num_tiles: int = _derived()
    num_prefix_blocks: int = _derived()
    num_suffix_blocks: int = _derived()
    num_blocks: int = _derived()

    def __post_init__(self) -> None:
        if not isinstance(self.tile, (tuple, list)) or len(self.tile) != 2:
            raise ValueError(f"TokenGrid: tile must have two entries (height, width), got {self.tile!r}")
        object.__setattr__(self, "tile", tuple(self.tile))
        for name, value, least in (
            ("height", self.height, 1),
            ("width", self.width, 1),
            ("prefix", self.prefix, 0),
            ("suffix", self.suffix, 0),
            ("tile height", self.tile[0], 1),
            ("tile width", self.tile[1], 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"TokenGrid: {name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"TokenGrid: {name} must be at least {least}, got {value}")
        tile_height, tile_width = self.tile
        block_size = tile_height * tile_width
        derived = {
            "block_size": block_size,
            "num_patches": self.height * self.width,
            "tile_rows": -(-self.height // tile_height),
            "tile_columns": -(-self.width // tile_width),
            "num_prefix_blocks": -(-self.prefix // block_size),
            "num_suffix_blocks": -(-self.suffix // block_size),
        }
        derived["num_tokens"] = self.prefix + derived["num_patches"] + self.suffix
        derived["num_tiles"] = derived["tile_rows"] * derived["tile_columns"]
        derived["num_blocks"] = derived["num_prefix_blocks"] + derived["num_tiles"] + derived["num_suffix_blocks"]
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def sequence(cls, length: int, block_size: int = SEQUENCE_TILE[1]) -> TokenGrid:
        """A plain sequence of ``length`` tokens in blocks of ``block_size`` consecutive tokens."""
        return cls(1, length, tile=(1, block_size))

    def pack(self) -> list[int]:
        """The grid as integers, as operator schemas take it."""
        return [self.height, self.width, self.prefix, self.suffix, *self.tile]

    @classmethod
    def unpack(cls, numbers: list[int]) -> TokenGrid:
        """The grid that :meth:`pack` wrote."""
        height, width, prefix, suffix, tile_height, tile_width = numbers
        return cls(height, width, prefix, suffix, (tile_height, tile_width))

    @property
    def tile_blocks(self) -> slice:
        """The block indices that are tiles of patches, as opposed to blocks of extra tokens."""
        return slice(self.num_prefix_blocks, self.num_prefix_blocks + self.num_tiles)

    def block_of_token(self, device: Device = None) -> Tensor:
        """Block index of each token: int64 ``[num_tokens]``. Shared between callers: do not write to it."""
        return _block_of_token(self, device)[0]

    def block_tokens(self, device: Device = None) -> Tensor:
        """Token indices of each block in raster order of the tile, absent ones −1: int64 ``[num_blocks, block_size]``.

        Shared.
        """
        return _blocks(self, device)[1]

    def block_sizes(self, device: Device = None) -> Tensor:
        """Number of tokens that exist in each block: int64 ``[num_blocks]``. Shared."""
        return _blocks(self, device)[0]

    def patch_rows(self, device: Device = None) -> Tensor:
        """Row of each token's patch, −1 for extra tokens: int64 ``[num_tokens]``. Shared."""
        return _patch_positions(self, device)[0]

    def patch_columns(self, device: Device = None) -> Tensor:
        """Column of each token's patch, −1 for extra tokens: int64 ``[num_tokens]``. Shared."""
        return _patch_positions(self, device)[1]

    def __str__(self) -> str:
        prefix = f"{self.prefix} + " if self.prefix else ""
        suffix = f" + {self.suffix}" if self.suffix else ""
        return f"{prefix}{self.height}×{self.width}{suffix} tokens in tiles of {self.tile[0]}×{self.tile[1]}"


def _cached_per_device(build: Callable[[TokenGrid], tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Builds index tensors once per grid on the CPU and once per device."""

    @lru_cache(maxsize=256)
    def on_device(grid: TokenGrid, device: torch.device) -> tuple[Tensor, ...]:
        with building_shared_tensors():
            if device.type == "cpu":
                return build(grid)
            on_cpu = on_device(grid, torch.device("cpu"))
            return outside_graphs(lambda: tuple(tensor.to(device) for tensor in on_cpu), device)

    @wraps(build)
    def cached(grid: TokenGrid, device: Device = None) -> tuple[Tensor, ...]:
        resolved = resolve_device(device)
        if torch.compiler.is_compiling():
            return tuple(tensor.to(resolved) for tensor in build(grid))  # tracing ignores caches, with a warning
        return on_device(grid, resolved)

    return cached


@_cached_per_device
def _block_of_token(grid: TokenGrid) -> tuple[Tensor]:
    tile_row = torch.arange(grid.height) // grid.tile[0]
    tile_column = torch.arange(grid.width) // grid.tile[1]
    tiles = grid.num_prefix_blocks + tile_row[:, None] * grid.tile_columns + tile_column
    block = torch.cat(
        [
            torch.arange(grid.prefix) // grid.block_size,
            tiles.flatten(),
            grid.tile_blocks.stop + torch.arange(grid.suffix) // grid.block_size,
        ]
    )
    return (block,)


@_cached_per_device
def _blocks(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    block = grid.block_of_token()
    sizes = torch.bincount(block, minlength=grid.num_blocks)
    row_in_tile = torch.arange(grid.height) % grid.tile[0]
    column_in_tile = torch.arange(grid.width) % grid.tile[1]
    slot = torch.cat(
        [
            torch.arange(grid.prefix) % grid.block_size,
            (row_in_tile[:, None] * grid.tile[1] + column_in_tile).flatten(),
            torch.arange(grid.suffix) % grid.block_size,
        ]
    )
    table = torch.full((grid.num_blocks, grid.block_size), -1, dtype=torch.int64)
    table[block, slot] = torch.arange(grid.num_tokens)
    return sizes, table


@_cached_per_device
def _patch_positions(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    patches = torch.arange(grid.num_patches)
    none = (torch.full((grid.prefix,), -1), torch.full((grid.suffix,), -1))
    return (
        torch.cat([none[0], patches // grid.width, none[1]]),
        torch.cat([none[0], patches % grid.width, none[1]]),
    )
