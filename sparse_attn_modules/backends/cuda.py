"""The compiled CUDA kernels: block-sparse attention on Hopper GPUs.

The library is compiled on first use if need be; see :mod:`sparse_attn_modules.build`. The backward pass recomputes the
weights from the log-sum-exp; nothing of size N² exists.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..notices import log_once
from ..token_grid import TokenGrid
from . import gathered
from .interface import AttentionGradients, AttentionInputs, Request, empty_tokens_before_heads

name = "cuda"

_BLOCK_TOKENS = 128
_MAX_HEAD_DIM = 128
MAX_BATCH = 65535  # what a launch's second and third dimension hold
# Tiles of a block, the preferred first: the kernels read relative positions of 8×16 keys only.
TILES = ((8, 16), (16, 8), (4, 32), (32, 4), (2, 64), (64, 2), (1, 128), (128, 1))
_RELATIVE_POSITION_TILE = TILES[0]
_NATIVE_HEAD_DIMS = (32, 64, 80, 96, 128)
_FUSED_RELATIVE_POSITION_HEAD_DIMS = (64, 80)  # as in kernels/sm90/launch.h
# The kernel takes 1 / scale apart into two numbers of the inputs' precision, which in float16 must be in its range.
_FUSED_RELATIVE_POSITION_SCALES = (2.0**-10, 2.0**4)
# Key blocks per query block, on average, from which on the fused backward kernel is faster than the pair: what it does
# once for a block of queries is then worth it. Measured on an H200; the number of tokens hardly matters.
_FUSED_KEY_BLOCKS = {32: 16.0, 64: 8.0, 80: 6.0, 96: 8.0, 128: 14.0}  # by native head_dim
_FUSED_KEY_BLOCKS_RELATIVE_POSITION = 5.0
_MAX_KNOWN_DENSITIES = 256
_MAX_TILES = (8192, 65536)  # rows and columns that a block's packed coordinates hold
_LEAST_SCALE = 2.0**-110  # its inverse and its logarithm must be floats; smaller ones make all weights equal anyway
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
    "Tensor(e!)? grad_rel_h, Tensor(f!)? grad_rel_w, Tensor(g!)? rel_w_sums, Tensor(h!)? grad_query_sums, "
    "Tensor(i!) progress, Tensor(j!)? rel_offsets, Tensor(k!)? rel_sums, Tensor? key_counts, Tensor? key_indices, "
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
    if request.batch > MAX_BATCH or request.heads > MAX_BATCH:
        return f"a batch may have up to {MAX_BATCH} entries and as many heads, got {request.batch} × {request.heads}"
    for grid in (request.query_grid, request.key_grid):
        if (reason := _why_not_grid(grid)) is not None:
            return reason
    if request.relative_position and _tile_within(request.key_grid) != _RELATIVE_POSITION_TILE:
        needed, got = (f"{height}×{width}" for height, width in (_RELATIVE_POSITION_TILE, request.key_grid.tile))
        return f"a relative position needs key tiles that consist of tiles of {needed}, got {got}"
    index = request.device.index
    return _why_not_device(torch.cuda.current_device() if index is None else index)


def why_slower(request: Request) -> str | None:
    return None


def runs_on(device: torch.device) -> bool:
    """Whether the library runs on a device, whatever the call."""
    if device.type != "cuda":
        return False
    return _why_not_device(torch.cuda.current_device() if device.index is None else device.index) is None


def why_not_here() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return _why_not_device(torch.cuda.current_device())


def fit_mask(mask: BlockMask) -> BlockMask:
    query_tile, key_tile = _tile_within(mask.query_grid), _tile_within(mask.key_grid)
    if query_tile is None or key_tile is None:
        raise AssertionError("a mask of tiles that why_not refuses")
    return mask.split(query_tile, key_tile)


def forward(inputs: AttentionInputs, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    out = inputs.new_output()
    lse = inputs.query.new_empty(inputs.query.shape[:3], dtype=torch.float32) if with_lse else None
    query, scale = _positive_scale(inputs)
    _launch(inputs, query, scale, out, lse)
    return out, lse


def backward(
    inputs: AttentionInputs, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> AttentionGradients:
    if not inputs.is_dense and inputs.query_counts is None:
        log_once("the cuda backend's gradients are computed by 'gathered': the mask's query lists were not given")
        return gathered.backward(inputs, grad_out, grad_lse, out, lse)
    query, scale = _positive_scale(inputs)
    grads = _launch_backward(inputs, query, scale, grad_out, grad_lse, out, lse)
    if inputs.scale <= -_LEAST_SCALE:
        grads.query.neg_()
    elif inputs.scale < _LEAST_SCALE:
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
    query_grid, key_grid = _grids(inputs)
    grads = [empty_tokens_before_heads(tensor) for tensor in (inputs.query, inputs.key, inputs.value)]
    if 0 in inputs.query.shape[:3] or inputs.key.shape[2] == 0:
        for grad in grads:
            grad.zero_()
    places = (*query.shape[:2], query_grid.num_blocks)
    statistics = query.new_empty(*places, _BLOCK_TOKENS // 2, 4, dtype=torch.float32)
    rel_h, rel_w = inputs.rel_h, inputs.rel_w
    fuses = _fuses(inputs)

    def workspace(*shape: int) -> Tensor:
        return query.new_empty(*places, *shape, dtype=torch.float32)

    grad_rel_h = grad_rel_w = rel_w_sums = rel_offsets = rel_sums = None
    if rel_h is not None and rel_w is not None:
        grad_rel_h, grad_rel_w = (rel.new_empty(rel.shape) for rel in (rel_h, rel_w))
        height, width = _RELATIVE_POSITION_TILE
        rows, columns = -(-key_grid.height // height), key_grid.tile_columns
        if fuses:
            extra = 1 if key_grid.prefix or key_grid.suffix else 0
            rel_offsets = workspace(rows + extra, _BLOCK_TOKENS * height)
            rel_sums = workspace(rows + columns * (width // 8), _BLOCK_TOKENS * 8)
        else:
            rel_w_sums = workspace(columns, _BLOCK_TOKENS * width)
        rel_h, rel_w = _aligned(rel_h), _aligned(rel_w)
    # Blocks of keys taken; fused: [B, Hk] of them added, [B, Hq, Q, 2] half blocks of queries done: kernels/params.h
    grad_query_sums, progress_size = None, 1
    if fuses:
        grad_query_sums = workspace(_BLOCK_TOKENS, _native_head_dim(query.shape[3]))
        batch, heads, blocks = places
        progress_size += batch * (inputs.key.shape[1] + heads * blocks * 2)
    progress = query.new_empty(progress_size, dtype=torch.int32)
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
        grad_query_sums,
        progress,
        rel_offsets,
        rel_sums,
        *lists,
        rel_h,
        rel_w,
        None if padding is None else padding.contiguous(),
        inputs.dropout_seed,
        query_grid.pack(),
        key_grid.pack(),
        scale,
        inputs.dropout_p,
    )
    grad_query, grad_key, grad_value = grads
    return AttentionGradients(grad_query, grad_key, grad_value, grad_rel_h, grad_rel_w)


def _fuses(inputs: AttentionInputs) -> bool:
    """Whether one fused kernel computes all gradients, in an order of additions that differs from run to run.

    The deterministic pair of kernels has less to do per block of queries, and is faster where those see few keys.
    """
    if not _can_fuse(inputs) or torch.are_deterministic_algorithms_enabled():
        return False
    if 0 in inputs.query.shape[:3] or inputs.key.shape[2] == 0:
        return False
    least = _FUSED_KEY_BLOCKS_RELATIVE_POSITION
    if inputs.rel_h is None:
        least = _FUSED_KEY_BLOCKS[_native_head_dim(inputs.query.shape[3])]
    if inputs.is_dense:
        return _grids(inputs)[1].num_blocks >= least
    density, num_key_blocks = inputs.density, inputs.key_grid.num_blocks
    if density is None:
        density = _known_density(inputs.key_counts, num_key_blocks)
    return density is not None and density * num_key_blocks >= least


def _can_fuse(inputs: AttentionInputs) -> bool:
    """Whether there is a fused kernel for it."""
    if inputs.dropout_p > 0:
        return False
    if inputs.rel_h is None:
        return True
    least, most = _FUSED_RELATIVE_POSITION_SCALES
    has_head_dim = _native_head_dim(inputs.query.shape[3]) in _FUSED_RELATIVE_POSITION_HEAD_DIMS
    return has_head_dim and (least <= abs(inputs.scale) <= most or abs(inputs.scale) < _LEAST_SCALE)


def _native_head_dim(head_dim: int) -> int:
    """The one that the kernels run it as."""
    return next(native for native in _NATIVE_HEAD_DIMS if head_dim <= native)


class _Density:
    """Fraction of active block pairs, on its way from the device."""

    def __init__(self, key_counts: Tensor, num_key_blocks: int) -> None:
        self._value: float | None = None
        self._arriving = torch.empty(1, dtype=torch.float32, pin_memory=True)
        self._arriving.copy_(key_counts.mean(dtype=torch.float32).reshape(1) / num_key_blocks, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def value(self) -> float | None:
        if self._value is None and self._arrived.query():
            self._value = self._arriving.item()
        return self._value


_densities: dict[tuple[int, ...], _Density] = {}


def _known_density(key_counts: Tensor, num_key_blocks: int) -> float | None:
    """A mask's density, without waiting for it: None at its first backward pass. Of two masks that follow each other in
    one place in memory it may be the other's, which costs speed alone."""
    if torch.cuda.is_current_stream_capturing():
        known = _densities.get(_place_of(key_counts))
        return None if known is None else known._value
    with torch.cuda.device(key_counts.device):
        known = _densities.get(_place_of(key_counts))
        if known is None:
            if len(_densities) >= _MAX_KNOWN_DENSITIES:
                _densities.clear()
            known = _densities[_place_of(key_counts)] = _Density(key_counts, num_key_blocks)
        return known.value()


def _place_of(key_counts: Tensor) -> tuple[int, ...]:
    return (key_counts.get_device(), key_counts.data_ptr(), key_counts._version, *key_counts.shape)


def _positive_scale(inputs: AttentionInputs) -> tuple[Tensor, float]:
    """The kernels take maxima of unscaled logits, so a factor that is not positive goes into the queries."""
    if inputs.scale >= _LEAST_SCALE:
        return inputs.query, inputs.scale
    if inputs.scale <= -_LEAST_SCALE:
        return -inputs.query, -inputs.scale
    return torch.zeros_like(inputs.query), 1.0


def _launch(inputs: AttentionInputs, query: Tensor, scale: float, out: Tensor, lse: Tensor | None) -> None:
    query_grid, key_grid = _grids(inputs)
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
        query_grid.pack(),
        key_grid.pack(),
        scale,
        inputs.dropout_p,
    )


def _grids(inputs: AttentionInputs) -> tuple[TokenGrid, TokenGrid]:
    """The grids of the queries and the keys that the kernels go by."""
    if inputs.is_dense and inputs.rel_h is None:
        return _in_fewest_blocks(inputs.query_grid), _in_fewest_blocks(inputs.key_grid)
    return inputs.query_grid, inputs.key_grid


@lru_cache(maxsize=256)
def _in_fewest_blocks(grid: TokenGrid) -> TokenGrid:
    """Where nothing is skipped the order of tokens is all the same, and a sequence has no tiles that hang over an edge:
    37 × 37 patches and 5 extra tokens are 11 blocks instead of 16."""
    sequence = TokenGrid(1, grid.num_tokens, tile=(1, _BLOCK_TOKENS))
    return sequence if sequence.num_blocks < grid.num_blocks and _why_not_grid(sequence) is None else grid


def _aligned(tensor: Tensor) -> Tensor:
    """``tensor`` if the copy engine can read it in place, else a copy whose rows start at multiples of 16 bytes."""
    batch, head, token, element = tensor.stride()
    if (
        element == 1
        and batch > 0
        and head > 0
        and token > 0
        and not (tensor.data_ptr() // 2 | batch | head | token) % _ALIGNMENT
    ):
        return tensor
    in_place = element == 1 and tensor.data_ptr() % (2 * _ALIGNMENT) == 0
    for size, stride in zip(tensor.shape, (batch, head, token)):
        in_place = in_place and (size == 1 or (stride > 0 and stride % _ALIGNMENT == 0))
    if in_place:
        return tensor
    width = tensor.shape[3]
    padded = tensor.new_empty(*tensor.shape[:3], -(-width // _ALIGNMENT) * _ALIGNMENT)[..., :width]
    return padded.copy_(tensor)


def _tile_within(grid: TokenGrid) -> tuple[int, int] | None:
    """The kernel's tile that the grid's tiles consist of."""
    height, width = grid.tile
    return next((tile for tile in TILES if height % tile[0] == 0 and width % tile[1] == 0), None)


def _why_not_grid(grid: TokenGrid) -> str | None:
    tile = _tile_within(grid)
    if tile is None:
        return (
            f"blocks must consist of tiles of {_BLOCK_TOKENS} patches with sides that are powers of two, "
            f"got {grid.tile[0]}×{grid.tile[1]}"
        )
    rows, columns = -(-grid.height // tile[0]), -(-grid.width // tile[1])
    widest = max(columns, -(-grid.prefix // _BLOCK_TOKENS), -(-grid.suffix // _BLOCK_TOKENS))
    if rows > _MAX_TILES[0] or widest > _MAX_TILES[1]:
        return f"a grid may have up to {_MAX_TILES[0]} × {_MAX_TILES[1]} blocks, got {rows} × {widest}"
    if rows * columns * columns >= 2**32:
        return f"a grid may have up to 2³² blocks times columns of blocks, got {rows * columns} × {columns}"
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
