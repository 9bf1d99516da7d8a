"""Every backend that runs on a CPU computes what the oracle says, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from sparse_attn_modules import BlockMask, LocalWindow, TokenGrid, block_sparse_attention, notices
from sparse_attn_modules.backends import BACKENDS, AttentionInputs, Request, flex, select_backend

ON_CPU = ["reference", "gathered"]
SEEDS = st.integers(0, 2**32 - 1)


def run(case, backend):
    return block_sparse_attention(
        case.query, case.key, case.value, case.mask, **case.options, backend=backend, return_lse=True
    )


def as_inputs(case, scale):
    mask = case.mask
    return AttentionInputs(
        case.query,
        case.key,
        case.value,
        mask.blocks,
        mask.key_counts,
        mask.key_indices,
        mask.row_order,
        None,
        None,
        *(case.relative_position or (None, None)),
        case.key_padding_mask,
        None,
        mask.query_grid,
        mask.key_grid,
        scale,
        0.0,
        False,
    )


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=120, deadline=None)
@given(seed=SEEDS)
def test_matches_the_oracle_in_float64(backend, seed, oracle, drawn_case):
    case = drawn_case(seed).to(torch.float64, requires_grad=True)
    out, lse = run(case, backend)
    expected, expected_lse = oracle(case)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-11)
    assert out.transpose(1, 2).is_contiguous()
    with torch.no_grad():  # the path without log-sum-exp is another one
        without_lse = block_sparse_attention(
            case.query, case.key, case.value, case.mask, **case.options, backend=backend
        )
    torch.testing.assert_close(without_lse, expected, rtol=0, atol=1e-11)

    weights, lse_weights = torch.randn_like(out), torch.randn_like(lse)
    finite = ~torch.isinf(expected_lse)
    grads = torch.autograd.grad((out * weights).sum() + (lse * lse_weights)[finite].sum(), case.differentiable)
    expected_grads = torch.autograd.grad(
        (expected * weights).sum() + (expected_lse * lse_weights)[finite].sum(), case.differentiable
    )
    for grad, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_error_is_within_twice_that_of_plain_attention(backend, dtype, seed, oracle, drawn_case):
    case = drawn_case(seed).to(dtype, requires_grad=True)
    exact = case.to(torch.float64, requires_grad=True)
    plain = case.to(dtype, requires_grad=True)
    out, _ = run(case, backend)
    expected, _ = oracle(exact)
    low, _ = oracle(plain)
    assert out.dtype == dtype
    error, allowed = (out - expected).abs().max(), 2 * (low - expected).abs().max() + 1e-5
    assert error <= allowed

    weights = torch.randn_like(out)
    grads = torch.autograd.grad(out, case.differentiable, weights)
    exact_grads = torch.autograd.grad(expected, exact.differentiable, weights.double())
    low_grads = torch.autograd.grad(low, plain.differentiable, weights)
    for grad, exact_grad, low_grad in zip(grads, exact_grads, low_grads):
        assert (grad - exact_grad).abs().max() <= 3 * (low_grad - exact_grad).abs().max() + 1e-4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_flex_says_the_same_uncompiled(seed, oracle, drawn_case):
    case = drawn_case(seed, block=(4, 4))
    scale = 0.4
    case.scale = scale
    case = case.to(torch.float32)
    out, lse = flex.attend(as_inputs(case, scale), flex_attention)
    expected, expected_lse = oracle(case.to(torch.float64))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)


def test_nothing_of_skipped_tokens_reaches_ragged_rows():
    grid = TokenGrid(1, 11, tile=(1, 4))
    blocks = torch.tensor([[0, 1, 1], [0, 1, 0], [1, 1, 0]], dtype=torch.bool)
    query, key, value = torch.randn(3, 1, 1, 11, 4).unbind(0)
    key[..., 0, :] = value[..., 0, :] = torch.nan
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out = block_sparse_attention(*inputs, BlockMask(blocks, grid), backend="gathered")
    assert out[0, 0, :8].isfinite().all()
    assert out[0, 0, 8:].isnan().all()
    out[0, 0, :8].sum().backward()
    assert inputs[0].grad[0, 0, :8].isfinite().all()
    with torch.no_grad():
        out = block_sparse_attention(query, key, value, BlockMask(blocks, grid), backend="gathered")
    assert out[0, 0, :8].isfinite().all()


def test_gathered_reads_only_active_blocks():
    grid = TokenGrid(32, 32)
    mask = LocalWindow(density=0.25).mask(grid, 2)
    query, key, value = (torch.randn(1, 2, grid.num_tokens, 8) for _ in range(3))
    expected = block_sparse_attention(query, key, value, mask, backend="gathered")
    never_seen_by_first_block = ~mask.token_mask()[0, 0, 0]
    key[:, :, never_seen_by_first_block] = torch.nan
    value[:, :, never_seen_by_first_block] = torch.nan
    out = block_sparse_attention(query, key, value, mask, backend="gathered")
    first_block = grid.block_of_token() == 0
    torch.testing.assert_close(out[:, :, first_block], expected[:, :, first_block])
    assert out.isnan().any()  # other blocks do see them


@pytest.mark.parametrize("backend", ON_CPU)
def test_dropout_keeps_the_mean_and_repeats_in_backward(backend):
    grid = TokenGrid(8, 8, prefix=1, tile=(4, 4))
    mask = LocalWindow(density=0.5).mask(grid, 2)
    query, key = (torch.randn(1, 2, grid.num_tokens, 8, dtype=torch.float64) for _ in range(2))
    value = torch.ones(1, 2, grid.num_tokens, 8, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(3)
    outs = torch.stack(
        [block_sparse_attention(query, key, value, mask, dropout_p=0.3, backend=backend) for _ in range(300)]
    )
    assert abs(outs.mean().item() - 1) < 0.02
    assert outs.std(0).min() > 0.01
    # The output is linear in the values, so the gradient must describe the very mask that was drawn.
    out = outs[0]
    (grad,) = torch.autograd.grad(out.sum(), value)
    torch.testing.assert_close((grad * value).sum(), out.sum())

    torch.manual_seed(3)
    again = block_sparse_attention(query, key, value, mask, dropout_p=0.3, backend=backend)
    torch.testing.assert_close(again, outs[0], rtol=0, atol=0)
    none_left = block_sparse_attention(query, key, value, mask, dropout_p=1.0, backend=backend)
    assert (none_left == 0).all()


def test_dense_mask_is_scaled_dot_product_attention():
    grid = TokenGrid(7, 9, prefix=2, tile=(4, 4))
    query = torch.randn(2, 4, grid.num_tokens, 16)
    key, value = torch.randn(2, 2, 2, grid.num_tokens, 16).unbind(0)
    out = block_sparse_attention(query, key, value, BlockMask.dense(grid), backend="gathered")
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def request(**changes):
    values = {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "head_dim": 64,
        "query_grid": TokenGrid(8, 16),
        "key_grid": TokenGrid(8, 16),
    }
    return Request(**{**values, **changes})


def test_selection_prefers_gathered_on_a_cpu():
    assert select_backend(request()) == "gathered"
    for name in ON_CPU:
        assert select_backend(request(), name) == name


def test_selection_names_the_reason():
    with pytest.raises(ValueError, match="backend must be one of"):
        select_backend(request(), "triton")
    with pytest.raises(ValueError, match="backend 'cuda' cannot run: it needs CUDA tensors, got cpu"):
        select_backend(request(), "cuda")
    with pytest.raises(ValueError, match="backend 'flex' cannot run: it needs CUDA tensors"):
        select_backend(request(), "flex")
    on_cuda = {"device": torch.device("cuda", 0)}
    with pytest.raises(ValueError, match="'flex' cannot run: it has no torch.float64"):
        select_backend(request(**on_cuda, dtype=torch.float64), "flex")
    with pytest.raises(ValueError, match="power of two"):
        select_backend(request(**on_cuda, query_grid=TokenGrid(9, 9, tile=(3, 3))), "flex")


def test_when_nothing_can_run_every_reason_is_listed(monkeypatch):
    for name, backend in BACKENDS.items():
        monkeypatch.setattr(backend, "why_not", lambda request, name=name: f"{name} is out")
    with pytest.raises(ValueError, match="no backend can run") as error:
        select_backend(request())
    for name in BACKENDS:
        assert f"{name}: {name} is out" in str(error.value)


def test_a_slower_fallback_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(notices, "_said", set())
    monkeypatch.setattr(BACKENDS["cuda"], "why_not", lambda request: "not built here")
    monkeypatch.setattr(BACKENDS["flex"], "why_not", lambda request: "no triton here")
    for _ in range(3):
        assert select_backend(request(device=torch.device("cuda", 0))) == "gathered"
    assert len(caplog.records) == 1
    assert "not built here" in caplog.text
    assert "no triton here" in caplog.text
