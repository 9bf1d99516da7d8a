"""The operators that choose blocks at run time, and which implementation they run on.

They are opaque to ``torch.compile``: everything that depends on data stays on the device, and shapes follow from the
geometry. Eager calls that nobody watches skip the dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast
from ..block_mask import BlockMask
from ..token_grid import TokenGrid
from ..tracing import is_watched
from . import cuda_selection
from .block_features import cut_of, key_features, query_features, with_relative_position
from .choosing import Rule, block_mass, choose

_LISTS = ("key_counts", "key_indices", "row_order", "query_counts", "query_indices")

_library = torch.library.Library("sparse_attn_modules", "FRAGMENT")
_library.define(
    "pool_blocks(Tensor query, Tensor key, Tensor? key_padding_mask, int[] query_grid, int[] key_grid, float scale) -> "
    "(Tensor queries, Tensor keys)"
)
_library.define(
    "choose_blocks(Tensor queries, Tensor keys, int[] query_grid, int[] key_grid, int count, float mass, "
    "bool with_query_lists) -> (Tensor blocks, Tensor key_counts, Tensor key_indices, Tensor row_order, "
    "Tensor query_counts, Tensor query_indices)"
)


def features(
    query: Tensor,
    key: Tensor,
    query_grid: TokenGrid,
    key_grid: TokenGrid,
    scale: float,
    relative_position: tuple[Tensor, Tensor] | None = None,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Features of queries and keys whose products estimate the logits, see ``block_features``; not differentiated.

    Returns:
        ``[B, Hq, query blocks · parts, F]`` and ``[B, Hkv, key blocks · parts, F]``; the first ``D + 2`` columns are
        those of ``query_features`` and ``key_features``.
    """
    query, key = query.detach(), key.detach()
    if is_watched() or type(query) is not Tensor:
        queries, keys = torch.ops.sparse_attn_modules.pool_blocks.default(
            query, key, key_padding_mask, query_grid.pack(), key_grid.pack(), float(scale)
        )
    else:
        queries, keys = _pool(query, key, key_padding_mask, query_grid, key_grid, float(scale))
    if relative_position is None:
        return queries, keys
    rel_h, rel_w = (part.detach() for part in relative_position)
    return with_relative_position(queries, keys, (rel_h, rel_w), query_grid, key_grid)


def choose_mask(
    queries: Tensor, keys: Tensor, query_grid: TokenGrid, key_grid: TokenGrid, rule: Rule, *, with_query_lists: bool
) -> BlockMask:
    """The mask of a rule for these features of queries and keys; not differentiated.

    Args:
        with_query_lists: also make the lists that a backward pass needs.
    """
    queries, keys = queries.detach(), keys.detach()
    numbers: Any = (rule.count, float(rule.mass), with_query_lists)
    if is_watched() or type(queries) is not Tensor:
        blocks, *lists = torch.ops.sparse_attn_modules.choose_blocks.default(
            queries, keys, query_grid.pack(), key_grid.pack(), *numbers
        )
    else:
        blocks, *lists = _choose(queries, keys, query_grid, key_grid, *numbers)
    known = dict(zip(_LISTS, lists if with_query_lists else lists[:3]))
    density = rule.density(query_grid, key_grid)
    return BlockMask.from_lists(blocks, known, query_grid, key_grid, is_dense=False, density=density)


def _pool(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    query_grid: TokenGrid,
    key_grid: TokenGrid,
    scale: float,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), without_autocast(query.device.type):
        if key_padding_mask is None and cuda_selection.can_pool(query, key, query_grid, key_grid):
            return cuda_selection.features(query, key, query_grid, key_grid, scale)
        found = query_features(query, query_grid, scale), key_features(key, key_grid, key_padding_mask)
        queries, keys = (F.pad(x, (0, _width(query) - x.shape[-1])) for x in found)
        return queries, keys


def _choose(
    queries: Tensor,
    keys: Tensor,
    query_grid: TokenGrid,
    key_grid: TokenGrid,
    count: int,
    mass: float,
    with_query_lists: bool,
) -> tuple[Tensor, ...]:
    # Outside inference mode, or a mask could not be saved for a backward pass.
    with torch.inference_mode(False), torch.no_grad(), without_autocast(queries.device.type):
        rule = Rule(count, mass)
        if cuda_selection.can_choose(queries, query_grid, key_grid):
            return cuda_selection.choose(queries, keys, query_grid, key_grid, rule, with_query_lists)
        blocks = choose(block_mass(queries, keys, query_grid, key_grid), query_grid, key_grid, rule)
        mask = BlockMask(blocks, query_grid, key_grid)
        lists = [getattr(mask, name) for name in _LISTS[: 5 if with_query_lists else 3]]
        return (blocks, *lists, *(blocks.new_empty(0, dtype=torch.int32) for _ in range(5 - len(lists))))


def _width(query: Tensor) -> int:
    return query.shape[-1] + cuda_selection.EXTRA_FEATURES


@torch.library.impl(_library, "pool_blocks", "CompositeExplicitAutograd")
def _pool_operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, key, key_padding_mask, query_grid, key_grid, scale = arguments
    return _pool(query, key, key_padding_mask, TokenGrid.unpack(query_grid), TokenGrid.unpack(key_grid), scale)


@torch.library.impl(_library, "choose_blocks", "CompositeExplicitAutograd")
def _choose_operator(*arguments: Any) -> tuple[Tensor, ...]:
    queries, keys, query_grid, key_grid, *numbers = arguments
    return _choose(queries, keys, TokenGrid.unpack(query_grid), TokenGrid.unpack(key_grid), *numbers)


@torch.library.register_fake("sparse_attn_modules::pool_blocks", lib=_library)
def _pool_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, key, _, query_grid, key_grid, _ = arguments
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32

    def new(tensor: Tensor, grid: TokenGrid) -> Tensor:
        rows, columns = cut_of(grid)
        return tensor.new_empty(*tensor.shape[:2], grid.num_blocks * rows * columns, _width(query), dtype=dtype)

    return new(query, TokenGrid.unpack(query_grid)), new(key, TokenGrid.unpack(key_grid))


@torch.library.register_fake("sparse_attn_modules::choose_blocks", lib=_library)
def _choose_fake(*arguments: Any) -> tuple[Tensor, ...]:
    queries, _, query_grid, key_grid, _, _, with_query_lists = arguments
    rows, columns = TokenGrid.unpack(query_grid).num_blocks, TokenGrid.unpack(key_grid).num_blocks

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return queries.new_empty((*queries.shape[:2], *shape), dtype=dtype)

    lists = (new(rows), new(rows, columns), new(rows))
    if with_query_lists:
        return new(rows, columns, dtype=torch.bool), *lists, new(columns), new(columns, rows)
    return new(rows, columns, dtype=torch.bool), *lists, *(queries.new_empty(0, dtype=torch.int32) for _ in range(2))
