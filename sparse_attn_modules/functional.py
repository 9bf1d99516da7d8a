"""``block_sparse_attention``: checks its arguments, picks a backend, calls the operator."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .attention_checks import (
    check_key_padding_mask,
    check_mask,
    check_no_tangents,
    check_numbers,
    check_relative_position,
    check_tensors,
)
from .autocast import is_autocast_on
from .backends import BACKENDS, AttentionInputs, Request, select_backend
from .backends.gathered import dense_attention
from .block_mask import BlockMask
from .operator import attention_forward
from .shared_tensors import may_keep
from .tracing import jit_tracer

_MAX_PLANS = 64  # of one mask: more than a model has shapes, less than a leak


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
            of the patch in row ``y`` and column ``x``; extra tokens among the keys get none. Its values must be finite.
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
        RuntimeError: on forward-mode tangents, on a backward pass through a backward pass, and where a transform of
            ``torch.func`` takes gradients (``grad``, ``vjp``, ``jacrev``): ``torch.autograd.grad`` and
            ``torch.autograd.functional.jacobian`` do, also vectorized.
    """
    query, key, value, relative_position = _autocast(query, key, value, relative_position)
    check_numbers(scale, dropout_p)
    backend, mask = _plan(query, key, value, mask, relative_position, key_padding_mask, dropout_p > 0, backend)
    rel_h, rel_w = (None, None) if relative_position is None else relative_position
    differentiable = (query, key, value) if rel_h is None or rel_w is None else (query, key, value, rel_h, rel_w)
    check_no_tangents(differentiable)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    needs_grad = needs_grad or jit_tracer() is not None  # whose graph must not depend on what needs gradients now
    if scale is None:
        scale = query.shape[-1] ** -0.5
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
        mask.declared_density,
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


def _plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    relative_position: tuple[Tensor, Tensor] | None,
    key_padding_mask: Tensor | None,
    dropout: bool,
    backend: str | None,
) -> tuple[str, BlockMask]:
    """Checks the arguments; the backend to use and the mask in the blocks that it computes.

    The checks take longer than a small kernel, so a mask remembers the calls that passed them, by everything that
    they look at.
    """
    arguments = (query, key, value, mask, relative_position, key_padding_mask, dropout, backend)
    if torch.compiler.is_compiling() or type(query) is not Tensor:
        return _checked_plan(*arguments)
    try:
        signature = (
            *(query.shape, query.dtype, query.device, query.stride(-1)),
            *(key.shape, key.dtype, key.device, key.stride(-1)),
            *(value.shape, value.dtype, value.device, value.stride(-1)),
            None
            if relative_position is None
            else (type(relative_position), *[(x.shape, x.dtype, x.device) for x in relative_position]),
            None
            if key_padding_mask is None
            else (key_padding_mask.shape, key_padding_mask.dtype, key_padding_mask.device),
            dropout,
            backend,
        )
        plan = mask.plans.get(signature)
    except (AttributeError, IndexError, TypeError):
        return _checked_plan(*arguments)  # which tells what is wrong
    if plan is None:
        name, fitted = _checked_plan(*arguments)
        if fitted is not mask and not may_keep(mask.device):
            return name, fitted
        if len(mask.plans) >= _MAX_PLANS:
            mask.plans.clear()
        mask.plans[signature] = name, None if fitted is mask else fitted
        return name, fitted
    name, other = plan
    return name, mask if other is None else other


def _checked_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    relative_position: tuple[Tensor, Tensor] | None,
    key_padding_mask: Tensor | None,
    dropout: bool,
    backend: str | None,
) -> tuple[str, BlockMask]:
    check_tensors(query, key, value)
    check_mask(query, key, mask)
    check_relative_position(relative_position, query, mask)
    check_key_padding_mask(key_padding_mask, key)
    request = Request(
        query.device,
        query.dtype,
        query.shape[-1],
        mask.query_grid,
        mask.key_grid,
        relative_position=relative_position is not None,
        key_padding_mask=key_padding_mask is not None,
        dropout=dropout,
        is_dense=mask.is_dense,
        batch=query.shape[0],
        heads=query.shape[1],
    )
    name = select_backend(request, backend)
    return name, BACKENDS[name].fit_mask(mask)
