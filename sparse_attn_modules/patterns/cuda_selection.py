"""Selection on Hopper GPUs: one kernel pools queries and keys, one scores blocks, keeps the best and writes the lists.

The cost is reading queries and keys once. The kernels agree with ``block_features`` and ``choosing`` up to ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import cuda
from ..token_grid import TokenGrid
from .block_features import cut_of
from .choosing import Rule

EXTRA_FEATURES = 8  # columns behind the head_dim: two, and zeros that fill up the step of a matrix product
_MAX_HEAD_DIM = 128
_MAX_FEATURES = 256
_MAX_BLOCKS = 1024  # of keys: their scores lie in shared memory

_library = torch.library.Library("sparse_attn_modules", "FRAGMENT")
_library.define(
    "pool_blocks_sm90(Tensor query, Tensor key, Tensor(a!) queries, Tensor(b!) keys, int[] query_grid, int[] key_grid, "
    "int[] query_cut, int[] key_cut, float scale) -> ()"
)
_library.define(
    "choose_blocks_sm90(Tensor queries, Tensor keys, Tensor(a!) blocks, Tensor(b!) key_counts, Tensor(c!) key_indices, "
    "Tensor(d!) row_order, Tensor(e!)? query_counts, Tensor(f!)? query_indices, int[] query_grid, int[] key_grid, "
    "int[] query_cut, int count, float mass) -> ()"
)


def can_pool(query: Tensor, key: Tensor, query_grid: TokenGrid, key_grid: TokenGrid) -> bool:
    """Whether the kernels can read these queries and keys."""
    if query.dtype not in (torch.float16, torch.bfloat16) or key.dtype != query.dtype:
        return False
    if query.shape[-1] % 8 or query.shape[-1] > _MAX_HEAD_DIM or not can_choose(query, query_grid, key_grid):
        return False
    for tensor in (query, key):
        if tensor.stride(-1) != 1 or tensor.data_ptr() % 16 or any(stride % 8 for stride in tensor.stride()[:3]):
            return False
    return True


def can_choose(queries: Tensor, query_grid: TokenGrid, key_grid: TokenGrid) -> bool:
    """Whether the kernels run on the device of these tensors and on such grids."""
    if queries.device.type != "cuda" or key_grid.num_blocks > _MAX_BLOCKS or 0 in queries.shape:
        return False
    if max(queries.shape[:2]) > cuda.MAX_BATCH:
        return False
    if queries.shape[-1] > _MAX_FEATURES or any(grid.tile not in cuda.TILES for grid in (query_grid, key_grid)):
        return False
    return cuda.runs_on(queries.device)


def features(
    query: Tensor, key: Tensor, query_grid: TokenGrid, key_grid: TokenGrid, scale: float
) -> tuple[Tensor, Tensor]:
    """As ``query_features`` and ``key_features``, with columns of zeros behind them."""
    width = query.shape[-1] + EXTRA_FEATURES
    cuts = cut_of(query_grid), cut_of(key_grid)
    queries, keys = (
        x.new_empty(*x.shape[:2], grid.num_blocks * rows * columns, width, dtype=torch.float32)
        for x, grid, (rows, columns) in zip((query, key), (query_grid, key_grid), cuts)
    )
    torch.ops.sparse_attn_modules.pool_blocks_sm90.default(
        query, key, queries, keys, query_grid.pack(), key_grid.pack(), *cuts, scale
    )
    return queries, keys


def choose(
    queries: Tensor, keys: Tensor, query_grid: TokenGrid, key_grid: TokenGrid, rule: Rule, with_query_lists: bool
) -> tuple[Tensor, ...]:
    """The blocks, and the lists in the order of ``selection``."""
    missing = -queries.shape[-1] % 8
    queries, keys = (torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous() for x in (queries, keys))
    batch, heads = queries.shape[:2]
    rows, columns = query_grid.num_blocks, key_grid.num_blocks

    def new(*shape: int) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=torch.int32, device=queries.device)

    blocks = torch.empty(batch, heads, rows, columns, dtype=torch.bool, device=queries.device)
    lists = [new(rows), new(rows, columns), new(rows)]
    query_lists: list[Tensor | None] = [new(columns), new(columns, rows)] if with_query_lists else [None, None]
    torch.ops.sparse_attn_modules.choose_blocks_sm90.default(
        queries,
        keys,
        blocks,
        *lists,
        *query_lists,
        query_grid.pack(),
        key_grid.pack(),
        cut_of(query_grid),
        rule.count,
        rule.mass,
    )
    return (blocks, *lists, *(queries.new_empty(0, dtype=torch.int32) if x is None else x for x in query_lists))
