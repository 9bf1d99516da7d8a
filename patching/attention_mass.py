"""Where the attention of a model lies, block by block, and which blocks to keep of it.

The mass of a block of a head is the mean over query tokens of the attention weight that falls on it, so that the
masses of a head add up to one. Blocks are chosen by mass over all layers, heads and rows at once: heads that look
nearby end up with few blocks, heads that look everywhere with many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..patterns import CalibratedLayer, CalibratedPattern, Pattern
from ..patterns.calibrated_layer import pack_blocks
from ..token_grid import TokenGrid

_DIGITS = 6


@dataclass(frozen=True)
class LayerMass:
    """The attention mass of one layer.

    Args:
        names: the places of the model that hold the layer; several if it is shared.
        num_heads, head_dim: of its queries.
        grid: the grid of its tokens, None if it saw no image.
        mass: float64 ``[heads, query blocks, key blocks]`` on the CPU; None for a layer that is to stay dense.
        weights: a few of the layer's weights, by which other weights can be told.
        note: why it is to stay dense; empty for others.
    """

    names: tuple[str, ...]
    num_heads: int
    head_dim: int
    grid: TokenGrid | None
    mass: Tensor | None
    weights: tuple[float, ...]
    note: str

    def kept_by(self, mask: BlockMask) -> tuple[float, ...]:
        """Of each head, the mean over query tokens of the attention weight on the blocks of a mask."""
        if self.mass is None:
            return (1.0,) * self.num_heads
        blocks = mask.blocks[0].cpu().expand_as(self.mass)
        return tuple((self.mass * blocks).sum((1, 2)).tolist())


@dataclass(frozen=True)
class AttentionMass:
    """The attention mass of a model, as :func:`measure_attention_mass` finds it.

    Args:
        layers: that of each layer, in the order of the model.
        images: number of images it was averaged over.
    """

    layers: tuple[LayerMass, ...]
    images: int

    @property
    def measured(self) -> tuple[LayerMass, ...]:
        """The layers that can skip blocks."""
        return tuple(layer for layer in self.layers if layer.mass is not None)

    def choose(self, *, density: float | None = None, min_mass: float | None = None) -> CalibratedPattern:
        """The blocks to keep, by an overall density or by the mass that every head must keep.

        Args:
            density: fraction of block pairs, over all measured layers together. Those blocks are chosen that leave the
                least mass behind. A density too low for the blocks that are always kept is exceeded.
            min_mass: the mass that every head of every layer keeps at least; as few blocks as that takes.

        Whatever is asked for, blocks of extra tokens (class, register) and the heaviest block of each row are kept.

        Raises:
            ValueError: unless exactly one of the two is given and lies in (0, 1].
        """
        check_target("AttentionMass.choose", density, min_mass)
        masses = [layer.mass for layer in self.measured if layer.mass is not None]
        grids = [layer.grid for layer in self.measured if layer.grid is not None]
        always = [_always_kept(mass, grid) for mass, grid in zip(masses, grids)]
        if density is not None:
            chosen = iter(_within_budget(masses, always, density))
        else:
            assert min_mass is not None
            chosen = iter([_up_to_mass(mass, kept, min_mass) for mass, kept in zip(masses, always)])
        layers = []
        for layer in self.layers:
            packed, mass = None, (1.0,) * layer.num_heads
            if layer.mass is not None:
                assert layer.grid is not None
                blocks = next(chosen)
                packed, mass = pack_blocks(blocks), layer.kept_by(BlockMask(blocks, layer.grid))
            # Few digits, so that what is read from a file equals what was written to it.
            mass = tuple(round(head, _DIGITS) for head in mass)
            layers += [
                CalibratedLayer(
                    name, layer.num_heads, layer.head_dim, layer.grid, packed, mass, layer.weights, layer.note
                )
                for name in layer.names
            ]
        return CalibratedPattern(tuple(layers), self.images)

    def kept_by(self, pattern: Pattern) -> dict[str, tuple[float, ...]]:
        """The mass that each head of each measured layer keeps under a pattern, by name of the layer."""
        kept = {}
        for layer in self.measured:
            for name in layer.names:
                own = pattern.layer(name) if isinstance(pattern, CalibratedPattern) else pattern
                assert layer.grid is not None
                kept[name] = layer.kept_by(own.mask(layer.grid, layer.num_heads))
        return kept


def check_target(op: str, density: float | None, min_mass: float | None) -> None:
    """Raises unless exactly one of the two is given and is a number in (0, 1]."""
    given = {name: value for name, value in (("density", density), ("min_mass", min_mass)) if value is not None}
    if len(given) != 1:
        raise ValueError(f"{op}: exactly one of density or min_mass must be given, got {list(given) or 'none'}")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise ValueError(f"{op}: {name} must lie in (0, 1], got {value!r}")


def _always_kept(mass: Tensor, grid: TokenGrid) -> Tensor:
    """Blocks of extra tokens, and the heaviest block of each row: bool ``[heads, query blocks, key blocks]``."""
    kept = torch.zeros(mass.shape, dtype=torch.bool)
    kept.scatter_(-1, mass.argmax(-1, keepdim=True), True)
    is_extra = torch.ones(grid.num_blocks, dtype=torch.bool)
    is_extra[grid.tile_blocks] = False
    kept[:, is_extra] = True
    kept[:, :, is_extra] = True
    return kept


def _within_budget(masses: list[Tensor], always: list[Tensor], density: float) -> list[Tensor]:
    """The heaviest blocks of all layers together, as many as the density allows.

    Every block costs the same, so no other choice of as many that keeps a block in each row keeps more mass.
    """
    if not masses:
        return []
    flat = torch.cat([mass.flatten() for mass in masses])
    kept = torch.cat([blocks.flatten() for blocks in always])
    left = max(round(density * len(flat)) - int(kept.sum()), 0)
    order = flat.masked_fill(kept, -torch.inf).argsort(descending=True, stable=True)
    kept[order[:left]] = True
    parts = kept.split([mass.numel() for mass in masses])
    return [part.view_as(mass) for part, mass in zip(parts, masses)]


def _up_to_mass(mass: Tensor, always: Tensor, min_mass: float) -> Tensor:
    """For each head the heaviest blocks, just enough to keep the mass."""
    flat, kept = mass.flatten(1), always.flatten(1)  # [heads, query blocks × key blocks]
    order = flat.masked_fill(kept, torch.inf).argsort(dim=-1, descending=True, stable=True)
    ordered = flat.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    # The masses of a head add up to one within rounding alone, which must not cost a block that holds nothing.
    reached = before >= min(min_mass, 1) - 1e-9
    chosen = torch.zeros_like(kept).scatter_(-1, order, ~reached) | kept
    return chosen.view_as(mass)
