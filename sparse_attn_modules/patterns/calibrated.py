"""Patterns found by looking at a model's attention: the blocks of each head of each layer, kept as bits.

``calibrate`` makes them. A :class:`CalibratedLayer` is the pattern of one layer on one grid; a
:class:`CalibratedPattern` holds those of a whole model, and ``patch_model`` hands each layer its own by name.
"""

from __future__ import annotations

import hashlib
import os
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


@dataclass(frozen=True)
class CalibratedPattern(Pattern):
    """What calibration chose for a model: a pattern for each of its attention layers.

    Give it to ``patch_model``, which checks that it was made for such a model (its layers, their heads, channels per
    head and grids) and hands each layer its own. Weights may differ, say after fine-tuning; the log says so once where
    they differ by much. The names hold for the model that was calibrated, for a part of it, for a model that holds it,
    and under the wrappers of ``torch.compile`` and DDP.

    On an image size other than that of calibration attention is dense, which is exact, and the log says so once.

    Args:
        layers: the pattern of each layer, in the order of the model.
        images: number of images it was made from.
    """

    layers: tuple[CalibratedLayer, ...] = field(repr=False)
    images: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        names = [layer.name for layer in self.layers]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"CalibratedPattern: layers must have distinct names and not be empty, got {names}")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibratedPattern:
        """The pattern that :meth:`save` wrote. Nothing in the file is executed.

        Raises:
            ValueError: if it is no such file, or one of a later format.
        """
        from .calibrated_file import read

        return read(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with readable metadata; the same pattern gives the same bytes."""
        from .calibrated_file import write

        write(self, path)

    @property
    def sparse_layers(self) -> tuple[CalibratedLayer, ...]:
        """The layers that were calibrated: all but those that stay dense."""
        return tuple(layer for layer in self.layers if not layer.is_dense)

    @property
    def density(self) -> float:
        """Fraction of block pairs that are computed, over the layers that were calibrated."""
        counts = [(int(blocks.sum()), blocks.numel()) for blocks in (x.chosen_blocks() for x in self.sparse_layers)]
        return sum(active for active, _ in counts) / sum(total for _, total in counts) if counts else 1.0

    @property
    def mass_kept(self) -> float:
        """Mean over the calibrated layers and their heads of the attention weight on blocks that are computed."""
        masses = [mass for layer in self.sparse_layers for mass in layer.mass]
        return sum(masses) / len(masses) if masses else 1.0

    @property
    def digest(self) -> str:
        """SHA-256 of what is computed: patterns that are equal have the same, in every process."""
        content = hashlib.sha256()
        for layer in self.layers:
            grid = None if layer.grid is None else layer.grid.pack()
            content.update(repr((layer.name, layer.num_heads, layer.head_dim, grid, layer.is_dense)).encode())
            content.update(layer.packed or b"")
        return content.hexdigest()

    def layer(self, name: str) -> CalibratedLayer:
        """The pattern of a layer by its name.

        Raises:
            KeyError: if there is no such layer.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"CalibratedPattern: name must be one of {[layer.name for layer in self.layers]}, got {name!r}")

    def blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        raise ValueError(
            f"CalibratedPattern: it must be given to patch_model as it is, which hands each layer its own pattern, got "
            f"a single layer with {num_heads} heads on {query_grid}; that of one layer is pattern.layer(name)"
        )

    def __str__(self) -> str:
        return (
            f"CalibratedPattern({len(self.sparse_layers)} of {len(self.layers)} layers, density {self.density:.3f}, "
            f"mass kept {self.mass_kept:.4f}, {self.images} images)"
        )

    __repr__ = __str__


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
