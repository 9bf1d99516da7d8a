"""The torch operators behind ``block_sparse_attention``: schema, fake kernels, autograd, dispatch to a backend."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS, AttentionInputs
from .backends.interface import tokens_before_heads
from .token_grid import TokenGrid

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor blocks, Tensor key_counts, Tensor key_indices, Tensor row_order, "
    "Tensor? query_counts, Tensor? query_indices, Tensor? rel_h, Tensor? rel_w, Tensor? key_padding_mask, "
    "Tensor? dropout_seed, int[] query_grid, int[] key_grid, float scale, float dropout_p, bool is_dense, str backend"
)
_NUM_INPUTS = _INPUTS.count(",") + 1
_NUM_TENSORS = _INPUTS.count("Tensor")

_library = torch.library.Library("sparse_attn_modules", "DEF")
_library.define(f"attention_forward({_INPUTS}, bool with_lse) -> (Tensor out, Tensor lse)")
_library.define(
    f"attention_backward({_INPUTS}, Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_rel_h, Tensor grad_rel_w)"
)


def attention_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (empty unless ``with_lse``); arguments as the schema says."""
    return torch.ops.sparse_attn_modules.attention_forward.default(*arguments)


# Checking the numbers of a grid at every call would take longer than a launch.
@lru_cache(maxsize=256)
def _unpacked(*numbers: int) -> TokenGrid:
    return TokenGrid.unpack(list(numbers))


def _inputs(arguments: tuple[Any, ...]) -> tuple[AttentionInputs, Any]:
    """The backend's view of the operator's arguments, and the backend."""
    *tensors, query_grid, key_grid, scale, dropout_p, is_dense, backend = arguments
    grids = _unpacked(*query_grid), _unpacked(*key_grid)
    inputs = AttentionInputs(*tensors, *grids, scale, dropout_p, is_dense)  # type: ignore[call-arg]
    return inputs, BACKENDS[backend]


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Backends choose the precision of every step; autocast must not reach into them."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@torch.library.impl(_library, "attention_forward", "CompositeExplicitAutograd")
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *operands, with_lse = arguments
    inputs, backend = _inputs(tuple(operands))
    with _without_autocast(inputs.query):
        out, lse = backend.forward(inputs, with_lse)
    return out, inputs.query.new_empty(0, dtype=inputs.statistics_dtype) if lse is None else lse


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *operands, grad_out, grad_lse, out, lse = arguments
    inputs, backend = _inputs(tuple(operands))
    with _without_autocast(inputs.query):
        grads = backend.backward(inputs, grad_out, grad_lse, out, lse)
    relative = (grads.rel_h, grads.rel_w)
    return (
        *(tokens_before_heads(grad) for grad in (grads.query, grads.key, grads.value)),
        *(inputs.query.new_empty(0) if grad is None else grad.contiguous() for grad in relative),
    )


def _new_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@torch.library.register_fake("sparse_attn_modules::attention_forward", lib=_library)
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, with_lse = arguments[0], arguments[-1]
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse_shape = query.shape[:-1] if with_lse else (0,)
    return _new_like(query), query.new_empty(lse_shape, dtype=lse_dtype)


@torch.library.register_fake("sparse_attn_modules::attention_backward", lib=_library)
def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    query, key, value = arguments[:3]
    rel_h, rel_w = arguments[9:11]
    relative = (query.new_empty(0) if rel is None else rel.new_empty(rel.shape) for rel in (rel_h, rel_w))
    return (*(_new_like(tensor) for tensor in (query, key, value)), *relative)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, _ = inputs
    ctx.save_for_backward(*operands[:_NUM_TENSORS], *output)
    ctx.constants = operands[_NUM_TENSORS:]
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    no_grad = (None,) * (_NUM_INPUTS + 1)
    if grad_out is None and grad_lse is None:
        return no_grad
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.sparse_attn_modules.attention_backward.default(
        *tensors, *ctx.constants, grad_out, grad_lse, out, lse
    )
    has_relative_position = tensors[9] is not None
    relative = grads[3:] if has_relative_position else (None, None)
    return (*grads[:3], *no_grad[3:9], *relative, *no_grad[11:])


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "block_sparse_attention: gradients must be of first order, got a backward pass through a backward pass"
    )


torch.library.register_autograd(
    "sparse_attn_modules::attention_forward", _autograd_backward, setup_context=_save_for_backward, lib=_library
)
torch.library.register_autograd(
    "sparse_attn_modules::attention_backward",
    _no_double_backward,
    setup_context=lambda ctx, inputs, output: None,
    lib=_library,
)
