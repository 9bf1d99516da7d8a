"""Dense attention within the windows of an image, by kernels that read and write the image in place.

Where none can run, :mod:`sparse_attn_modules.windows` cuts windows out of the image and puts them back, at the price of
a copy of each tensor. So it is for gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_checks import check_no_tangents, check_tensors
from .backends import cuda_windows
from .backends.interface import empty_tokens_before_heads
from .tracing import is_watched
from .windows import Size

_OP = "window_attention"
_library = torch.library.Library("sparse_attn_modules", "FRAGMENT")
_library.define(
    "window_attention(Tensor query, Tensor key, Tensor value, Tensor? rel_h, Tensor? rel_w, int[] grid, int[] window, "
    "float scale) -> Tensor"
)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Size,
    window: Size,
    *,
    scale: float | None = None,
    relative_position: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Scaled dot-product attention of each patch to its window, without gradients.

    Windows are cut from the image's first patch on. Those in the last row and column may hang over it: what they hold
    there are keys and values of zeros, to which their queries attend as to any other.

    Args:
        query: ``[B, Hq, N, D]`` of N = height × width patches in raster order, float16 or bfloat16, on CUDA. Views are
            read in place, as by :func:`block_sparse_attention`.
        key, value: ``[B, Hkv, N, D]``; ``Hq`` must be a multiple of ``Hkv``. They must be finite: a window's keys may
            be read along with its neighbour's, with a weight of zero.
        grid: (height, width) of the image in patches.
        window: (height, width) of a window in patches.
        scale: factor on ``query · key``, positive; ``D ** -0.5`` if None.
        relative_position: ``(rel_h, rel_w)`` of shapes ``[B, Hq, N, window height]`` and ``[B, Hq, N, window width]``:
            ``rel_h[q, y] + rel_w[q, x]`` is added to the scaled logit of the key in row ``y`` and column ``x`` of the
            window.

    Returns:
        ``[B, Hq, N, D]``, a transposed view of contiguous ``[B, N, Hq, D]``.

    Raises:
        ValueError, TypeError: if an argument is not as described, or :func:`why_not_in_place` has a reason.
    """
    rel_h, rel_w = (None, None) if relative_position is None else relative_position
    check_tensors(query, key, value)
    _check_geometry(query, key, grid, window, rel_h, rel_w)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    reason = why_not_in_place(query, key, value, grid, window, scale=scale, relative_position=relative_position)
    if reason is not None:
        raise ValueError(f"{_OP}: arguments must be such that windows can be read in place, got ones where {reason}")
    arguments = query, key, value, rel_h, rel_w, grid, window, float(scale)
    if not is_watched() and type(query) is Tensor:
        return cuda_windows.forward(*arguments)
    out: Tensor = torch.ops.sparse_attn_modules.window_attention.default(*arguments)
    return out


def why_not_in_place(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Size,
    window: Size,
    *,
    scale: float,
    relative_position: tuple[Tensor, Tensor] | None = None,
) -> str | None:
    """The reason why :func:`window_attention` cannot compute this, or None."""
    tensors = (query, key, value, *(relative_position or ()))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "there are no gradients, which a tensor requires"
    if scale <= 0:
        return f"scale must be positive, got {scale}"
    check_no_tangents(tensors)
    return cuda_windows.why_not(query, grid, window, relative_position=relative_position is not None)


def _check_geometry(
    query: Tensor, key: Tensor, grid: Size, window: Size, rel_h: Tensor | None, rel_w: Tensor | None
) -> None:
    for name, size in (("grid", grid), ("window", window)):
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"{_OP}: {name} must be (height, width) in patches, got {size}")
    for name, tensor in (("query", query), ("key", key)):
        if tensor.shape[2] != grid[0] * grid[1]:
            raise ValueError(f"{_OP}: {name} must have {grid[0]} × {grid[1]} tokens, got {tensor.shape[2]}")
    for name, rel, keys in (("rel_h", rel_h, window[0]), ("rel_w", rel_w, window[1])):
        if rel is not None and (list(rel.shape) != [*query.shape[:3], keys] or rel.dtype != query.dtype):
            raise ValueError(
                f"{_OP}: {name} must have shape {[*query.shape[:3], keys]} and dtype {query.dtype}, "
                f"got {list(rel.shape)} and {rel.dtype}"
            )


@torch.library.impl(_library, "window_attention", "CUDA")
def _window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    grid: list[int],
    window: list[int],
    scale: float,
) -> Tensor:
    return cuda_windows.forward(query, key, value, rel_h, rel_w, (grid[0], grid[1]), (window[0], window[1]), scale)


@torch.library.register_fake("sparse_attn_modules::window_attention", lib=_library)
def _window_attention_fake(query: Tensor, *others: object) -> Tensor:
    return empty_tokens_before_heads(query)
