"""Attention within windows of an image by the compiled CUDA kernels, which read and write the image in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..token_grid import TokenGrid
from ..windows import Size, count_windows
from .cuda import MAX_BATCH, _aligned
from .cuda import why_not as why_not_cuda
from .interface import Request, empty_tokens_before_heads

_library = torch.library.Library("sparse_attn_modules", "FRAGMENT")
_library.define(
    "forward_windows_sm90(Tensor query, Tensor key, Tensor value, Tensor(a!) out, Tensor? rel_h, Tensor? rel_w, "
    "int[] grid, int[] window, float scale) -> ()"
)


def why_not(query: Tensor, grid: Size, window: Size, *, relative_position: bool) -> str | None:
    """The reason why these kernels cannot read the windows in place, or None."""
    rows, columns = count_windows(grid, window)
    if query.shape[0] * rows * columns > MAX_BATCH:  # windows stand where the batch does otherwise
        return f"there may be up to {MAX_BATCH} windows, got {query.shape[0]} × {rows * columns}"
    window_grid = TokenGrid(*window)
    request = Request(
        query.device,
        query.dtype,
        query.shape[3],
        window_grid,
        window_grid,
        relative_position=relative_position,
        is_dense=True,
    )
    return why_not_cuda(request)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    grid: Size,
    window: Size,
    scale: float,
) -> Tensor:
    """``[B, H, N, D]``, a transposed view of ``[B, N, H, D]``; ``scale`` must be positive."""
    out = empty_tokens_before_heads(query)
    torch.ops.sparse_attn_modules.forward_windows_sm90.default(
        _aligned(query),
        _aligned(key),
        _aligned(value),
        out,
        None if rel_h is None else _aligned(rel_h),
        None if rel_w is None else _aligned(rel_w),
        grid,
        window,
        scale,
    )
    return out
