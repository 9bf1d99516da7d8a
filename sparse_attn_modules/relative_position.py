"""The factors of a decomposed relative position, made from queries and tables in one pass over the queries each.

``rel_h[q, k] = q · table_h[y − k + S − 1]`` for a query in row ``y``, and likewise for columns: a product with rows of
the table that begin elsewhere for each row of the image. Both are batched matrix products that read ``[B, N, H, D]``
and write ``[B, N, H, keys]`` as they lie in memory: rows of the image are matrices one after another, and its columns
are matrices whose lines lie a row of the image apart. Nothing is permuted or copied, where an einsum does so with the
queries and with the products, for each axis.

The tables are gathered for the positions of an axis at each call. Nothing that is cheap to look at tells that a
parameter has changed since: fused optimizers and writes through ``.data`` leave its version and its address alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import without_autocast
from .shared_tensors import building_shared_tensors, outside_graphs
from .tracing import is_watched

_ALIGNMENT = 8  # elements of 2 bytes: rows that begin at multiples of 16 bytes are read in place by the CUDA kernels

_ARGUMENTS = "Tensor query, Tensor table_h, Tensor table_w, int[] grid, int[] window"
_library = torch.library.Library("sparse_attn_modules", "FRAGMENT")
_library.define(f"relative_position({_ARGUMENTS}) -> (Tensor rel_h, Tensor rel_w)")
_library.define(
    f"relative_position_backward({_ARGUMENTS}, Tensor? grad_h, Tensor? grad_w) -> "
    "(Tensor grad_query, Tensor grad_table_h, Tensor grad_table_w)"
)


def relative_position(
    query: Tensor,
    table_h: Tensor,
    table_w: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The bias of each query per key row and per key column, as :func:`block_sparse_attention` takes it.

    Args:
        query: ``[B, H, N, D]``, unscaled, of N = height × width patches in raster order; read in place if it is a
            transposed view of contiguous ``[B, N, H, D]``, else copied once.
        table_h, table_w: ``[L, D]``: embedding of each distance along an axis, from −(S − 1) to S − 1 for S positions.
            A table with another number of rows than the axis asks for is interpolated.
        grid: (height, width) of the image in patches.
        window: (height, width) of the windows that the image is cut into, from its first patch on, if keys are those
            of a query's window alone; positions then count within the window.

    Returns:
        ``rel_h [B, H, N, key rows]`` and ``rel_w [B, H, N, key columns]``, transposed views with rows that begin at
        multiples of 16 bytes. Differentiable with respect to the query and both tables.
    """
    window = grid if window is None else window
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, table_h, table_w))
    if needs_grad or type(query) is not Tensor or is_watched():
        products = torch.ops.sparse_attn_modules.relative_position.default(query, table_h, table_w, grid, window)
    else:
        products = _products(query, table_h, table_w, grid, window)
    rel_h, rel_w = (rel[..., :size].transpose(1, 2) for rel, size in zip(products, window))
    return rel_h, rel_w


def _products(
    query: Tensor, table_h: Tensor, table_w: Tensor, grid: tuple[int, int], window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """``[B, N, H, keys]`` for both axes, keys padded with zeros to a multiple of eight."""
    height, width = grid
    batch, heads = query.shape[:2]
    with without_autocast(query.device.type):
        by_row = _by_row(query, height)
        rows = _gather(table_h, _Axis(height, window[0], images=batch), query.dtype)
        columns = _gather(table_w, _Axis(width, window[1], heads=heads), query.dtype)
        rel_h = torch.bmm(by_row, rows.mT)
        rel_w = query.new_empty(batch * height, width * heads, columns.shape[1])
        torch.bmm(by_row.transpose(0, 1), columns.mT, out=rel_w.transpose(0, 1))
    rel_h, rel_w = (rel.view(batch, height * width, heads, rel.shape[2]) for rel in (rel_h, rel_w))
    return rel_h, rel_w


def _gradients(
    query: Tensor,
    table_h: Tensor,
    table_w: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    grad_h: Tensor | None,
    grad_w: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    height, width = grid
    batch, heads = query.shape[:2]
    with without_autocast(query.device.type):
        by_row = _by_row(query, height)
        grad_query = torch.zeros_like(by_row) if grad_h is None else torch.empty_like(by_row)
        grad_table_h, grad_table_w = torch.zeros_like(table_h), torch.zeros_like(table_w)
        if grad_h is not None:
            axis = _Axis(height, window[0], images=batch)
            grad = grad_h.reshape(batch * height, width * heads, grad_h.shape[3])
            torch.bmm(grad, _gather(table_h, axis, query.dtype), out=grad_query)
            grad_table_h = _scattered(torch.bmm(grad.mT, by_row), axis, table_h)
        if grad_w is not None:
            axis = _Axis(width, window[1], heads=heads)
            grad = grad_w.reshape(batch * height, width * heads, grad_w.shape[3]).transpose(0, 1)
            grad_query.transpose(0, 1).baddbmm_(grad, _gather(table_w, axis, query.dtype))
            grad_table_w = _scattered(torch.bmm(grad.mT, by_row.transpose(0, 1)), axis, table_w)
    return grad_query.view(batch, height * width, heads, query.shape[3]), grad_table_h, grad_table_w


def _by_row(query: Tensor, height: int) -> Tensor:
    """``[B, H, N, D]`` as a matrix for each row of patches: ``[B · height, width · H, D]``, a view where possible."""
    tokens_first = query.transpose(1, 2).contiguous()  # [B, N, H, D]
    batch, heads, tokens, head_dim = query.shape
    return tokens_first.view(batch * height, tokens // height * heads, head_dim)


class _Axis(NamedTuple):
    """An axis of the image, as a batch of matrices: its positions for each image, each of them for each head."""

    size: int  # positions
    period: int  # positions of a window
    images: int = 1
    heads: int = 1

    @property
    def keys(self) -> int:
        """Positions of a window, and padding whose products nobody reads."""
        return -(-self.period // _ALIGNMENT) * _ALIGNMENT


def _gather(table: Tensor, axis: _Axis, dtype: torch.dtype) -> Tensor:
    """Embedding between a position and each key of its window: ``[L, D]`` -> ``[images · size · heads, keys, D]``."""
    distances = 2 * axis.period - 1
    if table.shape[0] != distances:
        table = F.interpolate(table.T[None], size=distances, mode="linear")[0].T
    return (
        table.to(dtype)
        .index_select(0, _distances(axis, table.device))
        .unflatten(0, (axis.images * axis.size * axis.heads, axis.keys))
    )


@lru_cache(maxsize=64)
def _distances(axis: _Axis, device: torch.device) -> Tensor:
    """Row of the table for each matrix and key: ``[images · size · heads · keys]``."""
    with building_shared_tensors():
        position = torch.arange(axis.size) % axis.period
        distance = (position[:, None] - torch.arange(axis.keys)).clamp(min=1 - axis.period) + axis.period - 1
        of_heads = distance.repeat_interleave(axis.heads, 0).repeat(axis.images, 1)
        distances = of_heads.flatten().int()
        return outside_graphs(lambda: distances.to(device), device)


def _scattered(grad: Tensor, axis: _Axis, table: Tensor) -> Tensor:
    """The transpose of :func:`_gather`: ``[images · size · heads, keys, D]`` -> ``[L, D]``.

    A product with zeros and ones (and the weights of the interpolation) adds up in a fixed order, and in full
    precision.
    """
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    of_positions = grad.unflatten(0, (axis.images, axis.size, axis.heads)).sum((0, 2), dtype=dtype)  # [size, keys, D]
    to_table = _transpose(axis.size, axis.period, table.shape[0], dtype, table.device)
    return (to_table @ of_positions.flatten(0, 1)).to(table.dtype)


@lru_cache(maxsize=64)
def _transpose(size: int, period: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[L, size · keys]``"""
    with building_shared_tensors():
        transpose = _gather(torch.eye(length, dtype=dtype), _Axis(size, period), dtype).flatten(0, 1).T.contiguous()
        return outside_graphs(lambda: transpose.to(device), device)


@torch.library.impl(_library, "relative_position", "CompositeExplicitAutograd")
def _forward(
    query: Tensor, table_h: Tensor, table_w: Tensor, grid: list[int], window: list[int]
) -> tuple[Tensor, Tensor]:
    return _products(query, table_h, table_w, (grid[0], grid[1]), (window[0], window[1]))


@torch.library.impl(_library, "relative_position_backward", "CompositeExplicitAutograd")
def _backward(
    query: Tensor,
    table_h: Tensor,
    table_w: Tensor,
    grid: list[int],
    window: list[int],
    grad_h: Tensor | None,
    grad_w: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(query, table_h, table_w, (grid[0], grid[1]), (window[0], window[1]), grad_h, grad_w)


@torch.library.register_fake("sparse_attn_modules::relative_position", lib=_library)
def _forward_fake(query: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    window = arguments[3]
    batch, heads, tokens, _ = query.shape
    widths = (-(-size // _ALIGNMENT) * _ALIGNMENT for size in window)
    return tuple(query.new_empty(batch, tokens, heads, width) for width in widths)


@torch.library.register_fake("sparse_attn_modules::relative_position_backward", lib=_library)
def _backward_fake(query: Tensor, table_h: Tensor, table_w: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    batch, heads, tokens, head_dim = query.shape
    return query.new_empty(batch, tokens, heads, head_dim), *(
        table.new_empty(table.shape) for table in (table_h, table_w)
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.grid, ctx.window = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad_h: Tensor | None, grad_w: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_h is None and grad_w is None:
        return (None,) * 5
    grad_query, grad_table_h, grad_table_w = torch.ops.sparse_attn_modules.relative_position_backward.default(
        *ctx.saved_tensors, ctx.grid, ctx.window, grad_h, grad_w
    )
    return grad_query.transpose(1, 2), grad_table_h, grad_table_w, None, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "relative_position: gradients must be of first order, got a backward pass through a backward pass"
    )


torch.library.register_autograd(
    "sparse_attn_modules::relative_position", _autograd_backward, setup_context=_save_for_backward, lib=_library
)
torch.library.register_autograd(
    "sparse_attn_modules::relative_position_backward",
    _no_double_backward,
    setup_context=lambda ctx, inputs, output: None,
    lib=_library,
)
