"""Patterns found by looking at a model's attention: the blocks of each head of each layer.

``calibrate`` makes them. A :class:`CalibratedLayer` is the pattern of one layer on one grid; a
:class:`CalibratedPattern` holds those of a whole model, and ``patch_model`` hands each layer its own by name.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field

from torch import Tensor

from ..token_grid import TokenGrid
from .base import Pattern
from .calibrated_file import read, write
from .calibrated_layer import CalibratedLayer


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
        return read(path, cls)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with readable metadata; the same pattern gives the same bytes."""
        write(path, self.layers, images=self.images, density=self.density, mass_kept=self.mass_kept)

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
