"""Windows read in place by the compiled kernels, against attention that is computed window by window in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from sparse_attn_modules.backends import cuda
from sparse_attn_modules.modules import SAMAttentionSparse
from sparse_attn_modules.window_attention import why_not_in_place, window_attention

_REASON = cuda.why_not_here()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=f"cuda backend: {_REASON}")]

_WINDOWS = [(14, 14), (14, 14), (8, 8), (7, 10), (16, 16), (8, 16), (3, 5), (20, 33), (1, 1), (5, 50)]
_HEAD_DIMS = [8, 24, 32, 48, 64, 64, 64, 72, 80, 80, 96, 104, 128, 128]


@dataclass
class Case:
    query: Tensor
    key: Tensor
    value: Tensor
    grid: tuple[int, int]
    window: tuple[int, int]
    scale: float | None
    relative_position: tuple[Tensor, Tensor] | None

    def run(self) -> Tensor:
        tensors = self.query, self.key, self.value
        return window_attention(
            *tensors, self.grid, self.window, scale=self.scale, relative_position=self.relative_position
        )

    def to(self, dtype: torch.dtype) -> Case:
        rel = self.relative_position
        tensors = (tensor.to(dtype) for tensor in (self.query, self.key, self.value))
        rel = None if rel is None else (rel[0].to(dtype), rel[1].to(dtype))
        return Case(*tensors, self.grid, self.window, self.scale, rel)


def _tensors(draw: random.Random, batch: int, heads: list[int], tokens: int, width: int, dtype: torch.dtype):
    """Query, key and value: by themselves, or views of one or two projections."""
    options = {"dtype": dtype, "device": "cuda"}
    query_heads, key_heads = heads
    layout = draw.choice(["apart", "key and value fused", "all fused"])
    if layout == "apart":
        return [torch.randn(batch, count, tokens, width, **options) for count in (query_heads, key_heads, key_heads)]
    if layout == "key and value fused":
        query = torch.randn(batch, tokens, query_heads, width, **options)
        both = torch.randn(batch, tokens, 2, key_heads, width, **options)
        return [query.transpose(1, 2), *(part.transpose(1, 2) for part in both.unbind(2))]
    fused = torch.randn(batch, tokens, query_heads + 2 * key_heads, width, **options)
    return [part.transpose(1, 2) for part in fused.split([query_heads, key_heads, key_heads], dim=2)]


def _case(seed: int) -> Case:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype, window = draw.choice([torch.bfloat16, torch.float16]), draw.choice(_WINDOWS)
    grid = draw.randint(1, 40), draw.randint(1, 40)
    batch, key_heads, tokens = draw.choice([1, 1, 2, 3]), draw.choice([1, 2, 3]), grid[0] * grid[1]
    heads = key_heads * draw.choice([1, 1, 1, 2])
    relative = None
    if draw.random() < 0.6:
        # Rows begin at multiples of 16 bytes, as those of products with the tables do; or anywhere.
        widths = [-(-size // 8) * 8 if draw.random() < 0.8 else size for size in window]
        rels = (torch.randn(batch, tokens, heads, width, dtype=dtype, device="cuda") for width in widths)
        relative = tuple(rel[..., :size].transpose(1, 2) for rel, size in zip(rels, window))
    tensors = _tensors(draw, batch, [heads, key_heads], tokens, draw.choice(_HEAD_DIMS), dtype)
    return Case(*tensors, grid, window, draw.choice([None, 0.3]), relative)


def _window_by_window(case: Case) -> Tensor:
    """Plain attention in the dtype of the case."""
    (height, width), (rows, columns) = case.grid, case.window
    group = case.query.shape[1] // case.key.shape[1]
    shape = (*case.query.shape[:2], height, width, -1)
    query, key, value = (
        tensor.reshape(*tensor.shape[:2], height, width, -1).repeat_interleave(query_heads, 1)
        for tensor, query_heads in ((case.query, 1), (case.key, group), (case.value, group))
    )
    scale = query.shape[-1] ** -0.5 if case.scale is None else case.scale
    out = torch.empty_like(query)
    for top, left in product(range(0, height, rows), range(0, width, columns)):
        inside = (..., slice(top, top + rows), slice(left, left + columns), slice(None))
        cut = query[inside].flatten(2, 3)
        keys, values = (tensor.new_zeros(*shape[:2], rows, columns, query.shape[-1]) for tensor in (key, value))
        for whole, part in ((keys, key[inside]), (values, value[inside])):
            whole[:, :, : part.shape[2], : part.shape[3]] = part
        logits = cut @ keys.flatten(2, 3).mT * scale
        if case.relative_position is not None:
            rel_h, rel_w = (rel.reshape(*shape)[inside].flatten(2, 3) for rel in case.relative_position)
            logits = logits + (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
        out[inside] = (logits.softmax(-1) @ values.flatten(2, 3)).view_as(out[inside])
    return out.flatten(2, 3)


def _check(case: Case) -> None:
    out, expected = case.run(), _window_by_window(case.to(torch.float64))
    tolerance = 2 * (_window_by_window(case).double() - expected).abs().max() + 1e-5
    assert torch.isfinite(out).all()
    assert (out.double() - expected).abs().max() <= tolerance
    assert torch.equal(out, case.run())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_matches_attention_window_by_window(first: int) -> None:
    for seed in range(first, first + 20):
        try:
            _check(_case(seed))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relative", [False, True])
def test_the_windows_of_segment_anything(head_dim: int, dtype: torch.dtype, relative: bool) -> None:
    torch.manual_seed(head_dim)
    options = {"dtype": dtype, "device": "cuda"}
    query = torch.randn(2, 4096, 3, head_dim, **options).transpose(1, 2)
    key, value = (part.transpose(1, 2) for part in torch.randn(2, 4096, 2, 3, head_dim, **options).unbind(2))
    rels = (torch.randn(2, 4096, 3, 16, **options)[..., :14].transpose(1, 2) for _ in "hw")
    _check(Case(query, key, value, (64, 64), (14, 14), None, tuple(rels) if relative else None))


@pytest.mark.parametrize("head_dim", [64, 80])
def test_maxima_that_grow_past_the_first_block(head_dim: int) -> None:
    """Where weights relative to an early maximum overflow, a window starts again; its neighbours do not."""
    torch.manual_seed(0)
    grid, window = (30, 30), (14, 14)
    query, key, value = (torch.randn(1, 2, 900, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    query[..., 0] = 4 * head_dim**0.5
    key.view(1, 2, *grid, head_dim)[:, 1, 8:14, :20, 0] = 60
    case = Case(query, key, value, grid, window, None, None)
    out, expected = case.run(), _window_by_window(case.to(torch.float64))
    assert torch.isfinite(out).all()
    assert (out.double() - expected).abs().max() <= 0.04


@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graph_and_compilation(compiled: bool) -> None:
    case = _case(3)
    run = torch.compile(_run, fullgraph=True, backend="aot_eager") if compiled else _run
    with torch.no_grad():
        expected = case.run()
        run(case.query, case.key, case.value, case.grid, case.window, case.relative_position)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(case.query, case.key, case.value, case.grid, case.window, case.relative_position)
    out.zero_()
    graph.replay()
    if case.scale is None:
        assert torch.equal(out, expected)
    assert out.stride() == expected.stride()


def _run(query: Tensor, key: Tensor, value: Tensor, grid, window, relative_position) -> Tensor:
    return window_attention(query, key, value, grid, window, relative_position=relative_position)


def test_the_operator_keeps_its_promises() -> None:
    case = replace(_case(3), scale=0.3)
    rel_h, rel_w = case.relative_position or (None, None)
    arguments = case.query, case.key, case.value, rel_h, rel_w, case.grid, case.window, 0.3
    torch.library.opcheck(torch.ops.sparse_attn_modules.window_attention.default, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_layer_reads_in_place_what_it_would_copy(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer = SAMAttentionSparse(128, 2, use_rel_pos=True, input_size=(14, 14)).to("cuda", dtype).eval()
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "rel_pos" in name else 0.1)
    x = torch.randn(3, 19, 31, 128, device="cuda", dtype=dtype)
    copied = layer(x, window_size=14)
    assert copied.requires_grad
    with torch.no_grad():
        in_place = layer(x, window_size=14)
    # Windows end in other tiles than a sequence of the same keys, so sums are rounded in another order.
    assert (in_place - copied).abs().max() <= 2e-2 * copied.abs().max()
    copied.sum().backward()


def test_says_why_not() -> None:
    case = replace(_case(3), scale=None)
    arguments = case.query, case.key, case.value, case.grid, case.window
    assert why_not_in_place(*arguments, scale=1.0) is None
    assert why_not_in_place(*arguments, scale=-1.0) == "scale must be positive, got -1.0"
    assert "gradients" in why_not_in_place(case.query.requires_grad_(), *arguments[1:], scale=1.0)
    case.query.requires_grad_(False)
    with pytest.raises(
        ValueError, match="window_attention: arguments must be such .*it computes in float16 and bfloat16"
    ):
        case.to(torch.float32).run()
    with pytest.raises(ValueError, match=r"window_attention: query must have 3 × 3 tokens"):
        window_attention(*arguments[:3], (3, 3), (2, 2))
