"""timm: vision transformers (ViT, DeiT, DINOv2, SigLIP, …), EVA and its kin (EVA02, RoPE-ViT, DINOv3), samvit."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..modules import SAMAttentionSparse, ViTSparseAttention, head_dim_of
from ..token_grid import TokenGrid
from .adapters import LeftAlone, Replaceable, Site, loaded_class, loaded_classes
from .grids import GridSource

_VIT_LAYERS = (
    ("timm.layers.attention", "Attention"),
    ("timm.layers.attention", "AttentionRope"),
    ("timm.models.eva", "EvaAttention"),
)
_SAM_LAYER = ("timm.models.vision_transformer_sam", "Attention")
_SAM_MODEL = ("timm.models.vision_transformer_sam", "VisionTransformerSAM")

# Models whose sequences are known to be prefix tokens, then patches in raster order: laid out by the method named.
_VIT_MODELS = (
    ("timm.models.vision_transformer", "VisionTransformer", "_pos_embed"),
    ("timm.models.deit", "VisionTransformerDistilled", "_pos_embed"),
    ("timm.models.eva", "Eva", "_pos_embed"),
)

_LEFT_ALONE = {
    ("timm.layers.diff_attention", "DiffAttention"): "it subtracts two softmaxes",
    ("timm.layers.attention_pool", "AttentionPoolLatent"): "it pools the tokens with a latent query",
    ("timm.layers.attention_pool", "AttentionPoolPrr"): "it pools the tokens with their mean as the query",
    ("timm.models.beit", "Attention"): "it adds a bias from a table that includes the class token",
    ("timm.models.vision_transformer_relpos", "RelPosAttention"): "it adds a bias for every pair of tokens",
    ("timm.models.swin_transformer", "WindowAttention"): "its windows are smaller than a block",
    ("timm.models.swin_transformer_v2", "WindowAttention"): "its windows are smaller than a block",
    ("timm.models.hiera", "MaskUnitAttention"): "its units are smaller than a block",
    ("timm.models.hieradet_sam2", "MultiScaleAttention"): "it pools queries inside windows",
    ("timm.models.mvitv2", "MultiScaleAttention"): "it pools queries, keys and values",
    ("timm.models.gemma4_vit", "Gemma4Attention"): "its forward pass is not reproduced here",
    ("timm.models.vision_transformer", "ParallelScalingBlock"): "the block has no attention layer of its own",
    ("timm.models.vision_transformer", "DiffParallelScalingBlock"): "the block has no attention layer of its own",
}


def inspect(site: Site) -> Replaceable | LeftAlone | None:
    """What can be done about a module, None if it is not an attention layer of timm."""
    layer: Any = site.module
    for module, name in (*_VIT_LAYERS, _SAM_LAYER):
        known = loaded_class(module, name)
        if known is None or not isinstance(layer, known):
            continue
        kind = "timm samvit Attention" if (module, name) == _SAM_LAYER else f"timm {name}"
        if type(layer) is not known:
            return LeftAlone(f"timm {type(layer).__name__}", f"it is a subclass of timm's {name}")
        return _inspect_sam(site, kind) if (module, name) == _SAM_LAYER else _inspect_vit(site, kind)
    for (module, name), reason in _LEFT_ALONE.items():
        if type(layer) is loaded_class(module, name):
            return LeftAlone(f"timm {name}", reason)
    return None


def _inspect_vit(site: Site, kind: str) -> Replaceable | LeftAlone:
    layer: Any = site.module
    model = site.ancestor(*loaded_classes(*((module, name) for module, name, _ in _VIT_MODELS)))
    if model is None:
        return LeftAlone(kind, "no model around it says how its tokens lie on a grid")
    layouts = [
        getattr(known, method)
        for module, name, method in _VIT_MODELS
        if (known := loaded_class(module, name)) is not None
    ]
    if type(model)._pos_embed not in layouts:  # type: ignore[attr-defined]
        return LeftAlone(kind, f"{type(model).__name__} lays out its tokens in a way of its own")
    if not hasattr(model.patch_embed, "dynamic_feat_size"):
        return LeftAlone(kind, f"{type(model.patch_embed).__name__} does not tell its grid of patches")
    source = site.source(model.patch_embed, model.num_prefix_tokens)  # type: ignore[arg-type]

    def geometry() -> tuple[TokenGrid, int] | None:
        grid = source.current()
        return None if grid is None else (grid, 1)

    def build(pattern: Any, backend: Any, compute_dtype: Any) -> ViTSparseAttention:
        return ViTSparseAttention.from_module(layer, pattern, source, backend, compute_dtype)

    return Replaceable(kind, layer.num_heads, head_dim_of(layer), build, geometry, source)


def _inspect_sam(site: Site, kind: str) -> Replaceable | LeftAlone:
    layer: Any = site.module
    model: Any = site.ancestor(*loaded_classes(_SAM_MODEL))
    block: Any = site.ancestors[-1]
    window = getattr(block, "window_size", 0)
    source = None if model is None else site.source(model.patch_embed, prefix=0)
    build = partial(SAMAttentionSparse.from_module, layer)
    geometry = partial(windows_of, source, window)
    return Replaceable(kind, layer.num_heads, head_dim_of(layer), build, geometry, source)


def windows_of(source: GridSource | None, window: int) -> tuple[TokenGrid, int] | None:
    """The grid of one window and the number of windows; the whole image, once, where ``window`` is 0."""
    grid = None if source is None else source.current()
    if grid is None:
        return (TokenGrid(window, window), 1) if window else None
    if not window:
        return grid, 1
    return TokenGrid(window, window), -(-grid.height // window) * -(-grid.width // window)
