"""Lists of masks that are made on a GPU: ready for every stream, and never those of a graph."""

import pytest
import torch

from sparse_attn_modules import BlockMask, TokenGrid, block_sparse_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

GRID = TokenGrid(64, 64)
LISTS = ("key_counts", "key_indices", "query_counts", "query_indices", "row_order")


def _mask(tile: tuple[int, int] = (8, 16)) -> BlockMask:
    grid = TokenGrid(64, 64, tile=tile)
    return BlockMask(torch.rand(2, 4, grid.num_blocks, grid.num_blocks, device="cuda") < 0.4, grid)


def _expected(mask: BlockMask) -> dict[str, torch.Tensor]:
    on_cpu = BlockMask(mask.blocks.cpu(), mask.query_grid)
    return {name: getattr(on_cpu, name) for name in LISTS}


def test_other_streams_wait_for_lists_that_are_being_made() -> None:
    busy = torch.randn(8192, 8192, device="cuda")
    for _ in range(5):
        mask = _mask()
        expected = _expected(mask)
        torch.cuda.synchronize()
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(first):
            for _ in range(8):
                busy @ busy  # so that the lists come late
            for name in LISTS:
                getattr(mask, name)
        with torch.cuda.stream(second):
            found = {name: getattr(mask, name).clone() for name in LISTS}
        torch.cuda.synchronize()
        assert all(torch.equal(found[name].cpu(), expected[name]) for name in LISTS)


@pytest.mark.parametrize("tile", [(8, 16), (16, 16)])  # which is split
def test_a_graph_keeps_its_lists_to_itself(tile: tuple[int, int]) -> None:
    query = torch.randn(2, 4, GRID.num_tokens, 64, device="cuda", dtype=torch.bfloat16)
    block_sparse_attention(query, query, query, _mask(tile), backend="cuda")  # loads the kernels
    mask = _mask(tile)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_sparse_attention(query, query, query, mask, backend="cuda")
    assert not mask._lists
    assert not mask._splits
    eager = block_sparse_attention(query, query, query, mask, backend="cuda")
    graph.replay()
    assert torch.equal(out, eager)


def test_lists_of_a_mask_that_is_moved_to_the_gpu() -> None:
    on_cpu = BlockMask(_mask().blocks.cpu(), GRID)
    moved = on_cpu.to("cuda")
    assert all(torch.equal(getattr(moved, name).cpu(), getattr(on_cpu, name)) for name in LISTS)
