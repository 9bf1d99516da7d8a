"""Patterns that choose blocks at run time: those between which the queries and keys at hand are most alike.

A static pattern is a guess about all images. These look at each one: queries and keys are pooled over parts of blocks,
a small product estimates how much attention every query block pays to every key block, and the best blocks are kept.
The choice is made per image and head, costs a few percent of dense attention, and is not differentiated; attention
under the mask is. Related selectors for language and video models: SpargeAttn (arXiv:2502.18137), XAttention
(arXiv:2503.16428), MInference (arXiv:2407.02490), FlexPrefill (arXiv:2502.20766), VSA (arXiv:2505.13389).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..block_mask import BlockMask
from ..token_grid import TokenGrid
from .base import Pattern, check_density
from .choosing import Rule
from .scoring import tiles_for_density
from .selection import choose_mask, features


@dataclass(frozen=True)
class DynamicPattern(Pattern):
    """Base of the patterns whose mask depends on queries and keys; :meth:`select` makes it.

    Blocks of extra tokens and each query tile's own key tile are always computed.
    """

    def is_dynamic_on(self, query_grid: TokenGrid, key_grid: TokenGrid) -> bool:
        return True

    def rule(self, query_grid: TokenGrid, key_grid: TokenGrid) -> Rule:
        """How many key blocks a query tile takes."""
        raise NotImplementedError(f"{type(self).__name__} must implement rule")

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
        """The mask for these queries and keys, made on their device without waiting for it.

        Args:
            query: ``[B, Hq, Nq, D]``.
            key: ``[B, Hkv, Nk, D]``; ``Hq`` is a multiple of ``Hkv``.
            query_grid, key_grid: where they lie; the keys as the queries if None.
            scale, relative_position, key_padding_mask: as for :func:`block_sparse_attention`.
            selector: the trained part of a learned pattern; others take none.

        Returns:
            A mask of shape ``[B, Hq, query blocks, key blocks]``.

        Raises:
            ValueError: if queries or keys do not fit their grids or each other.
            TypeError: if a learned pattern gets no selector.
        """
        key_grid = query_grid if key_grid is None else key_grid
        self._check(query, key, query_grid, key_grid)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        of_blocks = self._features(selector)
        queries, keys = of_blocks(query, key, query_grid, key_grid, scale, relative_position, key_padding_mask)
        return choose_mask(
            queries,
            keys,
            query_grid,
            key_grid,
            self.rule(query_grid, key_grid),
            with_query_lists=torch.is_grad_enabled() and (query.requires_grad or key.requires_grad),
        )

    def _features(self, selector: nn.Module | None) -> Callable[..., tuple[Tensor, Tensor]]:
        """What makes the features of blocks, by whose products they are chosen."""
        return features

    def blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        name = type(self).__name__
        raise TypeError(
            f"{name}: the mask must be made by {name}.select(query, key, …), got a call for one of the geometry alone: "
            f"it depends on queries and keys"
        )

    def _check(self, query: Tensor, key: Tensor, query_grid: TokenGrid, key_grid: TokenGrid) -> None:
        name = f"{type(self).__name__}.select"
        for what, tensor, grid in (("query", query, query_grid), ("key", key, key_grid)):
            if tensor.dim() != 4 or tensor.shape[2] != grid.num_tokens:
                raise ValueError(
                    f"{name}: {what} must have shape [B, H, {grid.num_tokens}, D] for {grid}, got {list(tensor.shape)}"
                )
        if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]) or query.shape[1] % key.shape[1]:
            raise ValueError(
                f"{name}: key must have query's batch and head_dim, and a number of heads that divides query's, "
                f"got {list(key.shape)} for {list(query.shape)}"
            )


@dataclass(frozen=True)
class DynamicTopK(DynamicPattern):
    """For each head and query tile, the key blocks estimated to draw most of its attention: a fixed number of them.

    Args:
        density: fraction of block pairs; met to within one block per row.
    """

    density: float

    def __post_init__(self) -> None:
        check_density(self, self.density)

    def rule(self, query_grid: TokenGrid, key_grid: TokenGrid) -> Rule:
        extra = key_grid.num_blocks - key_grid.num_tiles
        return Rule(tiles_for_density(self.density, query_grid, key_grid) + extra, 0.0)

    def density_on(self, query_grid: TokenGrid, num_heads: int = 1, *, key_grid: TokenGrid | None = None) -> float:
        key_grid = query_grid if key_grid is None else key_grid
        density = self.rule(query_grid, key_grid).density(query_grid, key_grid)
        assert density is not None
        return density


@dataclass(frozen=True)
class DynamicTopP(DynamicPattern):
    """For each head and query tile, the fewest key blocks estimated to draw ``mass`` of its attention.

    The density follows from the image: heads that look everywhere keep many blocks, those that look at little few.

    Args:
        mass: fraction of the attention, in (0, 1].
    """

    mass: float

    def __post_init__(self) -> None:
        is_number = isinstance(self.mass, (int, float)) and not isinstance(self.mass, bool)
        if not is_number or not 0 < self.mass <= 1:
            raise ValueError(f"{type(self).__name__}: mass must lie in (0, 1], got {self.mass!r}")

    def rule(self, query_grid: TokenGrid, key_grid: TokenGrid) -> Rule:
        return Rule(0, self.mass)
