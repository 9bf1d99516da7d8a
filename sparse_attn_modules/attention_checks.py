"""What ``block_sparse_attention`` demands of its arguments. Every error is raised before anything runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .block_mask import BlockMask

OP = "block_sparse_attention"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_numbers(scale: Any, dropout_p: Any) -> None:
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p <= 1:
        raise ValueError(f"{OP}: dropout_p must be a number in [0, 1], got {dropout_p!r}")
    if scale is not None and (not isinstance(scale, (int, float)) or not -math.inf < scale < math.inf):
        raise ValueError(f"{OP}: scale must be a finite number, got {scale!r}")


def check_no_tangents(tensors: tuple[Tensor, ...]) -> None:
    """An operator without a forward-mode formula would drop tangents without a word."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(f"{OP}: gradients must be taken in reverse mode, got a forward-mode tangent")


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{OP}: {name} must have 4 dimensions [B, H, N, D], got shape {list(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{OP}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{OP}: {name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{OP}: {name} must be on the device of query, {query.device}, got {tensor.device}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{OP}: {name} must have a contiguous last dimension, got strides {tensor.stride()}")
    batch, query_heads, _, head_dim = query.shape
    if head_dim == 0:
        raise ValueError(f"{OP}: query must have a head_dim of at least 1, got shape {list(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if (tensor.shape[0], tensor.shape[3]) != (batch, head_dim):
            raise ValueError(
                f"{OP}: {name} must have query's batch and head_dim, [{batch}, …, …, {head_dim}], "
                f"got shape {list(tensor.shape)}"
            )
        if tensor.shape[1:3] != key.shape[1:3]:
            raise ValueError(f"{OP}: value must have the shape of key, {list(key.shape)}, got {list(value.shape)}")
    key_heads = key.shape[1]
    if key_heads == 0 or query_heads % key_heads:
        raise ValueError(f"{OP}: query must have a multiple of key's {key_heads} heads, got {query_heads}")


def check_mask(query: Tensor, key: Tensor, mask: BlockMask) -> None:
    if not isinstance(mask, BlockMask):
        raise TypeError(f"{OP}: mask must be a BlockMask, got {type(mask).__name__}")
    for name, tensor, grid in (("query", query, mask.query_grid), ("key", key, mask.key_grid)):
        if tensor.shape[2] != grid.num_tokens:
            raise ValueError(
                f"{OP}: mask must be for {tensor.shape[2]} {name} tokens, got one for {grid.num_tokens} ({grid})"
            )
    for name, size, expected in (
        ("batch", mask.blocks.shape[0], query.shape[0]),
        ("head", mask.blocks.shape[1], query.shape[1]),
    ):
        if size not in (1, expected):
            raise ValueError(f"{OP}: mask must have a {name} size of 1 or {expected}, got {size}")
    if mask.device != query.device:
        raise ValueError(f"{OP}: mask must be on the device of query, {query.device}, got {mask.device}")


def check_relative_position(relative_position: tuple[Tensor, Tensor] | None, query: Tensor, mask: BlockMask) -> None:
    if relative_position is None:
        return
    if not isinstance(relative_position, (tuple, list)) or len(relative_position) != 2:
        raise TypeError(f"{OP}: relative_position must be a pair (rel_h, rel_w) of tensors or None")
    for name, rel, size in zip(("rel_h", "rel_w"), relative_position, (mask.key_grid.height, mask.key_grid.width)):
        expected = [*query.shape[:3], size]
        if not isinstance(rel, Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor, got {type(rel).__name__}")
        if list(rel.shape) != expected:
            raise ValueError(f"{OP}: {name} must have shape {expected}, got {list(rel.shape)}")
        if rel.dtype != query.dtype or rel.device != query.device:
            raise ValueError(
                f"{OP}: {name} must have the dtype and device of query, {query.dtype} on {query.device}, "
                f"got {rel.dtype} on {rel.device}"
            )


def check_key_padding_mask(key_padding_mask: Tensor | None, key: Tensor) -> None:
    if key_padding_mask is None:
        return
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
        raise TypeError(f"{OP}: key_padding_mask must be a boolean tensor, true where a key is ignored")
    expected = [key.shape[0], key.shape[2]]
    if list(key_padding_mask.shape) != expected or key_padding_mask.device != key.device:
        raise ValueError(
            f"{OP}: key_padding_mask must have shape {expected} on {key.device}, "
            f"got {list(key_padding_mask.shape)} on {key_padding_mask.device}"
        )
