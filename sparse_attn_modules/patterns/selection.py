"""The operators that choose blocks at run time, and which implementation they run on.

They are opaque to ``torch.compile``: everything that depends on data stays on the device, and shapes follow from the
geometry. Eager calls that nobody watches skip the dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..block_mask import BlockMask
from ..token_grid import TokenGrid
from ..tracing import is_watched
from . import cuda_selection
from .block_features import key_features, query_features, with_relative_position
from .choosing import Rule, block_mass, choose

_LISTS = ("key_counts", "key_indices", "row_order", "query_counts", "query_indices")
_RETURNS = (
    "(Tensor blocks, Tensor key_counts, Tensor key_indices, Tensor row_order, Tensor query_counts, "
    "Tensor query_indices)"
)

_library = torch.library.Library("sparse_attn_modules", "FRAGMENT")
_library.define(
    "select_blocks(Tensor query, Tensor key, Tensor? rel_h, Tensor? rel_w, Tensor? key_padding_mask, "
    "int[] query_grid, int[] key_grid, float scale, int count, float mass, bool with_query_lists) -> " + _RETURNS
)
_library.define(
    "choose_blocks(Tensor queries, Tensor keys, int[] query_grid, int[] key_grid, int count, float mass, "
    "bool with_query_lists) -> " + _RETURNS
)


def select_mask(
    query: Tensor,
    key: Tensor,
    query_grid: TokenGrid,
    key_grid: TokenGrid,
    rule: Rule,
    *,
    scale: float,
    relative_position: tuple[Tensor, Tensor] | None,
    key_padding_mask: Tensor | None,
    with_query_lists: bool,
) -> BlockMask:
    """The mask of a rule for these queries and keys. Nothing is differentiated."""
    rel_h, rel_w = (None, None) if relative_position is None else relative_position
    tensors: Any = [None if x is None else x.detach() for x in (query, key, rel_h, rel_w, key_padding_mask)]
    numbers: Any = (float(scale), rule.count, float(rule.mass), with_query_lists)
    if is_watched() or type(query) is not Tensor:
        tensors_out = torch.ops.sparse_attn_modules.select_blocks.default(
            *tensors, query_grid.pack(), key_grid.pack(), *numbers
        )
    else:
        run: Any = _select
        tensors_out = run(*tensors, query_grid, key_grid, *numbers)
    return _mask_of(tensors_out, query_grid, key_grid, rule, with_query_lists)


def choose_mask(
    queries: Tensor, keys: Tensor, query_grid: TokenGrid, key_grid: TokenGrid, rule: Rule, *, with_query_lists: bool
) -> BlockMask:
    """The mask of a rule for these features of queries and keys. Nothing is differentiated."""
    features = queries.detach(), keys.detach()
    numbers: Any = (rule.count, float(rule.mass), with_query_lists)
    if is_watched() or type(queries) is not Tensor:
        tensors_out = torch.ops.sparse_attn_modules.choose_blocks.default(
            *features, query_grid.pack(), key_grid.pack(), *numbers
        )
    else:
        tensors_out = _choose(*features, query_grid, key_grid, *numbers)
    return _mask_of(tensors_out, query_grid, key_grid, rule, with_query_lists)


def features(
    query: Tensor,
    key: Tensor,
    query_grid: TokenGrid,
    key_grid: TokenGrid,
    scale: float,
    relative_position: tuple[Tensor, Tensor] | None = None,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Features of queries and keys whose products estimate the logits; see ``block_features``."""
    if key_padding_mask is None and cuda_selection.can_pool(query, key, query_grid, key_grid):
        queries, keys = cuda_selection.features(query, key, query_grid, key_grid, scale)
    else:
        queries = query_features(query, query_grid, scale)
        keys = key_features(key, key_grid, key_padding_mask)
    if relative_position is None:
        return queries, keys
    return with_relative_position(queries, keys, relative_position, query_grid, key_grid)


def _mask_of(
    tensors: tuple[Tensor, ...], query_grid: TokenGrid, key_grid: TokenGrid, rule: Rule, with_query_lists: bool
) -> BlockMask:
    blocks, *lists = tensors
    known = dict(zip(_LISTS, lists if with_query_lists else lists[:3]))
    density = rule.density(query_grid, key_grid)
    return BlockMask.from_lists(blocks, known, query_grid, key_grid, is_dense=False, density=density)


def _select(
    query: Tensor,
    key: Tensor,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    key_padding_mask: Tensor | None,
    query_grid: TokenGrid,
    key_grid: TokenGrid,
    scale: float,
    count: int,
    mass: float,
    with_query_lists: bool,
) -> tuple[Tensor, ...]:
    # Outside inference mode, or a mask could not be saved for a backward pass.
    with torch.inference_mode(False), torch.no_grad(), without_autocast(query.device.type):
        relative_position = None if rel_h is None or rel_w is None else (rel_h, rel_w)
        queries, keys = features(query, key, query_grid, key_grid, scale, relative_position, key_padding_mask)
        return _choose(queries, keys, query_grid, key_grid, count, mass, with_query_lists)


def _choose(
    queries: Tensor,
    keys: Tensor,
    query_grid: TokenGrid,
    key_grid: TokenGrid,
    count: int,
    mass: float,
    with_query_lists: bool,
) -> tuple[Tensor, ...]:
    with torch.inference_mode(False), torch.no_grad(), without_autocast(queries.device.type):
        rule = Rule(count, mass)
        if cuda_selection.can_choose(queries, query_grid, key_grid):
            return cuda_selection.choose(queries, keys, query_grid, key_grid, rule, with_query_lists)
        blocks = choose(block_mass(queries, keys, query_grid, key_grid), query_grid, key_grid, rule)
        mask = BlockMask(blocks, query_grid, key_grid)
        lists = [getattr(mask, name) for name in _LISTS[: 5 if with_query_lists else 3]]
        return (blocks, *lists, *(blocks.new_empty(0, dtype=torch.int32) for _ in range(5 - len(lists))))


@torch.library.impl(_library, "select_blocks", "CompositeExplicitAutograd")
def _select_operator(*arguments: Any) -> tuple[Tensor, ...]:
    query, key, rel_h, rel_w, key_padding_mask, query_grid, key_grid, *numbers = arguments
    grids = TokenGrid.unpack(query_grid), TokenGrid.unpack(key_grid)
    return _select(query, key, rel_h, rel_w, key_padding_mask, *grids, *numbers)


@torch.library.impl(_library, "choose_blocks", "CompositeExplicitAutograd")
def _choose_operator(*arguments: Any) -> tuple[Tensor, ...]:
    queries, keys, query_grid, key_grid, count, mass, with_query_lists = arguments
    grids = TokenGrid.unpack(query_grid), TokenGrid.unpack(key_grid)
    return _choose(queries, keys, *grids, count, mass, with_query_lists)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    queries, with_query_lists = arguments[0], arguments[-1]
    query_grid, key_grid = (arguments[i] for i, x in enumerate(arguments) if isinstance(x, (list, tuple)))
    places = queries.shape[0], queries.shape[1]
    rows, columns = TokenGrid.unpack(list(query_grid)).num_blocks, TokenGrid.unpack(list(key_grid)).num_blocks

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return queries.new_empty((*places, *shape), dtype=dtype)

    lists = new(rows), new(rows, columns), new(rows)
    if with_query_lists:
        return new(rows, columns, dtype=torch.bool), *lists, new(columns), new(columns, rows)
    return new(rows, columns, dtype=torch.bool), *lists, *(queries.new_empty(0, dtype=torch.int32) for _ in range(2))


torch.library.register_fake("sparse_attn_modules::select_blocks", _fake, lib=_library)
torch.library.register_fake("sparse_attn_modules::choose_blocks", _fake, lib=_library)
