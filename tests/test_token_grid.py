"""TokenGrid: which tokens form a block."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_attn_modules import TokenGrid

GRIDS = st.builds(
    TokenGrid,
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 9),
    st.integers(0, 9),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
)


def block_by_hand(grid, token):
    """Block of one token, counted out rather than computed at once."""
    if token < grid.prefix:
        return token // grid.block_size
    prefix_blocks = len(range(0, grid.prefix, grid.block_size))
    tile_columns = len(range(0, grid.width, grid.tile[1]))
    tile_rows = len(range(0, grid.height, grid.tile[0]))
    patch = token - grid.prefix
    if patch < grid.height * grid.width:
        row, column = divmod(patch, grid.width)
        return prefix_blocks + row // grid.tile[0] * tile_columns + column // grid.tile[1]
    return prefix_blocks + tile_rows * tile_columns + (patch - grid.height * grid.width) // grid.block_size


@given(GRIDS)
def test_every_token_lies_in_its_block(grid):
    expected = [block_by_hand(grid, token) for token in range(grid.num_tokens)]
    assert grid.block_of_token().tolist() == expected
    assert grid.num_blocks == max(expected) + 1
    assert grid.block_sizes().tolist() == [expected.count(block) for block in range(grid.num_blocks)]


@given(GRIDS)
def test_block_tokens_lists_each_token_once_at_its_place_in_the_tile(grid):
    table = grid.block_tokens()
    assert table.shape == (grid.num_blocks, grid.block_size)
    for block, tokens in enumerate(table.tolist()):
        present = {slot: token for slot, token in enumerate(tokens) if token >= 0}
        assert list(present.values()) == [t for t in range(grid.num_tokens) if block_by_hand(grid, t) == block]
        for slot, token in present.items():
            patch = token - grid.prefix
            if 0 <= patch < grid.num_patches:
                row, column = divmod(patch, grid.width)
                assert slot == row % grid.tile[0] * grid.tile[1] + column % grid.tile[1]
            else:
                assert slot == list(present).index(slot)


@given(GRIDS)
def test_patch_positions(grid):
    rows, columns = grid.patch_rows().tolist(), grid.patch_columns().tolist()
    for token in range(grid.num_tokens):
        patch = token - grid.prefix
        is_patch = 0 <= patch < grid.num_patches
        assert (rows[token], columns[token]) == (divmod(patch, grid.width) if is_patch else (-1, -1))


def test_sequence_is_a_grid_of_height_one():
    grid = TokenGrid.sequence(300)
    assert (grid.height, grid.width, grid.tile) == (1, 300, (1, 128))
    assert grid.block_of_token().tolist() == [token // 128 for token in range(300)]


def test_equal_grids_share_their_tables_and_hash_alike():
    first, second = TokenGrid(5, 7, 1, tile=(2, 2)), TokenGrid(5, 7, 1, tile=[2, 2])
    assert first == second
    assert hash(first) == hash(second)
    assert first.block_tokens() is second.block_tokens()
    assert first != TokenGrid(5, 7, 1, tile=(2, 3))
    assert TokenGrid.unpack(first.pack()) == first


def test_tables_first_used_in_inference_mode_serve_training():
    grid = TokenGrid(3, 11, tile=(2, 5))
    with torch.inference_mode():
        index = grid.block_of_token()
    assert not index.is_inference()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"height": 0, "width": 4}, ValueError, "TokenGrid: height must be at least 1, got 0"),
        ({"height": 4, "width": -1}, ValueError, "TokenGrid: width must be at least 1, got -1"),
        ({"height": 4, "width": 4, "prefix": -1}, ValueError, "TokenGrid: prefix must be at least 0, got -1"),
        ({"height": 4, "width": 4, "suffix": -2}, ValueError, "TokenGrid: suffix must be at least 0, got -2"),
        ({"height": 4, "width": 4, "tile": (0, 16)}, ValueError, "TokenGrid: tile height must be at least 1, got 0"),
        ({"height": 4, "width": 4, "tile": (8, 0)}, ValueError, "TokenGrid: tile width must be at least 1, got 0"),
        ({"height": 4, "width": 4, "tile": (8,)}, ValueError, "TokenGrid: tile must have two entries"),
        ({"height": 4.0, "width": 4}, TypeError, "TokenGrid: height must be an integer, got 4.0"),
        ({"height": True, "width": 4}, TypeError, "TokenGrid: height must be an integer, got True"),
    ],
)
def test_bad_numbers_are_refused(arguments, error, message):
    with pytest.raises(error) as raised:
        TokenGrid(**arguments)
    assert message in str(raised.value)
