"""The blocks that calibration chose for one layer, kept as bits."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..notices import log_once
from ..token_grid import TokenGrid
from .base import Pattern


@dataclass(frozen=True)
class CalibratedLayer(Pattern):
    """The blocks that calibration chose for one layer.

    They hold on the grid that they were chosen on. On any other, attention is dense, which is exact, and the log says
    so once: a mask is never misplaced. Two layers are equal if they compute the same.

    Args:
        name: dotted path of the layer from the model.
        num_heads: number of query heads.
        head_dim: channels per head.
        grid: the grid of its tokens, None for a dense layer that saw no image.
        packed: the blocks, as :func:`pack_blocks` packs them; None for a layer that stays dense.
        mass: of each head, the mean over query tokens of the attention weight on the blocks that are computed.
        weights: a few of the layer's weights, by which other weights can be told; may be empty.
        note: why the layer stays dense; empty for others.

    Raises:
        ValueError: if ``packed`` has not the size of a mask for the heads and the grid.
    """

    name: str
    num_heads: int = field(repr=False)
    head_dim: int = field(repr=False)
    grid: TokenGrid | None = field(repr=False)
    packed: bytes | None = field(repr=False)
    mass: tuple[float, ...] = field(repr=False, compare=False)
    weights: tuple[float, ...] = field(default=(), repr=False, compare=False)
    note: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.packed is None:
            return
        if self.grid is None:
            raise ValueError(f"CalibratedLayer: grid must be given with blocks, got none for {self.name}")
        expected = self.num_heads * self.grid.num_blocks * _packed_width(self.grid.num_blocks)
        if len(self.packed) != expected:
            raise ValueError(
                f"CalibratedLayer: packed must hold {expected} bytes for {self.num_heads} heads on {self.grid}, "
                f"got {len(self.packed)} for {self.name}"
            )

    @property
    def is_dense(self) -> bool:
        """Whether the layer was left dense by calibration."""
        return self.packed is None

    @property
    def density(self) -> float:
        """Fraction of block pairs that the layer computes."""
        return 1.0 if self.packed is None else float(self.chosen_blocks().double().mean())

    @property
    def mass_kept(self) -> float:
        """Mean over heads of the attention weight on the blocks that are computed."""
        return sum(self.mass) / len(self.mass) if self.mass else 1.0

    def chosen_blocks(self) -> Tensor:
        """Bool ``[heads, query blocks, key blocks]`` on the CPU.

        Raises:
            ValueError: if the layer was left dense on a grid that is not known.
        """
        if self.grid is None:
            raise ValueError(f"CalibratedLayer: grid must be known, got none for {self.name}")
        shape = (self.num_heads, self.grid.num_blocks, self.grid.num_blocks)
        return torch.ones(shape, dtype=torch.bool) if self.packed is None else unpack_blocks(self.packed, shape)

    def block_mask(self) -> BlockMask:
        """The mask on the grid of calibration."""
        if self.grid is None:
            raise ValueError(f"CalibratedLayer: grid must be known, got none for {self.name}")
        return self.mask(self.grid, self.num_heads)

    def blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        if num_heads != self.num_heads:
            raise ValueError(f"CalibratedLayer: num_heads must be {self.num_heads} for {self.name}, got {num_heads}")
        if query_grid == self.grid and key_grid == self.grid:
            return self.chosen_blocks()
        if self.packed is not None:
            log_once(f"CalibratedLayer: attention is dense on {query_grid}: its blocks were chosen on {self.grid}")
        return torch.ones(1, query_grid.num_blocks, key_grid.num_blocks, dtype=torch.bool)

    def __repr__(self) -> str:
        return f"CalibratedLayer({self.name!r}, density {self.density:.3f}, mass {self.mass_kept:.4f})"


def pack_blocks(blocks: Tensor) -> bytes:
    """Bool ``[..., K]`` as bits, the first in the lowest bit of the first byte; rows end at whole bytes."""
    width = _packed_width(blocks.shape[-1])
    bits = torch.zeros(*blocks.shape[:-1], width * 8, dtype=torch.uint8)
    bits[..., : blocks.shape[-1]] = blocks.cpu()
    packed = (bits.unflatten(-1, (width, 8)) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return bytes(packed.flatten().tolist())


def unpack_blocks(packed: bytes, shape: tuple[int, ...]) -> Tensor:
    """The blocks ``[..., K]`` that :func:`pack_blocks` packed."""
    # A copy, for the memory of bytes must not be written to.
    numbers = torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(*shape[:-1], -1, 1)
    bits = (numbers >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.bool().flatten(-2)[..., : shape[-1]].contiguous()


def _packed_width(length: int) -> int:
    return -(-length // 8)
