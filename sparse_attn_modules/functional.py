"""``block_sparse_attention``: checks its arguments, picks a backend, calls the operator."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autocast import is_autocast_on
from .backends import AttentionInputs, Request, select_backend
from .backends.gathered import dense_attention
from .block_mask import BlockMask
from .operator import attention_forward

_OP = "block_sparse_attention"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = ...,
    relative_position: tuple[Tensor, Tensor] | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    backend: str | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = ...,
    relative_position: tuple[Tensor, Tensor] | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    backend: str | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    relative_position: tuple[Tensor, Tensor] | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention over the token pairs whose block pair is active in ``mask``.

    Shapes follow :func:`torch.nn.functional.scaled_dot_product_attention`. Strides are free but for a contiguous last
    dimension, so views of a fused qkv projection are read in place.

    Args:
        query: ``[B, Hq, Nq, D]``, float16, bfloat16, float32 or float64.
        key, value: ``[B, Hkv, Nk, D]`` of the same dtype and device; ``Hq`` must be a multiple of ``Hkv``
            (grouped-query attention).
        mask: which block pairs are computed; its grids must have ``Nq`` and ``Nk`` tokens.
        scale: factor on ``query · key``; ``D ** -0.5`` if None.
        relative_position: ``(rel_h, rel_w)`` of shapes ``[B, Hq, Nq, key height]`` and ``[B, Hq, Nq, key width]``: the
            decomposed bias of Segment Anything and MViTv2. ``rel_h[q, y] + rel_w[q, x]`` is added to the scaled logit
            of the patch in row ``y`` and column ``x``; extra tokens among the keys get none.
        key_padding_mask: bool ``[B, Nk]``, true for keys that must be ignored. They must be finite all the same.
        dropout_p: probability of dropping an attention weight. The seed is drawn from the generator of query's device
            (``torch.manual_seed``); for one seed every backend drops the same weights.
        backend: ``"cuda"``, ``"flex"``, ``"gathered"``, ``"reference"``, or None for the best that can run.
        return_lse: also return the log-sum-exp of each query's logits.

    Returns:
        ``[B, Hq, Nq, D]``, a transposed view of contiguous ``[B, Nq, Hq, D]``; with ``return_lse`` also
        ``[B, Hq, Nq]``, natural logarithm, float32 (float64 for float64 inputs). A query with no key to attend to
        yields 0 and −inf.

    Raises:
        ValueError, TypeError: if an argument is not as described, or the backend asked for cannot run.
        RuntimeError: on forward-mode tangents, and on a backward pass through a backward pass.
    """
    query, key, value, relative_position = _autocast(query, key, value, relative_position)
    _check_tensors(query, key, value)
    _check_mask(query, key, mask)
    rel_h, rel_w = _check_relative_position(relative_position, query, mask)
    _check_key_padding_mask(key_padding_mask, key)
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p <= 1:
        raise ValueError(f"{_OP}: dropout_p must be a number in [0, 1], got {dropout_p!r}")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif not isinstance(scale, (int, float)) or not -math.inf < scale < math.inf:
        raise ValueError(f"{_OP}: scale must be a finite number, got {scale!r}")

    differentiable = (query, key, value) if rel_h is None or rel_w is None else (query, key, value, rel_h, rel_w)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    _check_no_tangents(differentiable)
    request = Request(
        query.device,
        query.dtype,
        query.shape[-1],
        mask.query_grid,
        mask.key_grid,
        relative_position=rel_h is not None,
        key_padding_mask=key_padding_mask is not None,
        dropout=dropout_p > 0,
        is_dense=mask.is_dense,
    )
    backend = select_backend(request, backend)
    is_plain = mask.is_dense and rel_h is None and key_padding_mask is None and dropout_p == 0 and not return_lse
    if backend == "gathered" and is_plain:
        # Nothing is gathered then, and autograd of the dense kernels needs no operator of ours around them.
        return dense_attention(query, key, value, scale)
    inputs = AttentionInputs(
        query,
        key,
        value,
        mask.blocks,
        mask.key_counts,
        mask.key_indices,
        mask.row_order,
        mask.query_counts if needs_grad else None,
        mask.query_indices if needs_grad else None,
        rel_h,
        rel_w,
        key_padding_mask,
        torch.randint(2**62, (1,), device=query.device) if dropout_p > 0 else None,
        mask.query_grid,
        mask.key_grid,
        float(scale),
        float(dropout_p),
        mask.is_dense,
    )
    out, lse = attention_forward(inputs, backend, return_lse or needs_grad, needs_grad)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _autocast(
    query: Tensor, key: Tensor, value: Tensor, relative_position: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Under autocast attention runs in its dtype, as ``scaled_dot_product_attention`` does."""
    if not isinstance(query, Tensor):
        return query, key, value, relative_position
    device_type = query.device.type
    if not is_autocast_on(device_type):
        return query, key, value, relative_position
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        is_castable = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if is_castable else tensor

    if isinstance(relative_position, (tuple, list)) and len(relative_position) == 2:
        relative_position = cast(relative_position[0]), cast(relative_position[1])
    return cast(query), cast(key), cast(value), relative_position


def _check_no_tangents(tensors: tuple[Tensor, ...]) -> None:
    """An operator without a forward-mode formula would drop tangents without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(f"{_OP}: gradients must be taken in reverse mode, got a forward-mode tangent")


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_OP}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{_OP}: {name} must have 4 dimensions [B, H, N, D], got shape {list(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{_OP}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{_OP}: {name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{_OP}: {name} must be on the device of query, {query.device}, got {tensor.device}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{_OP}: {name} must have a contiguous last dimension, got strides {tensor.stride()}")
    batch, query_heads, _, head_dim = query.shape
    if head_dim == 0:
        raise ValueError(f"{_OP}: query must have a head_dim of at least 1, got shape {list(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if (tensor.shape[0], tensor.shape[3]) != (batch, head_dim):
            raise ValueError(
                f"{_OP}: {name} must have query's batch and head_dim, [{batch}, …, …, {head_dim}], "
                f"got shape {list(tensor.shape)}"
            )
        if tensor.shape[1:3] != key.shape[1:3]:
            raise ValueError(f"{_OP}: value must have the shape of key, {list(key.shape)}, got {list(value.shape)}")
    key_heads = key.shape[1]
    if key_heads == 0 or query_heads % key_heads:
        raise ValueError(f"{_OP}: query must have a multiple of key's {key_heads} heads, got {query_heads}")


def _check_mask(query: Tensor, key: Tensor, mask: BlockMask) -> None:
    if not isinstance(mask, BlockMask):
        raise TypeError(f"{_OP}: mask must be a BlockMask, got {type(mask).__name__}")
    for name, tensor, grid in (("query", query, mask.query_grid), ("key", key, mask.key_grid)):
        if tensor.shape[2] != grid.num_tokens:
            raise ValueError(
                f"{_OP}: mask must be for {tensor.shape[2]} {name} tokens, got one for {grid.num_tokens} ({grid})"
            )
    for name, size, expected in (
        ("batch", mask.blocks.shape[0], query.shape[0]),
        ("head", mask.blocks.shape[1], query.shape[1]),
    ):
        if size not in (1, expected):
            raise ValueError(f"{_OP}: mask must have a {name} size of 1 or {expected}, got {size}")
    if mask.device != query.device:
        raise ValueError(f"{_OP}: mask must be on the device of query, {query.device}, got {mask.device}")


def _check_relative_position(
    relative_position: tuple[Tensor, Tensor] | None, query: Tensor, mask: BlockMask
) -> tuple[Tensor | None, Tensor | None]:
    if relative_position is None:
        return None, None
    if not isinstance(relative_position, (tuple, list)) or len(relative_position) != 2:
        raise TypeError(f"{_OP}: relative_position must be a pair (rel_h, rel_w) of tensors or None")
    for name, rel, size in zip(("rel_h", "rel_w"), relative_position, (mask.key_grid.height, mask.key_grid.width)):
        expected = [*query.shape[:3], size]
        if not isinstance(rel, Tensor):
            raise TypeError(f"{_OP}: {name} must be a tensor, got {type(rel).__name__}")
        if list(rel.shape) != expected:
            raise ValueError(f"{_OP}: {name} must have shape {expected}, got {list(rel.shape)}")
        if rel.dtype != query.dtype or rel.device != query.device:
            raise ValueError(
                f"{_OP}: {name} must have the dtype and device of query, {query.dtype} on {query.device}, "
                f"got {rel.dtype} on {rel.device}"
            )
    rel_h, rel_w = relative_position
    return rel_h, rel_w


def _check_key_padding_mask(key_padding_mask: Tensor | None, key: Tensor) -> None:
    if key_padding_mask is None:
        return
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
        raise TypeError(f"{_OP}: key_padding_mask must be a boolean tensor, true where a key is ignored")
    expected = [key.shape[0], key.shape[2]]
    if list(key_padding_mask.shape) != expected or key_padding_mask.device != key.device:
        raise ValueError(
            f"{_OP}: key_padding_mask must have shape {expected} on {key.device}, "
            f"got {list(key_padding_mask.shape)} on {key_padding_mask.device}"
        )
