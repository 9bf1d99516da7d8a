"""In which blocks the ``cuda`` backend computes attention that skips nothing; no GPU is needed to tell."""

import pytest
import torch

from sparse_attn_modules import BlockMask, LocalWindow, TokenGrid
from sparse_attn_modules.backends import AttentionInputs, cuda


def _grids(mask, relative_position=False):
    tokens = mask.query_grid.num_tokens, mask.key_grid.num_tokens
    query, key = (torch.zeros(1, 1, count, 8) for count in tokens)
    rel = torch.zeros(1, 1, tokens[0], 4) if relative_position else None
    lists = (mask.blocks, mask.key_counts, mask.key_indices, mask.row_order, None, None)
    grids = mask.query_grid, mask.key_grid
    return cuda._grids(AttentionInputs(query, key, key, *lists, rel, rel, None, None, *grids, 1.0, 0.0, mask.is_dense))


@pytest.mark.parametrize(
    ("grid", "blocks"),
    [(TokenGrid(37, 37, prefix=5), 11), (TokenGrid(14, 14, prefix=1), 2), (TokenGrid(9, 5, suffix=3, tile=(16, 8)), 1)],
)
def test_dense_attention_takes_as_few_blocks_as_its_tokens_fill(grid, blocks):
    for found in _grids(BlockMask.dense(grid)):
        assert found.num_tokens == grid.num_tokens
        assert found.num_blocks == blocks < grid.num_blocks


def test_queries_and_keys_have_grids_of_their_own():
    query_grid, key_grid = _grids(BlockMask.dense(TokenGrid(64, 64), TokenGrid(10, 10, prefix=1)))
    assert query_grid == TokenGrid(64, 64)
    assert key_grid.num_blocks == 1


def test_tiles_stay_where_the_place_in_the_image_counts():
    grid = TokenGrid(37, 37, prefix=5)
    assert _grids(LocalWindow(density=0.4).mask(grid, 1)) == (grid, grid)
    assert _grids(BlockMask.dense(TokenGrid(14, 14)), relative_position=True) == (TokenGrid(14, 14),) * 2
