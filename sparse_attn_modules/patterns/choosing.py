"""From features of queries and keys to the blocks that attention computes.

This is the specification, in plain PyTorch on any device; on Hopper GPUs a kernel computes the same. Neither looks at a
value on the host, and every shape follows from the geometry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..token_grid import TokenGrid
from .block_features import cut_of, part_sizes


@dataclass(frozen=True)
class Rule:
    """How many key blocks a query tile takes, best first.

    Args:
        count: so many; or
        mass: as many as together draw this much of the estimated attention, if count is 0.
    """

    count: int
    mass: float

    def density(self, query_grid: TokenGrid, key_grid: TokenGrid) -> float | None:
        """The density of the masks, None where it depends on queries and keys."""
        if not self.count:
            return None
        extra_rows = query_grid.num_blocks - query_grid.num_tiles
        return (extra_rows + query_grid.num_tiles * self.count / key_grid.num_blocks) / query_grid.num_blocks


def block_mass(queries: Tensor, keys: Tensor, query_grid: TokenGrid, key_grid: TokenGrid) -> Tensor:
    """The attention that each query block is estimated to pay to each key block: ``[B, Hq, Q, K]``, rows sum to 1.

    Args:
        queries: features ``[B, Hq, query blocks · parts, F]``.
        keys: features ``[B, Hkv, key blocks · parts, F]``; ``Hq`` is a multiple of ``Hkv``.
    """
    groups = queries.shape[1] // keys.shape[1]
    if groups > 1:
        keys = keys.repeat_interleave(groups, dim=1)
    sizes = part_sizes(query_grid, cut_of(query_grid), queries.device).to(queries.dtype)
    weights = (queries @ keys.mT).softmax(-1)  # [B, Hq, query parts, key parts]
    mass = weights.unflatten(-1, (key_grid.num_blocks, -1)).sum(-1).unflatten(2, (query_grid.num_blocks, -1))
    share = sizes / sizes.sum(-1, keepdim=True)
    return torch.einsum("bhqpk,qp->bhqk", mass, share)


def choose(mass: Tensor, query_grid: TokenGrid, key_grid: TokenGrid, rule: Rule) -> Tensor:
    """The blocks to compute: bool, in the shape of ``mass``.

    Extra tokens see and are seen by everything, and every query tile sees the key tile that lies over it. These come
    first and count; then the blocks of most mass, and of equal ones the first.
    """
    certain = always_active(query_grid, key_grid, mass.device)
    order = torch.argsort(mass.masked_fill(certain, torch.inf), dim=-1, descending=True, stable=True)
    if rule.count:
        taken = torch.arange(mass.shape[-1], device=mass.device) < rule.count
        taken = taken.expand_as(mass)
    else:
        sorted_mass = mass.gather(-1, order)
        taken = sorted_mass.cumsum(-1) - sorted_mass < rule.mass * sorted_mass.sum(-1, keepdim=True)
    blocks = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, taken)
    return blocks | certain


def always_active(query_grid: TokenGrid, key_grid: TokenGrid, device: torch.device) -> Tensor:
    """Bool ``[Q, K]``: blocks of extra tokens, and each query tile's own key tile."""
    active = torch.ones(query_grid.num_blocks, key_grid.num_blocks, dtype=torch.bool, device=device)
    rows, columns = (
        _nearest(
            (query_grid.height, query_grid.width)[axis],
            query_grid.tile[axis],
            (key_grid.height, key_grid.width)[axis],
            key_grid.tile[axis],
            device,
        )
        for axis in (0, 1)
    )
    own = (rows[:, None] * key_grid.tile_columns + columns).flatten()  # [query tiles]
    tiles = torch.arange(key_grid.num_tiles, device=device)
    active[query_grid.tile_blocks, key_grid.tile_blocks] = own[:, None] == tiles
    return active


def _nearest(query_size: int, query_tile: int, key_size: int, key_tile: int, device: torch.device) -> Tensor:
    """Along one side of the image, the key tile whose centre is nearest to that of each query tile."""
    query_centres, key_centres = (
        (first + torch.clamp(first + tile, max=size)) / (2 * size)
        for size, tile in ((query_size, query_tile), (key_size, key_tile))
        for first in [torch.arange(0, size, tile, device=device, dtype=torch.float64)]
    )
    return (query_centres[:, None] - key_centres).abs().argmin(-1)
