"""Gradients of the compiled kernels against autograd through plain attention in float64, over random geometry."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from sparse_attn_modules import BlockMask, LocalWindow, TokenGrid, block_sparse_attention, patch_model
from sparse_attn_modules.backends import cuda, gathered

_REASON = cuda.why_not_here()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=f"cuda backend: {_REASON}")]

_NAMES = ("query", "key", "value", "rel_h", "rel_w")


@pytest.fixture(autouse=True)
def _pair_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that another backend computed would prove nothing; the fused kernel has tests of its own."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("the gathered backend was called")

    monkeypatch.setattr(gathered, "backward", refuse)
    monkeypatch.setattr(cuda, "_fuses", lambda inputs: False)


def _loss(out: Tensor, lse: Tensor, weights: Tensor, lse_weights: Tensor | None) -> Tensor:
    loss = (out * weights.to(out.dtype)).sum()
    if lse_weights is not None:
        loss = loss + (lse.masked_fill(lse.isinf(), 0) * lse_weights.to(lse.dtype)).sum()
    return loss


def _grads(case, weights: Tensor, lse_weights: Tensor | None, oracle=None) -> list[Tensor]:
    """By the oracle in the dtype of the case if there is one, else by the kernels."""
    if oracle is not None:
        out, lse = oracle(case)
    else:
        out, lse = block_sparse_attention(
            case.query, case.key, case.value, case.mask, **case.options, backend="cuda", return_lse=True
        )
    return list(torch.autograd.grad(_loss(out, lse, weights, lse_weights), case.differentiable))


def _check(case, oracle, with_lse: bool) -> None:
    dtype = case.query.dtype
    weights = torch.randn_like(case.query)
    lse_weights = torch.randn(case.query.shape[:3], device="cuda") if with_lse else None
    leaves = case.to(dtype, requires_grad=True)
    # The layouts drawn survive `to`, as the dtype is the same.
    ours = _grads(leaves, weights, lse_weights)
    again = _grads(leaves, weights, lse_weights)
    low = _grads(leaves, weights, lse_weights, oracle)
    expected = _grads(case.to(torch.float64, requires_grad=True), weights.double(), lse_weights, oracle)
    for name, grad, repeated, low_grad, expected_grad in zip(_NAMES, ours, again, low, expected):
        assert torch.isfinite(grad).all(), name
        tolerance = 3 * (low_grad.double() - expected_grad).abs().max() + 1e-5
        error = (grad.double() - expected_grad).abs().max()
        assert error <= tolerance, f"{name}: {error} > {tolerance}"
        assert torch.equal(grad, repeated), f"{name} differs when repeated"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("first", range(0, 400, 20))
def test_matches_autograd_on_random_geometry(first: int, drawn_cuda_case, oracle) -> None:
    for seed in range(first, first + 20):
        try:
            _check(drawn_cuda_case(seed), oracle, with_lse=seed % 3 == 0)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_blocks_per_row(head_dim: int, dtype: torch.dtype, relative: bool, drawn_cuda_case, oracle) -> None:
    """More blocks than the 32 that a warp holds at once, of keys and of queries."""
    torch.manual_seed(head_dim)
    case = drawn_cuda_case(0)
    grid = TokenGrid(9 * 8 - 3, 6 * 16 + 2, prefix=2)
    blocks = torch.rand(1, 2, grid.num_blocks, grid.num_blocks, device="cuda") < 0.7
    case.query, case.key, case.value = (
        torch.randn(1, 2, grid.num_tokens, head_dim, device="cuda", dtype=dtype) for _ in range(3)
    )
    case.mask, case.key_padding_mask, case.relative_position = BlockMask(blocks, grid), None, None
    if relative:
        case.relative_position = tuple(
            torch.randn(1, 2, grid.num_tokens, size, device="cuda", dtype=dtype) for size in (grid.height, grid.width)
        )
    _check(case, oracle, with_lse=True)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("key_heads", [16, 4])
@pytest.mark.parametrize("head_dim", [32, 64, 72, 80, 96, 128])
def test_thread_blocks_that_stay_for_many_rows(head_dim: int, key_heads: int, drawn_cuda_case, oracle) -> None:
    """More rows than multiprocessors, of unequal length, some empty; keys that many, few or no queries attend to."""
    torch.manual_seed(head_dim)
    case = drawn_cuda_case(0)
    grid = TokenGrid(8 * 8 - 3, 2 * 16 - 1, prefix=3)
    blocks = torch.rand(4, 16, grid.num_blocks, grid.num_blocks, device="cuda")
    blocks = blocks < torch.linspace(0.1, 0.9, grid.num_blocks, device="cuda")
    blocks[:, :, :, 1::5] = False
    blocks[:, 3::4, 2::3] = False
    blocks[1, :5] = False
    case.query, case.key, case.value = (
        torch.randn(4, heads, grid.num_tokens, head_dim, device="cuda", dtype=torch.bfloat16)
        for heads in (16, key_heads, key_heads)
    )
    case.mask, case.relative_position = BlockMask(blocks, grid), None
    case.key_padding_mask = torch.rand(4, grid.num_tokens, device="cuda") < 0.2
    _check(case, oracle, with_lse=True)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_long_runs_of_rows_without_keys(head_dim: int) -> None:
    """Nothing may wait for what such rows do not need, nor run ahead of what they do not wait for."""
    grid = TokenGrid(8 * 8 - 3, 2 * 16 - 1, prefix=3)
    blocks = torch.zeros(8, 16, grid.num_blocks, grid.num_blocks, dtype=torch.bool, device="cuda")
    some = (6, 13)
    blocks[some] = torch.rand(grid.num_blocks, grid.num_blocks, device="cuda") < 0.5
    blocks[some][:5] = False
    tensors = [torch.randn(8, 16, grid.num_tokens, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)]

    def grads(part: tuple[slice, slice]) -> tuple[Tensor, ...]:
        *leaves, grad_out = (tensor[part].detach().requires_grad_() for tensor in tensors)
        out = block_sparse_attention(*leaves, BlockMask(blocks[part], grid), backend="cuda")
        return torch.autograd.grad(out, leaves, grad_out.detach())

    alone = grads(tuple(slice(i, i + 1) for i in some))
    for _ in range(30):
        for grad, expected in zip(grads((slice(None), slice(None))), alone):
            assert torch.equal(grad[some], expected[0, 0])
            grad[some] = 0
            assert not grad.any()


@pytest.mark.parametrize("scale", [-0.2, 0.0, 1e-3])
def test_any_scale(scale: float, drawn_cuda_case, oracle) -> None:
    case = drawn_cuda_case(5)
    case.scale = scale
    _check(case, oracle, with_lse=True)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_nothing_attended_gives_zeros(head_dim: int, relative: bool) -> None:
    grid = TokenGrid(13, 21, prefix=1)
    mask = BlockMask(torch.zeros(1, 1, grid.num_blocks, grid.num_blocks, dtype=torch.bool, device="cuda"), grid)
    widths = [head_dim] * 3 + ([13, 21] if relative else [])
    leaves = [
        torch.randn(2, 3, grid.num_tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for width in widths
    ]
    out = block_sparse_attention(
        *leaves[:3], mask, relative_position=tuple(leaves[3:]) if relative else None, backend="cuda"
    )
    for grad in torch.autograd.grad(out, leaves, torch.randn_like(out)):
        assert not grad.any()


class _Step:
    """A fixed training step; one call returns all gradients."""

    def __init__(self, head_dim: int = 64, seed: int = 0, relative: bool = True) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        grid = TokenGrid(40, 40, prefix=1)
        # Without a relative position thread blocks stay for several blocks of queries or keys, if there are enough.
        batch, heads = (2, 4) if relative else (4, 8)
        blocks = torch.rand(1, heads, grid.num_blocks, grid.num_blocks, device="cuda", generator=generator) < 0.5
        self.mask = BlockMask(blocks, grid)
        widths = [head_dim] * 3 + ([40, 40] if relative else []) + [head_dim]
        shapes = [(batch, heads, grid.num_tokens, width) for width in widths]
        *self.leaves, self.grad_out = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for shape in shapes
        )
        for leaf in self.leaves:
            leaf.requires_grad_()

    def forward(self, *leaves: Tensor) -> Tensor:
        return block_sparse_attention(*leaves[:3], self.mask, relative_position=leaves[3:] or None, backend="cuda")

    def __call__(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(*self.leaves), self.leaves, self.grad_out)


def _equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_thousand_runs_are_one(head_dim: int, relative: bool) -> None:
    step = _Step(head_dim, relative=relative)
    first = step()
    deviations = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for grad, expected in zip(step(), first):
            deviations += (grad != expected).sum()
    assert int(deviations) == 0


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_two_streams_and_threads(head_dim: int, relative: bool) -> None:
    steps = [_Step(head_dim, seed, relative) for seed in range(2)]
    expected = [step() for step in steps]
    torch.cuda.synchronize()

    def repeat(index: int) -> bool:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [steps[index]() for _ in range(20)]
        stream.synchronize()
        return all(_equal(result, expected[index]) for result in results)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(repeat, range(2)))


@pytest.mark.parametrize("relative", [True, False])
def test_cuda_graph_of_a_training_step(relative: bool) -> None:
    step = _Step(relative=relative)
    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = step()
    for grad in grads:
        grad.fill_(torch.nan)
    graph.replay()
    assert _equal(grads, expected)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_training_step(compiler: str) -> None:
    step = _Step()
    expected = step()
    compiled = torch.compile(step.forward, fullgraph=True, backend=compiler)
    grads = torch.autograd.grad(compiled(*step.leaves), step.leaves, step.grad_out)
    assert _equal(grads, expected)


def test_patched_vit_block_by_finite_differences() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=384, depth=1, num_classes=0).cuda().eval()
    patch_model(model, LocalWindow(density=0.5), backend="cuda")
    block = model.blocks[0]
    with torch.no_grad():
        block.attn.qkv.weight.mul_(4)  # logits that matter
    tokens = torch.randn(2, 24 * 24 + 1, 192, device="cuda")
    weights = torch.randn_like(tokens)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.float16):
        model(torch.randn(2, 3, 384, 384, device="cuda"))  # tells the block its grid

    def loss() -> Tensor:
        with torch.autocast("cuda", dtype=torch.float16):
            return (block(tokens).double() * weights).sum()

    parameters = dict(block.attn.named_parameters())
    names = ("qkv.weight", "qkv.bias")
    grads = torch.autograd.grad(loss(), [parameters[name] for name in names])
    for name, grad in zip(names, grads):
        parameter = parameters[name].detach()
        for part in range(3):  # queries, keys, values
            rows = slice(part * 192, part * 192 + 192)
            direction = torch.zeros_like(grad)
            direction[rows] = grad[rows] / grad[rows].norm()
            slope = float(grad[rows].norm())
            if name == "qkv.bias" and part == 1:
                assert slope < 1e-2 * float(grad.norm())  # a bias of all keys changes no weight
                continue

            def shifted(distance: float, parameter: Tensor = parameter, direction: Tensor = direction) -> float:
                parameter.add_(direction, alpha=distance)
                with torch.no_grad():
                    value = float(loss())
                parameter.sub_(direction, alpha=distance)
                return value

            step = 0.02 * max(float(parameter[rows].norm()), 5.0)
            near, far = (shifted(distance) - shifted(-distance) for distance in (step, 2 * step))
            measured = (8 * near - far) / (12 * step)  # error of the fourth order
            assert measured == pytest.approx(slope, rel=0.03), (name, part)
