"""The image encoders that ``encoders.py`` measures, and the ways to compute the attention of each.

Every way shares the parameters of one model. Besides what is shipped and ours there are, for Segment Anything,
PyTorch's fused attention with the relative position written out as its mask, which is the best that plain PyTorch can
do; and for all, the same network with attention left out, values going straight to the output projection: no attention
is faster.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_attn_modules import Dense, LocalWindow, patch_model

DENSITIES = (0.5, 0.25, 0.1)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, as all these models expect them


@dataclass(frozen=True)
class Encoder:
    """An encoder, and the (image size, batch) pairs at which it is measured.

    Args:
        title: its name for people.
        timm_name: its name in timm.
        cases: sizes in pixels and batch sizes.
        segment_anything: its name in segment_anything's registry, whose encoder is taken at 1024 pixels if installed.
    """

    title: str
    timm_name: str
    cases: tuple[tuple[int, int], ...]
    segment_anything: str | None = None

    @property
    def is_sam(self) -> bool:
        return self.segment_anything is not None


ENCODERS = {
    "sam_b": Encoder("SAM ViT-B", "samvit_base_patch16", ((1024, 8), (1024, 1)), "vit_b"),
    "sam_l": Encoder("SAM ViT-L", "samvit_large_patch16", ((1024, 8), (1024, 1)), "vit_l"),
    "sam_h": Encoder("SAM ViT-H", "samvit_huge_patch16", ((1024, 8), (1024, 1)), "vit_h"),
    "vit_b": Encoder("ViT-B/16", "vit_base_patch16_224", ((224, 64), (1024, 8), (2048, 2))),
    "dinov2_l": Encoder("DINOv2-L/14 reg4", "vit_large_patch14_reg4_dinov2", ((518, 16),)),
    "dinov3_b": Encoder("DINOv3-B/16", "vit_base_patch16_dinov3", ((1024, 8), (2048, 2))),
    "dinov3_l": Encoder("DINOv3-L/16", "vit_large_patch16_dinov3", ((1024, 8), (2048, 2))),
}


def load(encoder: Encoder, size: int, device: torch.device) -> nn.Module:
    """An encoder with random float32 weights, as shipped, that maps images to features."""
    torch.manual_seed(0)
    if encoder.segment_anything and size == 1024 and importlib.util.find_spec("segment_anything"):
        from segment_anything import sam_model_registry

        model: nn.Module = sam_model_registry[encoder.segment_anything]().image_encoder
    else:
        import timm

        options: dict[str, Any] = {} if encoder.is_sam and size == 1024 else {"img_size": size}
        model = _Features(timm.create_model(encoder.timm_name, pretrained=False, num_classes=0, **options))
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.02)  # zeros otherwise, which would show nothing of the relative position
        elif "gamma" in name:
            nn.init.ones_(parameter)  # next to nothing otherwise, which would hide what attention yields
    return model.to(device).eval().requires_grad_(False)


class _Features(nn.Module):
    """A timm model up to its features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        return features


@dataclass(frozen=True)
class Implementation:
    """A way to compute attention.

    Args:
        make: changes a model, which shares its parameters with others, and returns it.
        around: what calls happen in.
        density: of ours; that of attention in full otherwise.
        for_sam: whether it is for Segment Anything alone.
    """

    make: Callable[[nn.Module], nn.Module]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    density: float = 1.0
    for_sam: bool = False


def ours(density: float) -> Implementation:
    pattern = Dense() if density == 1 else LocalWindow(density=density)
    return Implementation(lambda model: patch_model(model, pattern), density=density)


@contextmanager
def _cudnn() -> Iterator[None]:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        yield


def _replace_attention(model: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if name == "attn" and child is not None:
                module._modules[name] = replacement(child)
    return model


class NoAttention(nn.Module):
    """Projects to query, key and value, and the values to the output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj = layer.qkv, layer.proj

    def forward(self, x: Tensor, *others: Any, **options: Any) -> Tensor:
        return self.proj(self.qkv(x).chunk(3, dim=-1)[2])


class AttentionWithWrittenBias(nn.Module):
    """Attention of Segment Anything by PyTorch's fused kernel, with the relative position as a mask of all pairs."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = layer.num_heads, layer.qkv, layer.proj
        self.rel_pos_h, self.rel_pos_w = layer.rel_pos_h, layer.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        query, key, value = self.qkv(x).view(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        patches = query.unflatten(2, (height, width))
        of_rows, of_columns = (
            table[torch.arange(size, device=x.device)[:, None] - torch.arange(size, device=x.device) + size - 1]
            for table, size in ((self.rel_pos_h, height), (self.rel_pos_w, width))
        )
        rel_h = torch.einsum("bnhwd,hkd->bnhwk", patches, of_rows)
        rel_w = torch.einsum("bnhwd,wkd->bnhwk", patches, of_columns)
        bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(4).flatten(2, 3)  # [B, heads, N, N]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


IMPLEMENTATIONS = {
    "stock": Implementation(lambda model: model),
    "sdpa_bias": Implementation(lambda model: _replace_attention(model, AttentionWithWrittenBias), for_sam=True),
    "cudnn": Implementation(lambda model: model, around=_cudnn),
    "ours": ours(1.0),
    **{f"ours_{density:g}": ours(density) for density in DENSITIES},
    "no_attention": Implementation(lambda model: _replace_attention(model, NoAttention)),
}


def sharing_parameters(model: nn.Module) -> nn.Module:
    """A copy of a model with modules of its own and the same parameters."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def photographs(size: int, count: int, device: torch.device) -> Tensor:
    """Normalised photographs that ship with scikit-image: ``[count, 3, size, size]``."""
    from skimage import data

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = []
    for name in ("astronaut", "coffee", "chelsea"):
        pixels = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1).float() / 255  # [3, H, W]
        side = min(pixels.shape[1:])
        square = F.interpolate(pixels[None, :, :side, :side], (size, size), mode="bicubic", antialias=True)[0]
        images.append((square.clamp(0, 1) - mean) / std)
    return torch.stack([images[i % len(images)] for i in range(count)]).to(device)
