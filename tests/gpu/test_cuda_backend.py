"""The compiled kernels against the reference in float64, over random geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_attn_modules import BlockMask, TokenGrid, block_sparse_attention
from sparse_attn_modules.backends import cuda

_REASON = cuda.why_not_here()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=f"cuda backend: {_REASON}")]

_TILES = [(8, 16), (16, 8), (4, 32), (2, 64), (1, 128), (16, 16), (1, 384), (32, 24)]
_RELATIVE_POSITION_TILES = [(8, 16), (8, 16), (16, 16), (8, 48)]


def _run(case: Any, backend: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    case = case if dtype is None else case.to(dtype)
    return block_sparse_attention(
        case.query, case.key, case.value, case.mask, **case.options, backend=backend, return_lse=True
    )


def _check(case: Any, tolerance: float | None = None) -> None:
    out, lse = _run(case, "cuda")
    again, lse_again = _run(case, "cuda")
    expected, expected_lse = _run(case, "reference", torch.float64)
    if tolerance is None:
        # Plain attention in the same dtype: rounded logits, weights and sums.
        low, _ = _plain(case)
        tolerance = 2 * (low.double() - expected).abs().max().item() + 1e-5
    assert torch.isfinite(out).all()
    assert (out.double() - expected).abs().max() <= tolerance
    assert torch.equal(torch.isinf(lse), torch.isinf(expected_lse))
    finite = torch.isfinite(expected_lse)
    assert torch.allclose(lse.double()[finite], expected_lse[finite], rtol=1e-3, atol=2e-3)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)


def _plain(case: Any) -> tuple[Tensor, Tensor]:
    group = case.query.shape[1] // case.key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (case.key, case.value))
    logits = case.query @ key.mT * (case.query.shape[-1] ** -0.5 if case.scale is None else case.scale)
    if case.relative_position is not None:
        grid = case.mask.key_grid
        bias = case.relative_position[0][..., :, None] + case.relative_position[1][..., None, :]
        logits[..., grid.prefix : grid.prefix + grid.num_patches] += bias.flatten(-2)
    allowed = case.mask.token_mask()
    if case.key_padding_mask is not None:
        allowed = allowed & ~case.key_padding_mask[:, None, None]
    logits = logits.masked_fill(~allowed, -torch.inf)
    weights = torch.softmax(logits, -1).nan_to_num(0.0)
    return weights @ value, logits


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("first", range(0, 400, 20))
def test_matches_the_reference_on_random_geometry(first: int, drawn_cuda_case) -> None:
    for seed in range(first, first + 20):
        try:
            _check(drawn_cuda_case(seed, _TILES, _RELATIVE_POSITION_TILES))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_blocks_per_row(head_dim: int, dtype: torch.dtype, cuda_case) -> None:
    """More key blocks than the 32 that a warp holds at once."""
    torch.manual_seed(0)
    grid = TokenGrid.sequence(128 * 70 + 3)
    blocks = torch.rand(1, 2, grid.num_blocks, grid.num_blocks, device="cuda") < 0.7
    query, key, value = (torch.randn(1, 2, grid.num_tokens, head_dim, device="cuda", dtype=dtype) for _ in range(3))
    _check(cuda_case(query, key, value, BlockMask(blocks, grid)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("side", [32, 29])  # whole tiles, ragged ones
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("growth", [-150.0, 12.0, 60.0, 300.0])
def test_logits_that_grow_from_block_to_block(
    dtype: torch.dtype, head_dim: int, side: int, relative: bool, growth: float, cuda_case
) -> None:
    """Weights relative to an early maximum overflow in some rows of some thread blocks, and vanish in others."""
    torch.manual_seed(2)
    grid = TokenGrid(side, side, tile=(8, 16))
    tensors, mask = _simple(grid, heads=3, head_dim=head_dim)
    query, key, value = (tensor.to(dtype) for tensor in tensors)
    # A component that all queries have, and of which later keys have more; a third of the heads goes without.
    rise = torch.linspace(0, growth, grid.num_tokens, device="cuda")
    query[..., 0] = 4 * head_dim**0.5 * torch.rand(query.shape[:3], device="cuda")
    key[..., 0] = rise / 4 * torch.tensor([1, 0.3, 0], device="cuda")[:, None]
    bias = None
    if relative:
        bias = tuple(torch.randn(1, 3, grid.num_tokens, side, device="cuda", dtype=dtype) for _ in "hw")
    _check(cuda_case(query, key, value, mask, relative_position=bias), tolerance=0.04)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_first_blocks_without_keys(head_dim: int, cuda_case) -> None:
    """Padding hides the first block of keys, all but one key of the second, and what is left is far below zero."""
    torch.manual_seed(3)
    grid = TokenGrid(24, 32, tile=(8, 16))
    tensors, _ = _simple(grid, head_dim=head_dim)
    query, key, value = tensors
    query[..., 0], key[..., 0] = 30 * head_dim**0.5, -20
    padding = torch.zeros(1, grid.height, grid.width, dtype=torch.bool, device="cuda")
    padding[:, :8] = True
    padding[:, 4, 20] = False
    mask = BlockMask.dense(grid, device="cuda")
    _check(cuda_case(query, key, value, mask, key_padding_mask=padding.flatten(1)), tolerance=0.04)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 1e-3])
def test_any_scale(scale: float, drawn_cuda_case) -> None:
    case = drawn_cuda_case(5, _TILES, _RELATIVE_POSITION_TILES)
    case.scale = scale
    _check(case)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_gradients_come_from_the_saved_log_sum(head_dim: int) -> None:
    torch.manual_seed(1)
    grid = TokenGrid(20, 20, prefix=1)
    mask = BlockMask(torch.rand(1, 3, grid.num_blocks, grid.num_blocks, device="cuda") < 0.5, grid)
    inputs = [torch.randn(2, 3, grid.num_tokens, head_dim, device="cuda", dtype=torch.float16) for _ in range(4)]
    grads = {}
    for backend, dtype in (("cuda", torch.float16), ("reference", torch.float64)):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs[:3]]
        block_sparse_attention(*leaves, mask, backend=backend).backward(inputs[3].to(dtype))
        grads[backend] = [leaf.grad.double() for leaf in leaves]
    for ours, expected in zip(grads["cuda"], grads["reference"]):
        assert (ours - expected).norm() <= 5e-3 * expected.norm()


def _simple(grid: TokenGrid, heads: int = 2, head_dim: int = 64) -> tuple[list[Tensor], BlockMask]:
    tensors = [torch.randn(1, heads, grid.num_tokens, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    blocks = torch.rand(1, heads, grid.num_blocks, grid.num_blocks, device="cuda") < 0.5
    return tensors, BlockMask(blocks, grid)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_cuda_graph(head_dim: int) -> None:
    grid = TokenGrid(32, 32)
    tensors, mask = _simple(grid, head_dim=head_dim)
    expected = block_sparse_attention(*tensors, mask, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_sparse_attention(*tensors, mask, backend="cuda")
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_compiles_once_for_masks_of_one_geometry() -> None:
    grid = TokenGrid(32, 32)
    tensors, first = _simple(grid)
    _, second = _simple(grid)
    compiled_count = 0

    def count(graph, example_inputs):
        nonlocal compiled_count
        compiled_count += 1
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
        return block_sparse_attention(query, key, value, mask, backend="cuda")

    for mask in (first, second):
        expected = block_sparse_attention(*tensors, mask, backend="cuda")
        assert torch.equal(attend(*tensors, mask), expected)
    assert compiled_count == 1


@pytest.mark.parametrize("head_dim", [64, 80])
def test_two_streams_and_threads(head_dim: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    grid = TokenGrid(40, 40, prefix=1)
    work = [_simple(grid, heads=8, head_dim=head_dim) for _ in range(2)]
    expected = [block_sparse_attention(*tensors, mask, backend="cuda") for tensors, mask in work]
    torch.cuda.synchronize()

    def repeat(index: int) -> bool:
        tensors, mask = work[index]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            outs = [block_sparse_attention(*tensors, mask, backend="cuda") for _ in range(20)]
        stream.synchronize()
        return all(torch.equal(out, expected[index]) for out in outs)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(repeat, range(2)))


def test_more_than_2_to_the_31_elements() -> None:
    grid = TokenGrid(64, 64)
    batch, heads = 704, 12
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    qkv = torch.randn(batch, grid.num_tokens, 3, 1, 64, device="cuda", dtype=torch.bfloat16)
    qkv = qkv.expand(-1, -1, -1, heads, -1).contiguous()
    assert qkv.numel() > 2**31
    query, key, value = (qkv[:, :, index].transpose(1, 2) for index in range(3))
    mask = BlockMask.dense(grid, device="cuda")
    out = block_sparse_attention(query, key, value, mask, backend="cuda")
    last = [tensor[-1:] for tensor in (query, key, value)]
    assert torch.equal(out[-1:], block_sparse_attention(*last, mask, backend="cuda"))
    assert torch.equal(out[-1, 0], out[-1, heads - 1])


def test_refuses_with_a_reason() -> None:
    grid = TokenGrid(16, 16, tile=(12, 12))
    tensors, mask = _simple(grid)
    with pytest.raises(ValueError, match="blocks must consist of tiles of 128"):
        block_sparse_attention(*tensors, mask, backend="cuda")
    tensors, mask = _simple(TokenGrid(16, 16), head_dim=136)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8 up to 128"):
        block_sparse_attention(*tensors, mask, backend="cuda")
