"""Dropout in the compiled kernels: the mask of every other backend, in both passes, new at each replay of a graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn_modules import BlockMask, LocalWindow, TokenGrid, block_sparse_attention
from sparse_attn_modules.backends import cuda
from sparse_attn_modules.backends.dropout import dropout_factors, row_hashes

_REASON = cuda.why_not_here()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=f"cuda backend: {_REASON}")]


def _attend(case, dropout_p: float, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return block_sparse_attention(
        case.query, case.key, case.value, case.mask, **case.options, dropout_p=dropout_p, backend="cuda"
    )


def _attend_in_full(case, dropout_p: float, seed: int) -> Tensor:
    """Plain differentiable PyTorch in the dtype of the case, with the mask that the call above draws."""
    torch.manual_seed(seed)
    drawn = torch.randint(2**62, (1,), device="cuda")
    batch, heads, queries, _ = case.query.shape
    keys = case.key.shape[2]
    numbers = torch.arange(batch * heads, device="cuda").view(batch, heads, 1)
    rows = row_hashes(drawn, numbers, torch.arange(queries, device="cuda"))
    factors = dropout_factors(rows[..., None], torch.arange(keys, device="cuda"), dropout_p, case.query.dtype)

    key, value = (tensor.repeat_interleave(heads // case.key.shape[1], 1) for tensor in (case.key, case.value))
    logits = case.query @ key.mT * (case.query.shape[-1] ** -0.5 if case.scale is None else case.scale)
    if case.relative_position is not None:
        rel_h, rel_w = case.relative_position
        grid = case.mask.key_grid
        logits = logits + F.pad((rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2), (grid.prefix, grid.suffix))
    attended = case.mask.token_mask()
    if case.key_padding_mask is not None:
        attended = attended & ~case.key_padding_mask[:, None, None]
    attended = attended.expand(logits.shape)
    has_keys = attended.any(-1, keepdim=True)
    logits = logits.masked_fill(~attended, -torch.inf).masked_fill(~has_keys, 0.0)
    return torch.where(has_keys, (logits.softmax(-1) * factors) @ value, 0.0)


def _check_both_passes(case, dropout_p: float, seed: int) -> None:
    weights = torch.randn_like(case.query)
    results = []
    for attend, dtype in (
        (_attend, case.query.dtype),
        (_attend_in_full, case.query.dtype),
        (_attend_in_full, torch.float64),
    ):
        leaves = case.to(dtype, requires_grad=True)
        out = attend(leaves, dropout_p, seed)
        results.append([out, *torch.autograd.grad(out, leaves.differentiable, weights.to(dtype))])
    for name, ours, low, expected in zip(("out", "query", "key", "value", "rel_h", "rel_w"), *results):
        tolerance = 3 * (low.double() - expected).abs().max() + 1e-5
        error = (ours.double() - expected).abs().max()
        assert error <= tolerance, f"seed {seed}, {name}: {error} > {tolerance}"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("first", range(0, 100, 10))
def test_matches_autograd_with_the_same_mask(first: int, drawn_cuda_case) -> None:
    for seed in range(first, first + 10):
        _check_both_passes(drawn_cuda_case(seed), (0.1, 0.5, 0.9)[seed % 3], seed)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("has_relative_position", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [32, 64, 72, 80, 96, 128])
def test_every_variant(head_dim: int, dtype: torch.dtype, has_relative_position: bool, cuda_case) -> None:
    """Over more columns of tiles than the kernels know by a bit each, and with extra tokens on both sides."""
    torch.manual_seed(0)
    grid = TokenGrid(9, 530, prefix=5, suffix=130)
    mask = BlockMask(torch.rand(1, 2, grid.num_blocks, grid.num_blocks, device="cuda") < 0.5, grid)

    def draw(heads: int, width: int) -> Tensor:
        return torch.randn(1, heads, grid.num_tokens, width, device="cuda", dtype=dtype)

    relative = (draw(2, grid.height), draw(2, grid.width)) if has_relative_position else None
    case = cuda_case(draw(2, head_dim), draw(1, head_dim), draw(1, head_dim), mask, relative_position=relative)
    _check_both_passes(case, 0.3, 0)


def _linear_case(head_dim: int) -> tuple[Tensor, Tensor, Tensor, object]:
    grid = TokenGrid(32, 32, prefix=1)
    mask = LocalWindow(density=0.5).mask(grid, 2, device="cuda")
    query, key = torch.randn(2, 1, 2, grid.num_tokens, head_dim, device="cuda", dtype=torch.bfloat16).unbind(0)
    return query, key, torch.ones_like(query).requires_grad_(), mask


@pytest.mark.parametrize("head_dim", [64, 128])
def test_mean_is_kept_and_seeds_repeat(head_dim: int) -> None:
    query, key, value, mask = _linear_case(head_dim)

    def attend(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return block_sparse_attention(query, key, value, mask, dropout_p=0.3, backend="cuda")

    outs = torch.stack([attend(seed).detach() for seed in range(20)])
    assert outs.double().mean().item() == pytest.approx(1, abs=2e-3)
    assert torch.equal(attend(3), outs[3])
    assert not torch.equal(outs[3], outs[4])
    none_left = block_sparse_attention(query, key, value, mask, dropout_p=1.0, backend="cuda")
    assert not none_left.any()
    assert not torch.autograd.grad(none_left.sum(), value)[0].any()


def test_every_replay_of_a_graph_draws_a_new_mask() -> None:
    query, key, value, mask = _linear_case(64)

    def step() -> tuple[Tensor, Tensor]:
        out = block_sparse_attention(query, key, value, mask, dropout_p=0.3, backend="cuda")
        return out, torch.autograd.grad(out, value, torch.ones_like(out))[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grad = step()
    replays = []
    for _ in range(3):
        graph.replay()
        # The output is linear in the values, so its gradient describes the mask that was drawn.
        torch.testing.assert_close(grad.double().sum(), out.double().sum(), rtol=2e-3, atol=0)
        replays.append(out.clone())
    assert not torch.equal(replays[0], replays[1])
    assert not torch.equal(replays[1], replays[2])
