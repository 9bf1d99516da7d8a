"""The torch operators behind ``block_sparse_attention``: schema, fake kernels, autograd, dispatch to a backend.

A call through the dispatcher and ``torch.library``'s autograd takes several times as long on the host as a small kernel
on the device. Eager calls that nobody watches therefore go to the backend directly, in training from a function of
autograd. What traces, intercepts or transforms operators takes the way through the operator, and so does a backward
pass that shall be differentiable.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .autocast import is_autocast_on, without_autocast
from .backends import BACKENDS, AttentionInputs
from .backends.interface import AttentionGradients, empty_tokens_before_heads, tokens_before_heads
from .token_grid import TokenGrid
from .tracing import is_disguised, is_watched

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor blocks, Tensor key_counts, Tensor key_indices, Tensor row_order, "
    "Tensor? query_counts, Tensor? query_indices, Tensor? rel_h, Tensor? rel_w, Tensor? key_padding_mask, "
    "Tensor? dropout_seed, int[] query_grid, int[] key_grid, float scale, float dropout_p, bool is_dense, "
    "float? density, str backend"
)
_NUM_INPUTS = _INPUTS.count(",") + 1
_TENSORS = [argument.split()[1] for argument in _INPUTS.split(", ") if argument.startswith("Tensor")]

_library = torch.library.Library("sparse_attn_modules", "DEF")
_library.define(f"attention_forward({_INPUTS}, bool with_lse) -> (Tensor out, Tensor lse)")
_library.define(
    f"attention_backward({_INPUTS}, Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_rel_h, Tensor grad_rel_w)"
)


def attention_forward(
    inputs: AttentionInputs, backend: str, with_lse: bool, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Output and, if asked for, log-sum-exp: through the operator wherever somebody may be watching."""
    if not is_watched() and type(inputs.query) is Tensor:
        if not needs_grad:
            return _run_forward(inputs, backend, with_lse)
        saved, others = _split(inputs)
        return _EagerAttention.apply(*saved, others, backend)
    out, lse = torch.ops.sparse_attn_modules.attention_forward.default(*_arguments(inputs, backend), with_lse)
    return out, lse if with_lse else None


def _run_forward(inputs: AttentionInputs, backend: str, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    device_type = inputs.query.device.type
    if not is_autocast_on(device_type):
        return BACKENDS[backend].forward(inputs, with_lse)
    with without_autocast(device_type):
        return BACKENDS[backend].forward(inputs, with_lse)


def _run_backward(
    inputs: AttentionInputs, backend: str, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> AttentionGradients:
    with without_autocast(inputs.query.device.type):
        return BACKENDS[backend].backward(inputs, grad_out, grad_lse, out, lse)


# What autograd must save: it then sees that a caller changed one in between. The masks' lists nobody may change.
_SAVED = ("query", "key", "value", "rel_h", "rel_w", "key_padding_mask")


class _EagerAttention(torch.autograd.Function):
    """``apply(*saved, others, backend) -> (out, lse)``, with the inputs as :func:`_split` gives them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        *saved, others, backend = arguments
        out, lse = _run_forward(AttentionInputs(**dict(zip(_SAVED, saved)), **others), backend, with_lse=True)
        ctx.save_for_backward(*saved, out, lse)
        ctx.others, ctx.backend = others, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse = grad_outputs
        *saved, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * (len(_SAVED) + 2)
        is_plain = not any(grad is not None and is_disguised(grad) for grad in grad_outputs)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        inputs = AttentionInputs(**dict(zip(_SAVED, saved)), **ctx.others)
        # A backward pass that shall be differentiable must say that it is not: the operator does.
        through_operator = torch.is_grad_enabled() or is_watched() or not is_plain
        run = _backward_operator if through_operator else _run_backward
        grads = run(inputs, ctx.backend, grad_out, grad_lse, out, lse)
        return grads.query, grads.key, grads.value, grads.rel_h, grads.rel_w, None, None, None


def _split(inputs: AttentionInputs) -> tuple[list[Tensor | None], dict[str, Any]]:
    """The inputs that autograd saves, and the others by name."""
    others = dict(vars(inputs))
    return [others.pop(name) for name in _SAVED], others


def _backward_operator(
    inputs: AttentionInputs, backend: str, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> AttentionGradients:
    """The gradients, through the operator."""
    *grads, grad_rel_h, grad_rel_w = torch.ops.sparse_attn_modules.attention_backward.default(
        *_arguments(inputs, backend), grad_out, grad_lse, out, lse
    )
    relative = (None, None) if inputs.rel_h is None else (grad_rel_h, grad_rel_w)
    return AttentionGradients(*grads, *relative)


def _arguments(inputs: AttentionInputs, backend: str) -> tuple[Any, ...]:
    """The operator's arguments."""
    tensors = [getattr(inputs, name) for name in _TENSORS]
    grids = inputs.query_grid.pack(), inputs.key_grid.pack()
    return *tensors, *grids, inputs.scale, inputs.dropout_p, inputs.is_dense, inputs.density, backend


# Checking the numbers of a grid at every call would take longer than a launch.
@lru_cache(maxsize=256)
def _unpacked(*numbers: int) -> TokenGrid:
    return TokenGrid.unpack(list(numbers))


def _inputs(arguments: tuple[Any, ...]) -> tuple[AttentionInputs, str]:
    """The backend's view of the operator's arguments, and the backend's name."""
    *tensors, query_grid, key_grid, scale, dropout_p, is_dense, density, backend = arguments
    grids = _unpacked(*query_grid), _unpacked(*key_grid)
    inputs = AttentionInputs(*tensors, *grids, scale, dropout_p, is_dense, density)  # type: ignore[call-arg]
    return inputs, backend


@torch.library.impl(_library, "attention_forward", "CompositeExplicitAutograd")
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *operands, with_lse = arguments
    inputs, backend = _inputs(tuple(operands))
    out, lse = _run_forward(inputs, backend, with_lse)
    return out, inputs.query.new_empty(0, dtype=inputs.statistics_dtype) if lse is None else lse


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *operands, grad_out, grad_lse, out, lse = arguments
    inputs, backend = _inputs(tuple(operands))
    grads = _run_backward(inputs, backend, grad_out, grad_lse, out, lse)
    relative = (grads.rel_h, grads.rel_w)
    return (
        *(tokens_before_heads(grad) for grad in (grads.query, grads.key, grads.value)),
        *(inputs.query.new_empty(0) if grad is None else grad.contiguous() for grad in relative),
    )


@torch.library.register_fake("sparse_attn_modules::attention_forward", lib=_library)
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, with_lse = arguments[0], arguments[-1]
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse_shape = query.shape[:-1] if with_lse else (0,)
    return empty_tokens_before_heads(query), query.new_empty(lse_shape, dtype=lse_dtype)


@torch.library.register_fake("sparse_attn_modules::attention_backward", lib=_library)
def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    query, key, value = arguments[:3]
    rel_h, rel_w = arguments[9:11]
    relative = (query.new_empty(0) if rel is None else rel.new_empty(rel.shape) for rel in (rel_h, rel_w))
    return (*(empty_tokens_before_heads(tensor) for tensor in (query, key, value)), *relative)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, _ = inputs
    ctx.save_for_backward(*operands[: len(_TENSORS)], *output)
    ctx.constants = operands[len(_TENSORS) :]
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
