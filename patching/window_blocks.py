"""Window blocks of Segment Anything: replaced where their attention is, so that windows are read in place."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..modules import SAMAttentionSparse, SAMWindowBlock
from ..modules.sam_block import is_replaceable
from .walk import Original, adopt, original_of


def fit_window_blocks(model: nn.Module) -> None:
    """Puts a :class:`SAMWindowBlock` around every patched attention layer, and the library's block around all others.

    A model that is such a block itself keeps its class.
    """
    replacements: dict[int, SAMWindowBlock] = {}
    places = [(parent, key) for parent in model.modules() for key in parent._modules]
    for parent, key in places:
        current = parent._modules[key]
        if current is None:
            continue
        memory = original_of(current) if isinstance(current, SAMWindowBlock) else None
        original = current if memory is None else memory.module
        if not _is_wanted(original):
            if original is not current:
                _carry_back(current, original)
                parent._modules[key] = original
            continue
        if isinstance(current, SAMWindowBlock):
            replacements.setdefault(id(original), current)
        elif id(original) not in replacements:
            replacements[id(original)] = _replacement(original)
        parent._modules[key] = replacements[id(original)]


def _is_wanted(block: Any) -> bool:
    if not is_replaceable(block) or block.window_size <= 0 or "forward" in vars(block):
        return False
    attention = block._modules.get("attn")
    return isinstance(attention, SAMAttentionSparse) and original_of(attention) is not None


def _replacement(block: nn.Module) -> SAMWindowBlock:
    new = SAMWindowBlock.from_module(block)
    adopt(new, block)
    vars(new)["_original"] = Original(block)
    return new


def _carry_back(current: nn.Module, original: nn.Module) -> None:
    """Sets on the original what was set on its replacement; all else they share."""
    original._is_full_backward_hook = current._is_full_backward_hook
    for name, value in vars(current).items():
        if not name.startswith("_") and name != "forward":
            setattr(original, name, value)
