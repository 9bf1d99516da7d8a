"""The checks that :class:`SparseMultiheadAttention` makes of a call before it computes anything."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_NAME = "SparseMultiheadAttention"


def check_inputs(
    layer: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> None:
    """Raises ValueError or TypeError unless the arguments fit each other and the layer."""
    if query.dim() not in (2, 3):
        raise ValueError(f"{_NAME}: query must have 2 or 3 dimensions, got shape {list(query.shape)}")
    for name, tensor, channels in (
        ("query", query, layer.embed_dim),
        ("key", key, layer.kdim),
        ("value", value, layer.vdim),
    ):
        if tensor.dim() != query.dim():
            raise ValueError(f"{_NAME}: {name} must have {query.dim()} dimensions as query, got {list(tensor.shape)}")
        if tensor.shape[-1] != channels:
            raise ValueError(f"{_NAME}: {name} must have {channels} channels, got shape {list(tensor.shape)}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"{_NAME}: value must have key's tokens, {list(key.shape)}, got {list(value.shape)}")
    is_batched = query.dim() == 3
    token_dim = 1 if is_batched and layer.batch_first else 0
    batch = query.shape[1 - token_dim] if is_batched else 1
    if is_batched and key.shape[1 - token_dim] != batch:
        raise ValueError(f"{_NAME}: key must have query's batch of {batch}, got shape {list(key.shape)}")
    queries, keys = query.shape[token_dim], key.shape[token_dim]
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, [[batch, keys]] if is_batched else [[keys]])
    if attn_mask is not None:
        _check_mask("attn_mask", attn_mask, [[queries, keys], [batch * layer.num_heads, queries, keys]])
    elif is_causal:
        raise ValueError(f"{_NAME}: attn_mask must be given with is_causal, which is a hint about it, got None")


def _check_mask(name: str, mask: Tensor, shapes: list[list[int]]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{_NAME}: {name} must be boolean or floating-point, got {mask.dtype}")
    if list(mask.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{_NAME}: {name} must have shape {wanted}, got {list(mask.shape)}")
