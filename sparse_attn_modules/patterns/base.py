"""Pattern: a rule that makes a block mask from the geometry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..block_mask import BlockMask
from ..shared_tensors import building_shared_tensors, outside_graphs, resolve_device
from ..token_grid import TokenGrid


@dataclass(frozen=True)
class Pattern:
    """A frozen, hashable rule. Subclasses implement :meth:`image_blocks` or, for full control, :meth:`blocks`.

    Extra tokens (class, register, prompt) see and are seen by everything unless a subclass overrides :meth:`blocks`.
    Their blocks count towards a density that is asked for.
    """

    def image_blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        """Bool ``[H | 1, query tiles, key tiles]`` on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} must implement image_blocks or blocks")

    def blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        """Bool ``[H | 1, query blocks, key blocks]`` on the CPU."""
        image = self.image_blocks(query_grid, key_grid, num_heads)
        if not isinstance(image, Tensor):
            raise TypeError(f"{type(self).__name__}: image blocks must be a tensor, got {type(image).__name__}")
        expected = [query_grid.num_tiles, key_grid.num_tiles]
        if image.dtype != torch.bool or image.dim() != 3 or list(image.shape[1:]) != expected:
            raise ValueError(
                f"{type(self).__name__}: image blocks must be boolean of shape [{num_heads} | 1, {expected[0]}, "
                f"{expected[1]}] for {query_grid}, got {image.dtype} of shape {list(image.shape)}"
            )
        blocks = torch.ones(image.shape[0], query_grid.num_blocks, key_grid.num_blocks, dtype=torch.bool)
        blocks[:, query_grid.tile_blocks, key_grid.tile_blocks] = image
        return blocks

    def mask(
        self,
        query_grid: TokenGrid,
        num_heads: int,
        *,
        key_grid: TokenGrid | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The block mask of this pattern: built once per geometry, number of heads and device, and shared.

        Raises:
            ValueError: if the pattern does not fit the geometry or the number of heads.
        """
        for name, grid in (("query_grid", query_grid), ("key_grid", key_grid)):
            if not (isinstance(grid, TokenGrid) or (name == "key_grid" and grid is None)):
                raise TypeError(f"{type(self).__name__}.mask: {name} must be a TokenGrid, got {type(grid).__name__}")
        if num_heads < 1:
            raise ValueError(f"{type(self).__name__}.mask: num_heads must be at least 1, got {num_heads}")
        # Equality, and with it the cache, looks at the dataclass fields alone.
        hidden = set(vars(self)) - {field.name for field in fields(self)}
        if hidden:
            raise TypeError(
                f"{type(self).__name__}: a pattern must be a frozen dataclass with all its state in fields, "
                f"got other attributes: {sorted(hidden)}"
            )
        key_grid = query_grid if key_grid is None else key_grid
        return _cached_mask(self, query_grid, key_grid, num_heads, resolve_device(device))

    def is_dynamic_on(self, query_grid: TokenGrid, key_grid: TokenGrid) -> bool:
        """Whether the mask on these grids depends on queries and keys, so that only :meth:`select` can make it."""
        return False

    @property
    def has_selector(self) -> bool:
        """Whether :meth:`select` needs a trained part, which layers then hold."""
        return False

    def select(
        self,
        query: Tensor,
        key: Tensor,
        query_grid: TokenGrid,
        key_grid: TokenGrid | None = None,
        *,
        scale: float | None = None,
        relative_position: tuple[Tensor, Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
        selector: nn.Module | None = None,
    ) -> BlockMask:
        """The mask for given queries and keys: that of :meth:`mask`, unless the pattern looks at them.

        See :meth:`DynamicPattern.select` for the arguments.
        """
        return self.mask(query_grid, query.shape[1], key_grid=key_grid, device=query.device)

    def __or__(self, other: Pattern) -> Pattern:
        """Pairs active in either pattern."""
        return Union((self, other))

    def density_on(self, query_grid: TokenGrid, num_heads: int = 1, *, key_grid: TokenGrid | None = None) -> float:
        """The fraction of block pairs that this pattern really computes on a geometry."""
        return self.mask(query_grid, num_heads, key_grid=key_grid).density


@lru_cache(maxsize=256)
def _cached_mask(
    pattern: Pattern, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int, device: torch.device
) -> BlockMask:
    with building_shared_tensors():
        if device.type != "cpu":
            on_cpu = _cached_mask(pattern, query_grid, key_grid, num_heads, torch.device("cpu"))
            return outside_graphs(lambda: on_cpu.to(device), device)
        blocks = pattern.blocks(query_grid, key_grid, num_heads)
        if not isinstance(blocks, Tensor):
            raise TypeError(f"{type(pattern).__name__}: blocks must be a tensor, got {type(blocks).__name__}")
        if blocks.dim() != 3 or blocks.shape[0] not in (1, num_heads):
            raise ValueError(
                f"{type(pattern).__name__}: blocks must have shape [{num_heads} | 1, {query_grid.num_blocks}, "
                f"{key_grid.num_blocks}], got {list(blocks.shape)}"
            )
        return BlockMask(blocks, query_grid, key_grid)


@dataclass(frozen=True)
class Dense(Pattern):
    """Every block pair: exact attention."""

    def image_blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        return torch.ones(1, query_grid.num_tiles, key_grid.num_tiles, dtype=torch.bool)


@dataclass(frozen=True)
class Union(Pattern):
    """Pairs active in any of the patterns; also written ``first | second``."""

    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", tuple(self.patterns))
        if not self.patterns:
            raise ValueError("Union: patterns must not be empty")
        for pattern in self.patterns:
            check_pattern(self, "patterns", pattern)

    def blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        first, *others = (pattern.blocks(query_grid, key_grid, num_heads) for pattern in self.patterns)
        for blocks in others:
            first = first | blocks
        return first


@dataclass(frozen=True)
class CustomPattern(Pattern):
    """A pattern made by a function.

    Args:
        function: ``function(query_grid, key_grid, num_heads)`` returns bool ``[H | 1, query tiles, key tiles]``. To be
            picklable it must be importable by name.
    """

    function: Callable[[TokenGrid, TokenGrid, int], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"CustomPattern: function must be callable, got {type(self.function).__name__}")

    def image_blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        return self.function(query_grid, key_grid, num_heads)


def check_density(pattern: Pattern, density: Any) -> None:
    """Raises unless ``density`` is a number in (0, 1]; NaN is not."""
    is_number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if not is_number or not 0 < density <= 1:
        raise ValueError(f"{type(pattern).__name__}: density must lie in (0, 1], got {density!r}")


def check_count(pattern: Pattern, name: str, value: Any, least: int) -> None:
    """Raises unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{type(pattern).__name__}: {name} must be an integer ≥ {least}, got {value!r}")


def check_one_of(pattern: Pattern, **values: Any) -> None:
    """Raises unless exactly one of the named values is given."""
    given = [name for name, value in values.items() if value is not None]
    if len(given) != 1:
        names = " or ".join(values)
        raise ValueError(f"{type(pattern).__name__}: exactly one of {names} must be given, got {given or 'none'}")


def check_pattern(owner: Pattern, name: str, value: Any) -> None:
    """Raises unless ``value`` is a pattern that a geometry is enough for."""
    if not isinstance(value, Pattern):
        raise TypeError(f"{type(owner).__name__}: {name} must be a Pattern, got {type(value).__name__}")
    grid = TokenGrid(1, 1)
    if value.is_dynamic_on(grid, grid):
        raise TypeError(
            f"{type(owner).__name__}: {name} must be a pattern whose mask follows from the geometry alone, got "
            f"{type(value).__name__}, which chooses blocks by queries and keys"
        )
