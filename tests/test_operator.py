"""A real torch operator: opcheck, compile, export, gradcheck, one order of gradients."""

import threading
from dataclasses import dataclass, field

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_attn_modules import BlockMask, Dense, LocalWindow, Pattern, Random, TokenGrid, block_sparse_attention
from sparse_attn_modules.modules import SparseAttention
from sparse_attn_modules.patterns.traced import register_for_tracing

GRID = TokenGrid(6, 7, prefix=1, tile=(2, 4))
MASK = Random(0.4).mask(GRID, 2)


def inputs(dtype=torch.float64, requires_grad=True, batch=1):
    return [torch.randn(batch, 2, GRID.num_tokens, 4, dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


def relative_position(dtype=torch.float64):
    return tuple(
        torch.randn(1, 2, GRID.num_tokens, size, dtype=dtype, requires_grad=True) for size in (GRID.height, GRID.width)
    )


def operator_arguments(query, key, value, rel_h=None, rel_w=None, backend="gathered", with_lse=True):
    mask = MASK
    return (
        query,
        key,
        value,
        mask.blocks,
        mask.key_counts,
        mask.key_indices,
        mask.row_order,
        mask.query_counts,
        mask.query_indices,
        rel_h,
        rel_w,
        None,
        None,
        mask.query_grid.pack(),
        mask.key_grid.pack(),
        0.5,
        0.0,
        False,
        None,
        backend,
        with_lse,
    )


@pytest.mark.parametrize("backend", ["reference", "gathered"])
@pytest.mark.parametrize("with_relative_position", [False, True])
def test_opcheck(backend, with_relative_position):
    rel = relative_position() if with_relative_position else (None, None)
    arguments = operator_arguments(*inputs(), *rel, backend=backend)
    torch.library.opcheck(torch.ops.sparse_attn_modules.attention_forward.default, arguments)


def test_opcheck_of_the_traced_mask():
    name = register_for_tracing(Random(0.4))
    arguments = (name, GRID.pack(), GRID.pack(), 2, torch.device("cpu"))
    torch.library.opcheck(torch.ops.sparse_attn_modules.pattern_mask.default, arguments)


@pytest.mark.parametrize("backend", ["reference", "gathered"])
def test_gradcheck(backend):
    rel_h, rel_w = relative_position()
    padding = torch.zeros(1, GRID.num_tokens, dtype=torch.bool)
    padding[:, ::5] = True

    def attend(query, key, value, rel_h, rel_w):
        return block_sparse_attention(
            query, key, value, MASK, relative_position=(rel_h, rel_w), key_padding_mask=padding, backend=backend
        )

    assert torch.autograd.gradcheck(attend, (*inputs(), rel_h, rel_w), fast_mode=True)


def test_double_backward_is_refused():
    query, key, value = inputs()
    out = block_sparse_attention(query, key, value, MASK)
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="block_sparse_attention: gradients must be of first order"):
        grad.sum().backward()


def test_forward_mode_is_refused():
    query, key, value = inputs(requires_grad=False)

    def attend(query):
        return block_sparse_attention(query, key, value, MASK)

    for refused in (
        lambda: torch.func.jvp(attend, (query,), (torch.ones_like(query),)),
        lambda: torch.autograd.functional.jvp(attend, query, torch.ones_like(query), strict=True),
    ):
        with pytest.raises(RuntimeError, match="block_sparse_attention: gradients must be"):
            refused()


def test_only_log_sum_exp_may_be_differentiated():
    query, key, value = inputs()
    _, lse = block_sparse_attention(query, key, value, MASK, return_lse=True)
    grads = torch.autograd.grad(lse.sum(), [query, key, value])
    assert grads[0].abs().max() > 0
    assert (grads[2] == 0).all()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_forward_and_backward(backend):
    def attend(query, key, value, mask):
        return block_sparse_attention(query, key, value, mask).square()

    query, key, value = inputs(torch.float32)
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    out, expected = compiled(query, key, value, MASK), attend(query, key, value, MASK)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.sum(), [query, key, value])
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.sum(), [query, key, value])):
        torch.testing.assert_close(grad, expected_grad)


def test_another_mask_of_the_same_geometry_does_not_recompile():
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def attend(query, key, value, blocks):
        return block_sparse_attention(query, key, value, BlockMask(blocks, GRID))

    query, key, value = inputs(torch.float32)
    for seed in range(4):
        blocks = torch.rand(2, GRID.num_blocks, GRID.num_blocks, generator=torch.Generator().manual_seed(seed)) < 0.5
        out = attend(query, key, value, blocks)
        torch.testing.assert_close(out, block_sparse_attention(query, key, value, BlockMask(blocks, GRID)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_scales_and_sizes_may_change_under_compile(dynamic):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def attend(query, key, value, scale):
        return block_sparse_attention(query, key, value, MASK, scale=scale)

    for batch, scale in ((1, 0.5), (2, 0.25), (3, 0.7)):
        query, key, value = inputs(torch.float32, batch=batch)
        expected = block_sparse_attention(query, key, value, MASK, scale=scale)
        torch.testing.assert_close(attend(query, key, value, scale), expected)


class Layer(SparseAttention):
    """Attention of an image [B, H, W, C] to itself, with two heads."""

    def forward(self, image):
        height, width = image.shape[1:3]
        tokens = image.flatten(1, 2).unflatten(-1, (2, -1)).transpose(1, 2)
        return self.attend(tokens, tokens, tokens, TokenGrid(height, width, tile=(2, 4)))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("pattern", [Dense(), LocalWindow(density=0.5), Random(0.5)])
def test_a_module_compiles_over_changing_grids(pattern, dynamic):
    torch.compiler.reset()
    layer = Layer(pattern)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for height, width in ((5, 7), (6, 6), (5, 7), (9, 4)):
        image = torch.randn(2, height, width, 8)
        # Compiled first, so that no mask has been made for this grid outside of it.
        torch.testing.assert_close(compiled(image), layer(image))
    torch.compiler.reset()


def test_patterns_that_look_alike_are_told_apart():
    @dataclass(frozen=True)
    class Quiet(Pattern):
        reach: int = field(repr=False)

        def image_blocks(self, query_grid, key_grid, num_heads):
            tiles = torch.arange(query_grid.num_tiles)
            return ((tiles[:, None] - tiles).abs() <= self.reach)[None]

    image = torch.randn(1, 6, 8, 8)
    for reach in (0, 2):
        layer = Layer(Quiet(reach))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image), Layer(Quiet(reach))(image))
    torch.compiler.reset()


def test_a_layer_checks_its_options_when_it_is_made():
    with pytest.raises(ValueError, match="Layer: backend must be one of .* got 'nope'"):
        Layer(backend="nope")
    with pytest.raises(TypeError, match="Layer: compute_dtype must be a dtype or None, got 'bf16'"):
        Layer(compute_dtype="bf16")


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float64])
def test_compute_dtype_holds_under_autocast(compute_dtype, monkeypatch):
    seen = []

    def spy(query, *arguments, **options):
        seen.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return block_sparse_attention(query, *arguments, **options)

    monkeypatch.setattr("sparse_attn_modules.modules.base.block_sparse_attention", spy)
    layer = Layer(LocalWindow(density=0.5), compute_dtype=compute_dtype)
    with torch.autocast("cpu", torch.float16):
        out = layer(torch.randn(1, 6, 8, 8))
    assert seen == [(compute_dtype, False)]
    assert out.dtype == torch.float32


def test_export_and_run_the_program():
    layer = Layer(Random(0.5))
    image = torch.randn(2, 5, 7, 8)
    program = torch.export.export(layer, (image,))
    other = torch.randn(2, 5, 7, 8)
    torch.testing.assert_close(program.module()(other), layer(other))


def test_inference_mode_first_then_training():
    layer = Layer(Random(0.7, seed=99))
    with torch.inference_mode():
        layer(torch.randn(1, 7, 5, 8))
    image = torch.randn(1, 7, 5, 8, requires_grad=True)
    layer(image).sum().backward()
    assert image.grad.isfinite().all()


def test_tracers_see_the_operator_and_vmap_goes_through_it():
    query, key, value = inputs(torch.float32, requires_grad=False)

    def attend(query):
        return block_sparse_attention(query, key, value, MASK)

    graph = make_fx(attend)(query).graph
    assert torch.ops.sparse_attn_modules.attention_forward.default in [node.target for node in graph.nodes]
    batch = torch.randn(3, *query.shape)
    mapped = torch.func.vmap(attend)(batch)
    torch.testing.assert_close(mapped, torch.stack([attend(query) for query in batch]))


@pytest.mark.parametrize("of", ["out", "lse"])
def test_batches_of_gradients(of):
    """Of ``is_grads_batched``, with which ``jacobian(vectorize=True)`` works: a vmap that tells nobody of itself."""
    tensors = [*inputs(), *relative_position()]

    def attend(query, key, value, *relative):
        results = block_sparse_attention(query, key, value, MASK, relative_position=relative, return_lse=True)
        return results[of == "lse"]

    grads = torch.randn(3, *attend(*tensors).shape, dtype=torch.float64)
    found = torch.autograd.grad(attend(*tensors), tensors[:2], grads, is_grads_batched=True)
    each = [torch.autograd.grad(attend(*tensors), tensors[:2], grad) for grad in grads]
    for batch, one_by_one in zip(found, zip(*each)):
        torch.testing.assert_close(batch, torch.stack(one_by_one))


def test_jit_trace_of_a_layer_that_is_trained():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(4))

        def forward(self, x):
            return block_sparse_attention(x * self.gain, x, x, MASK)

    layer = Scaled()
    x, other, _ = inputs(torch.float32, requires_grad=False)
    traced = torch.jit.trace(layer, x)
    out = layer(other)
    torch.testing.assert_close(traced(other), out)
    grad = torch.randn_like(out)
    found, expected = (torch.autograd.grad(result, layer.gain, grad) for result in (traced(other), out))
    torch.testing.assert_close(found, expected)


def test_two_threads_agree_with_one():
    images = [torch.randn(1, height, 8, 8) for height in (5, 6, 7, 8)]
    layer = Layer(Random(0.5))
    expected = [Layer(Random(0.5))(image) for image in images]
    failures = []

    def work(offset):
        for step in range(20):
            index = (step + offset) % len(images)
            if not torch.equal(layer(images[index]), expected[index]):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_eager_training_saves_what_callers_may_change():
    query = torch.randn(1, 2, GRID.num_tokens, 8, requires_grad=True)
    padding = torch.zeros(1, GRID.num_tokens, dtype=torch.bool)
    mask = Random(0.5).mask(GRID, 2)
    out = block_sparse_attention(query, query, query, mask, key_padding_mask=padding, backend="gathered")
    padding[:, 0] = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_eager_training_goes_through_hooks_on_saved_tensors():
    query = torch.randn(1, 2, GRID.num_tokens, 8, requires_grad=True)
    mask = Random(0.5).mask(GRID, 2)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or len(packed) - 1, packed.__getitem__):
        out = block_sparse_attention(query, query * 2, query * 3, mask, backend="gathered")
    assert any(tensor.shape == query.shape and torch.equal(tensor, query * 3) for tensor in packed)
    out.sum().backward()
    assert query.grad.isfinite().all()
