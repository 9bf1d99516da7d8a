"""The compiled CUDA kernels: block-sparse attention on Hopper GPUs.

The library is compiled on first use if need be; see :mod:`sparse_attn_modules.build`. The backward pass recomputes the
weights from the log-sum-exp; nothing of size N² exists.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..notices import log_once
from ..token_grid import TokenGrid
from . import gathered
from .interface import AttentionGradients, AttentionInputs, Request, empty_tokens_before_heads

name = "cuda"

_BLOCK_TOKENS = 128
_MAX_HEAD_DIM = 128
_RELATIVE_POSITION_TILE = (8, 16)
_MAX_TILES = (8192, 65536)  # rows and columns that a block's packed coordinates hold
_ALIGNMENT = 8  # elements of 2 bytes: the tensor copy engine addresses multiples of 16 bytes

_library = torch.library.Library("sparse_attn_modules", "FRAGMENT")
_library.define(
    "forward_sm90(Tensor query, Tensor key, Tensor value, Tensor(a!) out, Tensor(b!)? lse, Tensor? key_counts, "
    "Tensor? key_indices, Tensor? row_order, Tensor? rel_h, Tensor? rel_w, Tensor? key_padding_mask, "
    "Tensor? dropout_seed, int[] query_grid, int[] key_grid, float scale, float dropout_p) -> ()"
)
_library.define(
    "backward_sm90(Tensor query, Tensor key, Tensor value, Tensor grad_out, Tensor out, Tensor lse, Tensor? grad_lse, "
    "Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor(d!) statistics, "
    "Tensor(e!)? grad_rel_h, Tensor(f!)? grad_rel_w, Tensor(g!)? rel_w_sums, Tensor? key_counts, Tensor? key_indices, "
    "Tensor? row_order, Tensor? query_counts, Tensor? query_indices, Tensor? rel_h, Tensor? rel_w, "
    "Tensor? key_padding_mask, Tensor? dropout_seed, int[] query_grid, int[] key_grid, float scale, "
    "float dropout_p) -> ()"
)


def why_not(request: Request) -> str | None:
    if request.device.type != "cuda":
        return f"it needs CUDA tensors, got {request.device.type}"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, got {request.dtype}"
    if request.head_dim % 8 or request.head_dim > _MAX_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {_MAX_HEAD_DIM}, got {request.head_dim}"
    for grid in (request.query_grid, request.key_grid):
        if (reason := _why_not_grid(grid)) is not None:
            return reason
    if request.relative_position and request.key_grid.tile != _RELATIVE_POSITION_TILE:
        return (
            f"a relative position needs key tiles of {_RELATIVE_POSITION_TILE[0]}×{_RELATIVE_POSITION_TILE[1]}, "
            f"got {request.key_grid.tile[0]}×{request.key_grid.tile[1]}"
        )
    index = request.device.index
    return _why_not_device(torch.cuda.current_device() if index is None else index)


def why_slower(request: Request) -> str | None:
    return None


def why_not_here() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return _why_not_device(torch.cuda.current_device())


def forward(inputs: AttentionInputs, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    out = inputs.new_output()
    lse = inputs.query.new_empty(inputs.query.shape[:3], dtype=torch.float32) if with_lse else None
    if inputs.scale <= 0:
        return _with_positive_scale(inputs, out, lse)
    _launch(inputs, inputs.query, inputs.scale, out, lse)
    return out, lse


def backward(
    inputs: AttentionInputs, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> AttentionGradients:
    if not inputs.is_dense and inputs.query_counts is None:
        log_once("the cuda backend's gradients are computed by 'gathered': the mask's query lists were not given")
        return gathered.backward(inputs, grad_out, grad_lse, out, lse)
    query, scale = inputs.query, inputs.scale
    if scale <= 0:
        # As in the forward pass; what this makes of the gradient of the queries is undone below.
        query, scale = (-query, -scale) if scale < 0 else (torch.zeros_like(query), 1.0)
    grads = _launch_backward(inputs, query, scale, grad_out, grad_lse, out, lse)
    if inputs.scale < 0:
        grads.query.neg_()
    elif inputs.scale == 0:
        grads.query.zero_()
    return grads


def _launch_backward(
    inputs: AttentionInputs,
    query: Tensor,
    scale: float,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> AttentionGradients:
    grads = [empty_tokens_before_heads(tensor) for tensor in (inputs.query, inputs.key, inputs.value)]
    if 0 in inputs.query.shape[:3] or inputs.key.shape[2] == 0:
        for grad in grads:
            grad.zero_()
    places = (*query.shape[:2], inputs.query_grid.num_blocks)
    statistics = query.new_empty(*places, _BLOCK_TOKENS // 2, 4, dtype=torch.float32)
    rel_h, rel_w = inputs.rel_h, inputs.rel_w
    grad_rel_h = grad_rel_w = rel_w_sums = None
    if rel_h is not None and rel_w is not None:
        grad_rel_h, grad_rel_w = (rel.new_empty(rel.shape) for rel in (rel_h, rel_w))
        sums = (inputs.key_grid.tile_columns, _BLOCK_TOKENS * _RELATIVE_POSITION_TILE[1])
        rel_w_sums = query.new_empty(*places, *sums, dtype=torch.float32)
        rel_h, rel_w = _aligned(rel_h), _aligned(rel_w)
    lists: tuple[Tensor | None, ...] = (None,) * 5
    if not inputs.is_dense:
        lists = (inputs.key_counts, inputs.key_indices, inputs.row_order, inputs.query_counts, inputs.query_indices)
    padding = inputs.key_padding_mask
    torch.ops.sparse_attn_modules.backward_sm90.default(
        _aligned(query),
        _aligned(inputs.key),
        _aligned(inputs.value),
        _aligned(grad_out),
        _aligned(out),
        lse.contiguous(),
        None if grad_lse is None else grad_lse.contiguous(),
        *grads,
        statistics,
        grad_rel_h,
        grad_rel_w,
        rel_w_sums,
        *lists,
        rel_h,
        rel_w,
        None if padding is None else padding.contiguous(),
        inputs.dropout_seed,
        _geometry(inputs.query_grid),
        _geometry(inputs.key_grid),
        scale,
        inputs.dropout_p,
    )
    return AttentionGradients(*grads, grad_rel_h, grad_rel_w)


def _with_positive_scale(inputs: AttentionInputs, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The kernel takes maxima of unscaled logits, so a factor that is not positive goes into the queries."""
    negative = inputs.scale < 0
    query = -inputs.query if negative else torch.zeros_like(inputs.query)
    _launch(inputs, query, -inputs.scale if negative else 1.0, out, lse)
    return out, lse


def _launch(inputs: AttentionInputs, query: Tensor, scale: float, out: Tensor, lse: Tensor | None) -> None:
    lists: tuple[Tensor | None, ...] = (None, None, None)
    if not inputs.is_dense:
        lists = (inputs.key_counts, inputs.key_indices, inputs.row_order)
    rel_h, rel_w = inputs.rel_h, inputs.rel_w
    if rel_h is not None and rel_w is not None:
        rel_h, rel_w = _aligned(rel_h), _aligned(rel_w)
    padding = inputs.key_padding_mask
    torch.ops.sparse_attn_modules.forward_sm90.default(
        _aligned(query),
        _aligned(inputs.key),
        _aligned(inputs.value),
        out,
        lse,
        *lists,
        rel_h,
        rel_w,
        None if padding is None else padding.contiguous(),
        inputs.dropout_seed,
        _geometry(inputs.query_grid),
        _geometry(inputs.key_grid),
        scale,
        inputs.dropout_p,
    )


def _aligned(tensor: Tensor) -> Tensor:
    """``tensor`` if the copy engine can read it in place, else a copy whose rows start at multiples of 16 bytes."""
    strides = tensor.stride()
    in_place = strides[3] == 1 and tensor.data_ptr() % (2 * _ALIGNMENT) == 0
    for size, stride in zip(tensor.shape[:3], strides[:3]):
        in_place = in_place and (size == 1 or (stride > 0 and stride % _ALIGNMENT == 0))
    if in_place:
        return tensor
    width = tensor.shape[3]
    padded = tensor.new_empty(*tensor.shape[:3], -(-width // _ALIGNMENT) * _ALIGNMENT)[..., :width]
    return padded.copy_(tensor)


@lru_cache(maxsize=1024)
def _geometry(grid: TokenGrid) -> list[int]:
    return [grid.prefix, grid.height, grid.width, grid.suffix, *grid.tile]


def _why_not_grid(grid: TokenGrid) -> str | None:
    height, width = grid.tile
    if height * width != _BLOCK_TOKENS or width & (width - 1):
        return (
            f"blocks must be tiles of {_BLOCK_TOKENS} patches with sides that are powers of two, got {height}×{width}"
        )
    columns = max(grid.tile_columns, grid.num_prefix_blocks, grid.num_suffix_blocks)
    if grid.tile_rows > _MAX_TILES[0] or columns > _MAX_TILES[1]:
        return f"a grid may have up to {_MAX_TILES[0]} × {_MAX_TILES[1]} blocks, got {grid.tile_rows} × {columns}"
    if grid.num_tiles * grid.tile_columns >= 2**32:
        return f"a grid may have up to 2³² blocks times columns of blocks, got {grid.num_tiles} × {grid.tile_columns}"
    return None


def _why_not_device(index: int) -> str | None:
    """Whether the machine can run the kernels: never traced, since it may compile them."""
    return _examine_device(index)


# What torch.compiler.assume_constant_result does, which would import the compiler, for a second, with this package.
setattr(_why_not_device, "_dynamo_marked_constant", True)  # noqa: B010


@lru_cache(maxsize=64)
def _examine_device(index: int) -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    capability = torch.cuda.get_device_capability(index)
    if capability != (9, 0):
        return f"the kernels are for compute capability 9.0 (H100, H200), got {capability[0]}.{capability[1]}"
    return _load()


@lru_cache(maxsize=1)
def _load() -> str | None:
    """Loads the library, compiling it first if there is none. The reason if that fails."""
    from .. import build

    try:
        path = build.library_path() or build.build_library()
    except build.BuildError as error:
        return str(error)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} cannot be loaded: {error}"
    return None
