"""In which blocks, and with which backward kernels, the ``cuda`` backend computes; no GPU is needed to tell."""

import pytest
import torch

from sparse_attn_modules import BlockMask, LocalWindow, TokenGrid
from sparse_attn_modules.backends import AttentionInputs, Request, cuda


def _inputs(mask, relative_position=False, density=None):
    tokens = mask.query_grid.num_tokens, mask.key_grid.num_tokens
    query, key = (torch.zeros(1, 1, count, 8) for count in tokens)
    rel = torch.zeros(1, 1, tokens[0], 4) if relative_position else None
    lists = (mask.blocks, mask.key_counts, mask.key_indices, mask.row_order, None, None)
    grids = mask.query_grid, mask.key_grid
    return AttentionInputs(
        query, key, key, *lists, rel, rel, None, None, *grids, 1.0, 0.0, is_dense=mask.is_dense, density=density
    )


def _grids(mask, relative_position=False):
    return cuda._grids(_inputs(mask, relative_position))


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


@pytest.mark.parametrize(("size", "density", "expected"), [(64, 0.3, False), (64, 0.6, True), (128, 0.2, True)])
def test_many_key_blocks_per_query_block_are_for_the_fused_kernel(size, density, expected):
    """32 blocks and 128: what counts is how many of them a block of queries sees."""
    grid = TokenGrid(size, size)
    blocks = torch.zeros(grid.num_blocks, grid.num_blocks, dtype=torch.bool)
    blocks[:, : round(density * grid.num_blocks)] = True
    inputs = _inputs(BlockMask(blocks, grid), density=density)
    assert cuda._fuses(inputs) is expected
    inputs.dropout_p = 0.1
    assert not cuda._fuses(inputs)


@pytest.mark.parametrize(("side", "expected"), [(41, False), (48, True)])
def test_dense_attention_is_judged_by_the_blocks_it_takes(side, expected):
    """18 blocks of tiles each; as a sequence 14 and 18."""
    grid = TokenGrid(side, side)
    assert grid.num_blocks == 18
    assert cuda._fuses(_inputs(BlockMask.dense(grid))) is expected
    assert not cuda._fuses(_inputs(BlockMask.dense(grid), relative_position=True))


@pytest.mark.parametrize(
    ("scale", "factor", "taken"), [(0.2, 1, 0.2), (-0.2, -1, 0.2), (1e-39, 0, 1.0), (-1e-46, 0, 1.0)]
)
def test_kernels_get_a_scale_whose_inverse_is_a_float(scale, factor, taken):
    grid = TokenGrid(9, 5)
    mask = BlockMask.dense(grid)
    query = torch.randn(1, 1, grid.num_tokens, 8)
    lists = (mask.blocks, mask.key_counts, mask.key_indices, mask.row_order, None, None)
    inputs = AttentionInputs(query, query, query, *lists, None, None, None, None, grid, grid, scale, 0.0, True)
    found, positive = cuda._positive_scale(inputs)
    assert torch.equal(found, factor * query)
    assert positive == taken


@pytest.mark.parametrize(("batch", "heads"), [(65536, 1), (1, 65536)])
def test_more_entries_than_a_launch_holds_are_refused_with_a_reason(batch, heads):
    grid = TokenGrid(9, 5)
    request = Request(torch.device("cuda"), torch.bfloat16, 64, grid, grid, batch=batch, heads=heads)
    assert f"up to 65535 entries and as many heads, got {batch} × {heads}" in cuda.why_not(request)

    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def ask(query):
        asked = Request(
            torch.device("cuda"), torch.bfloat16, 64, grid, grid, batch=query.shape[0], heads=query.shape[1]
        )
        return query + (1 if cuda.why_not(asked) else 0)

    assert ask(torch.zeros(batch, heads)).sum() == batch * heads
