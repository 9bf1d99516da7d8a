"""BlockMask: lists, densities, token masks, set operations."""

import copy
import gc
import pickle
import time
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensor, FakeTensorMode

from sparse_attn_modules import BlockMask, LocalWindow, Random, TokenGrid, block_sparse_attention

QUERIES = TokenGrid(5, 9, prefix=3, suffix=2, tile=(2, 4))
KEYS = TokenGrid(7, 4, suffix=9, tile=(3, 2))


def random_mask(batch=2, heads=3, density=0.4, query_grid=QUERIES, key_grid=KEYS):
    return BlockMask(
        torch.rand(batch, heads, query_grid.num_blocks, key_grid.num_blocks) < density, query_grid, key_grid
    )


def test_index_lists_in_both_directions():
    mask = random_mask()
    mask.blocks[0, 1, 2] = False
    mask.blocks[1, 0, :, 1] = True
    for blocks, counts, indices in (
        (mask.blocks, mask.key_counts, mask.key_indices),
        (mask.blocks.mT, mask.query_counts, mask.query_indices),
    ):
        assert counts.dtype == indices.dtype == torch.int32
        assert indices.shape == blocks.shape
        for place in torch.cartesian_prod(*(torch.arange(size) for size in blocks.shape[:3])).tolist():
            active = blocks[tuple(place)].nonzero().flatten().tolist()
            assert counts[tuple(place)] == len(active)
            listed = indices[tuple(place)].tolist()
            assert listed[: len(active)] == active
            assert sorted(listed) == list(range(blocks.shape[3]))


def test_lists_are_built_once():
    mask = random_mask()
    assert mask.key_indices is mask.key_indices
    assert mask.query_counts is mask.query_counts


def test_row_order_puts_the_heaviest_first():
    mask = random_mask()
    counts = mask.key_counts.gather(-1, mask.row_order.long())
    assert (counts[..., :-1] >= counts[..., 1:]).all()


def test_token_mask_and_back():
    mask = random_mask()
    tokens = mask.token_mask()
    query_blocks, key_blocks = QUERIES.block_of_token().tolist(), KEYS.block_of_token().tolist()
    for query, key in ((0, 0), (4, 17), (46, 36), (20, 30)):
        assert tokens[1, 2, query, key] == mask.blocks[1, 2, query_blocks[query], key_blocks[key]]
    for reduce in ("any", "all"):
        back = BlockMask.from_token_mask(tokens, QUERIES, KEYS, reduce=reduce)
        assert back.blocks.equal(mask.blocks)


def test_from_token_mask_takes_any_or_all():
    tokens = torch.zeros(QUERIES.num_tokens, KEYS.num_tokens, dtype=torch.bool)
    tokens[10, 20] = True
    block = QUERIES.block_of_token()[10], KEYS.block_of_token()[20]
    superset = BlockMask.from_token_mask(tokens, QUERIES, KEYS)
    assert superset.blocks.sum() == 1
    assert superset.blocks[0, 0][block]
    assert not BlockMask.from_token_mask(tokens, QUERIES, KEYS, reduce="all").blocks.any()


def test_densities():
    mask = random_mask()
    assert mask.density == pytest.approx(mask.blocks.float().mean().item())
    assert mask.token_density == pytest.approx(mask.token_mask().float().mean().item())
    assert BlockMask.dense(QUERIES).density == 1


def test_dense_is_known_without_looking():
    assert BlockMask.dense(QUERIES, KEYS).is_dense
    everything = torch.ones(QUERIES.num_blocks, KEYS.num_blocks, dtype=torch.bool)
    assert BlockMask(everything, QUERIES, KEYS).is_dense
    assert not random_mask().is_dense
    assert not BlockMask(everything.to("meta"), QUERIES, KEYS).is_dense


def test_union_and_intersection_broadcast():
    first, second = random_mask(batch=1), random_mask(heads=1)
    assert (first | second).blocks.equal(first.blocks | second.blocks)
    assert first.union(second).blocks.equal((first | second).blocks)
    assert first.intersection(second).blocks.equal(first.blocks & second.blocks)
    assert (first & second).blocks.shape == (2, 3, QUERIES.num_blocks, KEYS.num_blocks)
    with pytest.raises(ValueError, match="union must be of masks on the same grids"):
        first | random_mask(key_grid=QUERIES)
    with pytest.raises(TypeError, match="intersection must be with a BlockMask, got int"):
        first & 1


def test_to_moves_and_returns_itself_where_it_is():
    mask = random_mask()
    assert mask.to("cpu") is mask
    assert mask.to("meta").device.type == "meta"
    assert BlockMask.dense(QUERIES).to("meta").is_dense


def test_copies_drop_the_lists_and_rebuild_them():
    mask = random_mask()
    mask.key_counts  # noqa: B018
    for copied in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert copied._lists == {}
        assert copied.key_indices.equal(mask.key_indices)


def test_accepts_two_and_three_dimensions():
    blocks = torch.rand(3, QUERIES.num_blocks, KEYS.num_blocks) < 0.5
    assert BlockMask(blocks, QUERIES, KEYS).blocks.shape[:2] == (1, 3)
    assert BlockMask(blocks[0], QUERIES, KEYS).blocks.shape[:2] == (1, 1)


def test_bad_input_is_refused():
    blocks = torch.ones(QUERIES.num_blocks, KEYS.num_blocks, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"BlockMask: blocks must be a boolean tensor, got torch\.float32"):
        BlockMask(blocks.float(), QUERIES, KEYS)
    with pytest.raises(TypeError, match="BlockMask: blocks must be a boolean tensor, got list"):
        BlockMask([[True]], QUERIES, KEYS)
    with pytest.raises(ValueError, match=r"BlockMask: blocks must have shape \[B \| 1, H \| 1, 11, 8\]"):
        BlockMask(blocks[1:], QUERIES, KEYS)
    with pytest.raises(ValueError, match="token_mask must end in"):
        BlockMask.from_token_mask(torch.ones(3, 3, dtype=torch.bool), QUERIES, KEYS)
    with pytest.raises(TypeError, match="token_mask must be a boolean tensor"):
        BlockMask.from_token_mask(torch.ones(QUERIES.num_tokens, KEYS.num_tokens), QUERIES, KEYS)
    with pytest.raises(ValueError, match="reduce must be 'any' or 'all', got 'some'"):
        BlockMask.from_token_mask(random_mask().token_mask(), QUERIES, KEYS, reduce="some")


@pytest.mark.parametrize("make", [lambda seed: LocalWindow(density=0.2 + seed * 1e-6), lambda seed: Random(0.2, seed)])
def test_construction_at_64_by_64_with_16_heads_is_quick(make):
    grid = TokenGrid(64, 64)
    times = []
    for seed in range(9):
        start = time.perf_counter()
        mask = make(seed).mask(grid, 16)  # another pattern each time: nothing comes from the cache
        _ = mask.key_indices, mask.query_indices, mask.row_order
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 2] < 0.01


def test_masks_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        made = random_mask()
        masks = [made, made | made, BlockMask.from_token_mask(made.token_mask(), QUERIES, KEYS)]
    query = torch.randn(2, 3, QUERIES.num_tokens, 4, requires_grad=True)
    key = torch.randn(2, 3, KEYS.num_tokens, 4)
    for mask in masks:
        block_sparse_attention(query, key, key, mask).sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize(("tile", "finer"), [((4, 6), (2, 3)), ((4, 6), (4, 2)), ((1, 12), (1, 4))])
def test_split_means_the_same_in_smaller_blocks(tile, finer):
    query_grid = TokenGrid(7, 11, prefix=30, suffix=3, tile=tile)
    key_grid = TokenGrid(5, 16, prefix=1, tile=tile)
    mask = random_mask(query_grid=query_grid, key_grid=key_grid)
    split = mask.split(finer, finer)
    assert split.query_grid == TokenGrid(7, 11, prefix=30, suffix=3, tile=finer)
    assert torch.equal(split.token_mask(), mask.token_mask())
    assert mask.split(finer, finer) is split
    assert mask.split(tile, tile) is mask
    assert not split.is_dense
    assert BlockMask.dense(query_grid, key_grid).split(finer, tile).is_dense


def test_split_refuses_tiles_that_do_not_divide():
    with pytest.raises(ValueError, match=r"BlockMask.split: tiles must divide \(2, 4\), got \(2, 3\)"):
        random_mask().split((2, 3), (3, 2))
    assert random_mask().split([1, 2], (1, 2)).query_grid.tile == (1, 2)


@pytest.mark.parametrize("tile", [0, (2,), (0, 2), (True, 2), (2.0, 2), None, "ab"])
def test_split_refuses_what_is_no_tile(tile):
    with pytest.raises(ValueError, match=r"BlockMask.split: tiles must be \(height, width\) in positive integers, got"):
        random_mask().split((1, 1), tile)


def test_lists_are_contiguous_whatever_the_strides_of_the_blocks():
    grid, other = TokenGrid(16, 16, tile=(4, 4)), TokenGrid(12, 16, tile=(4, 4))
    blocks = torch.rand(2, 3, other.num_blocks, grid.num_blocks).transpose(-1, -2) < 0.5
    mask = BlockMask(blocks, grid, other)
    for name in ("key_counts", "key_indices", "query_counts", "query_indices", "row_order"):
        assert getattr(mask, name).is_contiguous(), name


@pytest.mark.parametrize("backend", ["gathered", "reference"])
def test_a_mask_goes_with_its_last_reference(backend):
    """What it keeps of calls must not keep the mask: a dynamic pattern makes one at each call."""
    mask = random_mask()
    query, key = (torch.randn(2, 3, grid.num_tokens, 4) for grid in (QUERIES, KEYS))
    gone = weakref.ref(mask)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            block_sparse_attention(query, key, key, mask, backend=backend)
        del mask
        assert gone() is None
    finally:
        gc.enable()


def test_lists_and_splits_made_among_fake_tensors_are_real():
    grid = TokenGrid(9, 11, prefix=1, tile=(4, 4))
    mask = BlockMask((torch.rand(3, grid.num_blocks, grid.num_blocks) < 0.5).mT, grid)
    with FakeTensorMode(allow_non_fake_inputs=True):
        lists = [getattr(mask, name) for name in ("key_counts", "query_indices", "row_order")]
        lists += [mask.split((2, 2), (2, 2)).blocks]
    assert not any(isinstance(made, FakeTensor) for made in lists)
    twin = BlockMask(mask.blocks, grid)
    for name in ("key_counts", "key_indices", "query_counts", "query_indices", "row_order"):
        assert torch.equal(getattr(mask, name), getattr(twin, name))
    assert torch.equal(mask.split((2, 2), (2, 2)).blocks, twin.split((2, 2), (2, 2)).blocks)


def test_a_compiled_call_leaves_nothing_with_the_mask():
    """What a compiled region computes lies in its graph's memory, and a mask that changed would be compiled again."""
    mask = BlockMask(torch.rand(1, 2, 2, 2) < 0.6, TokenGrid(16, 16))
    query = torch.randn(1, 2, 256, 16)
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def attend(query):
        return block_sparse_attention(query, query, query, mask, backend="gathered")

    outs = [attend(query) for _ in range(3)]
    assert counter.frame_count == 1
    assert not mask._lists
    torch.testing.assert_close(outs[2], block_sparse_attention(query, query, query, mask, backend="gathered"))


def test_a_mask_arrives_on_another_device_with_its_lists():
    blocks = torch.rand(1, 2, 4, 4) < 0.6
    blocks[..., 0] = True
    moved = BlockMask(blocks & ~torch.eye(4, dtype=torch.bool), TokenGrid(16, 32)).to("meta")
    assert set(moved._lists) == {"key_counts", "key_indices", "query_counts", "query_indices", "row_order"}
    assert all(tensor.device.type == "meta" for tensor in moved._lists.values())
