"""Dropout of attention weights: one mask on every backend, with the statistics of independent draws."""

from __future__ import annotations

import pytest
import torch

from sparse_attn_modules import BlockMask, TokenGrid, block_sparse_attention
from sparse_attn_modules.backends.dropout import drop_threshold, dropout_factors, inverse_keep, row_hashes

SEED = torch.tensor([0x1234_5678_9ABC_DEF])


def mix(word: int) -> int:
    """The same finaliser in Python's integers."""
    word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
    word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
    return word ^ word >> 16


def test_mask_is_the_function_that_kernels_compute():
    heads, queries, keys = torch.arange(3)[:, None, None], torch.arange(50)[:, None], torch.arange(70)
    factors = dropout_factors(row_hashes(SEED, heads, queries), keys, 0.4, torch.float64)
    seed = int(SEED)
    for head, query, key in ((0, 0, 0), (2, 49, 69), (1, 7, 33), (2, 0, 69)):
        word = mix((seed % 2**32 + 0x9E3779B1) % 2**32)
        for part in (seed >> 32, head, query):
            word = mix(word ^ part)
        kept = mix((word + key * 0x9E3779B1) % 2**32) >> 8 >= drop_threshold(0.4)
        assert factors[head, query, key] == (inverse_keep(0.4) if kept else 0)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_statistics_of_the_mask(dropout_p):
    heads, queries, keys = torch.arange(4)[:, None, None], torch.arange(512)[:, None], torch.arange(512)
    seeds = torch.randint(2**62, (2,))
    kept = torch.stack(
        [dropout_factors(row_hashes(seed[None], heads, queries), keys, dropout_p, torch.float64) > 0 for seed in seeds]
    ).double()
    count = kept.numel()
    deviation = (dropout_p * (1 - dropout_p)) ** 0.5
    assert abs(kept.mean() - (1 - dropout_p)) < 5 * deviation / count**0.5
    # Means of rows and of columns scatter as those of independent draws do.
    for dim in (2, 3):
        scatter = kept.mean(dim).std() / (deviation / 512**0.5)
        assert scatter == pytest.approx(1, abs=0.1)
    # Neighbours along every axis, and far ones, know nothing of each other.
    noise = (kept - (1 - dropout_p)) / deviation  # [seeds, heads, queries, keys]
    for dim, size in enumerate(kept.shape):
        for shift in {1, 2, 16, 128, 255} & set(range(size)):
            first, second = noise.narrow(dim, 0, size - shift), noise.narrow(dim, shift, size - shift)
            assert abs((first * second).mean()) < 5 / first.numel() ** 0.5, (dim, shift)


def test_keep_probability_is_exact():
    assert inverse_keep(0.5) == 2
    assert inverse_keep(1.0) == 0
    assert inverse_keep(1e-9) == 1
    assert drop_threshold(1.0) == 2**24


@pytest.mark.parametrize("seed", range(30))
def test_backends_drop_the_same_weights(seed, drawn_case):
    results = []
    weights = None
    for backend in ("reference", "gathered"):
        case = drawn_case(seed).to(torch.float64, requires_grad=True)
        torch.manual_seed(seed)
        out, lse = block_sparse_attention(
            case.query, case.key, case.value, case.mask, **case.options, dropout_p=0.4, backend=backend, return_lse=True
        )
        if weights is None:
            weights = torch.randn_like(out)
        grads = torch.autograd.grad((out * weights).sum(), case.differentiable)
        results.append((out, lse, *grads))
    for expected, other in zip(*results):
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "gathered"])
def test_dense_mask_drops_too(backend):
    grid = TokenGrid(6, 7, prefix=1, tile=(2, 4))
    query, key = torch.randn(2, 2, 3, grid.num_tokens, 5, dtype=torch.float64).unbind(0)
    value = torch.eye(grid.num_tokens, dtype=torch.float64).expand(2, 3, -1, -1)
    results = {}
    for name, mask in (
        ("dense", BlockMask.dense(grid)),
        ("sparse", BlockMask(torch.ones(2, 3, grid.num_blocks, grid.num_blocks, dtype=torch.bool), grid)),
    ):
        torch.manual_seed(1)
        wide = [torch.nn.functional.pad(tensor, (0, grid.num_tokens - 5)) for tensor in (query, key)]
        results[name] = block_sparse_attention(*wide, value, mask, dropout_p=0.25, backend=backend)
    torch.testing.assert_close(results["dense"], results["sparse"], rtol=0, atol=1e-12)
    assert (results["dense"] == 0).double().mean() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("backend", ["reference", "gathered"])
def test_gradcheck_with_dropout(backend, drawn_case):
    case = drawn_case(4).to(torch.float64, requires_grad=True)

    def attend(query, key, value, *relative):
        torch.manual_seed(7)
        return block_sparse_attention(
            query, key, value, case.mask, relative_position=relative or None, dropout_p=0.3, backend=backend
        )

    assert torch.autograd.gradcheck(attend, case.differentiable, fast_mode=True)
