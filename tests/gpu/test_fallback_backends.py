"""The backends that need no compiled kernel, on CUDA: against the oracle, and inside a patched model."""

import pytest
import torch

from sparse_attn_modules import LocalWindow, Random, TokenGrid, block_sparse_attention, patch_model, unpatch_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_cuda(case):
    case = case.to(torch.float64)
    case.mask = case.mask.to("cuda")
    for name in ("query", "key", "value", "key_padding_mask"):
        tensor = getattr(case, name)
        setattr(case, name, None if tensor is None else tensor.cuda())
    if case.relative_position is not None:
        case.relative_position = tuple(tensor.cuda() for tensor in case.relative_position)
    return case


@pytest.mark.parametrize("seed", range(60))
def test_gathered_on_cuda(seed, oracle, drawn_case):
    case = on_cuda(drawn_case(seed)).to(torch.float64, requires_grad=True)
    out, lse = block_sparse_attention(
        case.query, case.key, case.value, case.mask, **case.options, backend="gathered", return_lse=True
    )
    expected, expected_lse = oracle(case)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-10)
    with torch.no_grad():
        plain = block_sparse_attention(case.query, case.key, case.value, case.mask, **case.options, backend="gathered")
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-10)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad(out, case.differentiable, weights)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, case.differentiable, weights)):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_on_cuda(dtype, relative):
    grid = TokenGrid(19, 37, prefix=3)
    mask = Random(0.4, seed=7).mask(grid, 4, device="cuda")
    query, key, value = torch.randn(3, 2, 4, grid.num_tokens, 64, device="cuda", dtype=dtype).unbind(0)
    rel = None
    if relative:
        rel = tuple(
            torch.randn(2, 4, grid.num_tokens, n, device="cuda", dtype=dtype) for n in (grid.height, grid.width)
        )
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out = block_sparse_attention(*inputs, mask, relative_position=rel, backend="flex")
    exact = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    exact_rel = None if rel is None else tuple(tensor.double() for tensor in rel)
    expected = block_sparse_attention(*exact, mask, relative_position=exact_rel, backend="reference")
    low = block_sparse_attention(query, key, value, mask, relative_position=rel, backend="reference")
    allowed = 2 * (low - expected).abs().max() + (2e-2 if dtype == torch.bfloat16 else 1e-3)
    assert (out - expected).abs().max() <= allowed
    weights = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, weights)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, exact, weights.double())):
        assert (grad - expected_grad).abs().max() <= 3e-2 * expected_grad.abs().max()


@pytest.mark.parametrize("backend", [None, "gathered", "flex"])
def test_a_patched_vit_in_inference_then_training(backend):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=512, depth=2).cuda().bfloat16()
    image = torch.randn(2, 3, 512, 512, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = model.eval()(image)
        exact = patch_model(model, backend=backend)(image)
        patch_model(model, LocalWindow(density=0.25), backend=backend)(image)
    torch.testing.assert_close(exact, expected, rtol=0, atol=3e-2 * expected.abs().max().item())
    model.train()
    with torch.autocast("cuda", torch.bfloat16):
        model(image).float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    unpatch_model(model)


def test_dropout_is_the_same_in_backward():
    grid = TokenGrid(32, 32)
    mask = LocalWindow(density=0.5).mask(grid, 2, device="cuda")
    query, key = torch.randn(2, 1, 2, grid.num_tokens, 64, device="cuda").unbind(0)
    value = torch.ones_like(query, requires_grad=True)
    out = block_sparse_attention(query, key, value, mask, dropout_p=0.3)
    (grad,) = torch.autograd.grad(out.sum(), value)
    torch.testing.assert_close((grad * value).sum(), out.sum(), rtol=1e-4, atol=0)
