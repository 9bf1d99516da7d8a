"""torch.nn.MultiheadAttention, in models that say how its tokens lie on a grid: torchvision's ViT."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..modules import SparseMultiheadAttention
from ..token_grid import TokenGrid
from .adapters import LeftAlone, Replaceable, Site, loaded_class

_KIND = "MultiheadAttention"


def inspect(site: Site) -> Replaceable | LeftAlone | None:
    """What can be done about a module, None if it is not an ``nn.MultiheadAttention``."""
    layer: Any = site.module
    if not isinstance(layer, nn.MultiheadAttention):
        return None
    if type(layer) is not nn.MultiheadAttention:
        return LeftAlone(type(layer).__name__, "it is a subclass of nn.MultiheadAttention")
    vit = loaded_class("torchvision.models.vision_transformer", "VisionTransformer")
    model: Any = None if vit is None else site.ancestor(vit)
    if model is None:
        return LeftAlone(_KIND, "no model around it says how its tokens lie on a grid")
    if type(model) is not vit:
        return LeftAlone(_KIND, f"{type(model).__name__} may lay out its tokens in a way of its own")
    model = site.ancestor(vit)
    side = model.image_size // model.patch_size
    grid = TokenGrid(side, side, prefix=1)

    def build(pattern: Any, backend: Any, compute_dtype: Any) -> SparseMultiheadAttention:
        return SparseMultiheadAttention.from_module(layer, pattern, backend, compute_dtype, grid=grid)

    return Replaceable(_KIND, layer.num_heads, layer.head_dim, build, lambda: (grid, 1))
