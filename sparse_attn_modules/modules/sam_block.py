"""A window block of the Segment Anything image encoder that leaves the cutting of windows to its attention.

The block of the library pads the image to whole windows, cuts it, and projects the padding too: 4900 patches for the
4096 of an image. Here attention gets the image, and reads the windows from it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from .sam import SAMAttentionSparse

_NAME = "SAMWindowBlock"
_REPLACED = (
    ("segment_anything.modeling.image_encoder", "Block"),
    ("timm.models.vision_transformer_sam", "Block"),
)


class SAMWindowBlock(nn.Module):
    """Drop-in for a window block of ``segment_anything``'s image encoder or of timm's ``samvit`` models.

    It holds the very submodules, parameters and buffers of the block it replaces, and goes on holding the same ones as
    that: what is put in one is put in both. Where attention is none of ours, or stochastic depth drops whole windows,
    it runs as the library's block does. Modules that look at ``attn``, forward hooks say, see ``[B, H, W, C]`` rather
    than windows; projections that are more than ``nn.Linear``, by an adapter or a hook, get windows all the same.
    """

    attn: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    window_size: int
    _library_block: Any

    @classmethod
    def from_module(cls, block: nn.Module) -> SAMWindowBlock:
        """The replacement of a block, made of the very submodules of that block.

        Raises:
            TypeError: if the block is neither of the two classes; their subclasses may compute something else.
            ValueError: if it has no windows.
        """
        if not is_replaceable(block):
            raise TypeError(
                f"{_NAME}.from_module: block must be the Block of segment_anything's image encoder or of timm's "
                f"vision_transformer_sam, got {type(block).__module__}.{type(block).__qualname__}"
            )
        window_size: Any = block.window_size
        if window_size <= 0:
            raise ValueError(f"{_NAME}.from_module: block must have a positive window_size, got {window_size}")
        new = cls()
        for name, value in vars(block).items():
            if not name.startswith("_"):
                setattr(new, name, value)
        for name in _SHARED:
            setattr(new, name, getattr(block, name))
        new._library_block = type(block)
        return new

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` -> ``[B, H, W, C]``"""
        attention = self.attn
        ls1, drop_path1, ls2, drop_path2 = (getattr(self, name, None) for name in _OF_TIMM)
        drops_windows = self.training and drop_path1 is not None and not isinstance(drop_path1, nn.Identity)
        if drops_windows or not isinstance(attention, SAMAttentionSparse):
            out: Tensor = self._library_block.forward(self, x)
            return out
        attended = attention(self.norm1(x), window_size=self.window_size)
        x = x + _through(attended, ls1, drop_path1)
        return x + _through(self.mlp(self.norm2(x)), ls2, drop_path2)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}"


_SHARED = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
_OF_TIMM = ("ls1", "drop_path1", "ls2", "drop_path2")


def _through(x: Tensor, *modules: nn.Module | None) -> Tensor:
    for module in modules:
        if module is not None:
            x = module(x)
    return x


def is_replaceable(block: nn.Module) -> bool:
    """Whether a module is exactly one of the two classes."""
    return any(type(block) is getattr(sys.modules.get(module), name, None) for module, name in _REPLACED)
