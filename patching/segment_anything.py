"""segment_anything: the image encoder of SAM."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..modules import SAMAttentionSparse, head_dim_of
from ..token_grid import TokenGrid
from .adapters import LeftAlone, Replaceable, Site, loaded_class, loaded_classes

_ENCODER = "segment_anything.modeling.image_encoder"


def inspect(site: Site) -> Replaceable | LeftAlone | None:
    """What can be done about a module, None if it is not an attention layer of segment_anything."""
    layer: Any = site.module
    known = loaded_class(_ENCODER, "Attention")
    if known is not None and isinstance(layer, known):
        if type(layer) is not known:
            return LeftAlone(f"SAM {type(layer).__name__}", "it is a subclass of segment_anything's Attention")
        build = partial(SAMAttentionSparse.from_module, layer)
        return Replaceable("SAM Attention", layer.num_heads, head_dim_of(layer), build, partial(_geometry, site))
    if type(layer) is loaded_class("segment_anything.modeling.transformer", "Attention"):
        return LeftAlone("SAM decoder Attention", "one of its sides is a handful of prompt tokens")
    return None


def _geometry(site: Site) -> tuple[TokenGrid, int] | None:
    window = getattr(site.ancestors[-1], "window_size", 0)
    encoder: Any = site.ancestor(*loaded_classes((_ENCODER, "ImageEncoderViT")))
    # The convolution itself, where an adapter has been put around it.
    projections = [] if encoder is None else encoder.patch_embed.proj.modules()
    convolution = next((module for module in projections if isinstance(module, nn.Conv2d)), None)
    if convolution is None:
        return (TokenGrid(window, window), 1) if window else None
    height, width = (encoder.img_size // stride for stride in convolution.stride)
    if not window:
        return TokenGrid(height, width), 1
    return TokenGrid(window, window), -(-height // window) * -(-width // window)
