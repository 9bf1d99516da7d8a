"""SparseMultiheadAttention against nn.MultiheadAttention, and against attention written out under sparse masks."""

import copy
import logging

import pytest
import torch
from torch import nn

from sparse_attn_modules import TokenGrid, notices
from sparse_attn_modules.modules import SparseMultiheadAttention
from sparse_attn_modules.patterns import CustomPattern, Dense, LocalWindow

DIM, HEADS = 24, 4
KINDS = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 10, "vdim": 14},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "all": {"kdim": 10, "vdim": 14, "add_bias_kv": True, "add_zero_attn": True},
}


def make_layer(dtype=torch.float64, **arguments):
    layer = nn.MultiheadAttention(DIM, HEADS, **arguments).to(dtype)
    for parameter in layer.parameters():
        if parameter.dim() == 1:  # biases are zero at first
            nn.init.normal_(parameter)
    return layer


def inputs(layer, batch, queries, keys, batch_first, dtype=torch.float64):
    """Query, key and value; one tensor for self-attention."""
    if keys is None:
        x = torch.randn(batch, queries, DIM, dtype=dtype)
        return (x if batch_first else x.transpose(0, 1),) * 3
    tensors = (
        torch.randn(batch, n, c, dtype=dtype) for n, c in ((queries, DIM), (keys, layer.kdim), (keys, layer.vdim))
    )
    return tuple(x if batch_first else x.transpose(0, 1) for x in tensors)


def run(module, tensors, **arguments):
    """Output, weights, and gradients of the inputs and of every parameter, by name."""
    module.zero_grad()
    leaves = {id(x): x.detach().clone().requires_grad_() for x in tensors}
    out, weights = module(*(leaves[id(x)] for x in tensors), **arguments)
    generator = torch.Generator().manual_seed(0)
    loss = (out * torch.randn(out.shape, dtype=out.dtype, generator=generator)).sum()
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, dtype=out.dtype, generator=generator)).sum()
    loss.backward()
    results = {"out": out.detach(), **{f"input {i}": x.grad for i, x in enumerate(leaves.values())}}
    if weights is not None:
        results["weights"] = weights.detach()
    return {**results, **{name: parameter.grad.clone() for name, parameter in module.named_parameters()}}


def assert_equal_results(actual, expected, rtol=1e-9, atol=1e-10):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def random_blocks(query_grid, key_grid, num_heads):
    generator = torch.Generator().manual_seed(query_grid.num_patches)
    blocks = torch.rand(num_heads, query_grid.num_tiles, key_grid.num_tiles, generator=generator) < 0.5
    blocks[:, :, 0] = True  # so that the original, given the same mask, has no empty rows
    return blocks


RANDOM = CustomPattern(random_blocks)


def original_under(layer, mask, tensors, attn_mask=None, **arguments):
    """The original layer, to which the block mask is given as a mask of token pairs."""
    batch = tensors[0].shape[0] if layer.batch_first else tensors[0].shape[1]
    forbidden = ~mask.token_mask().expand(batch, HEADS, -1, -1).flatten(0, 1)
    extra = (layer.bias_k is not None) + layer.add_zero_attn
    forbidden = forbidden[..., : forbidden.shape[-1] - extra]  # the original adds these columns itself
    bias = torch.zeros(forbidden.shape, dtype=torch.float64).masked_fill(forbidden, -torch.inf)
    if attn_mask is not None:
        zero = torch.zeros(attn_mask.shape, dtype=torch.float64)
        bias = bias + (zero.masked_fill(attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask)
    return run(layer, tensors, attn_mask=bias, **arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("keys", [None, 131])
def test_dense_equals_the_original(kind, batch_first, need_weights, keys):
    layer = make_layer(batch_first=batch_first, **KINDS[kind])
    if keys is None and "kdim" in KINDS[kind]:
        keys = 150
    sparse = SparseMultiheadAttention.from_module(layer)
    tensors = inputs(layer, 2, 150, keys, batch_first)
    for average in (True, False) if need_weights else (True,):
        arguments = {"need_weights": need_weights, "average_attn_weights": average}
        assert_equal_results(run(sparse, tensors, **arguments), run(layer, tensors, **arguments))


@pytest.mark.parametrize("need_weights", [True, False])
def test_dense_is_as_accurate_as_the_original_in_float32(need_weights):
    exact_layer = make_layer(batch_first=True)
    layer = copy.deepcopy(exact_layer).float()
    sparse = SparseMultiheadAttention.from_module(layer)
    tensors = inputs(layer, 2, 300, None, True)
    single = (tensors[0].float(),) * 3
    exact = run(exact_layer, tensors, need_weights=need_weights)
    original, actual = (run(module, single, need_weights=need_weights) for module in (layer, sparse))
    for name, reference in exact.items():
        error = (actual[name] - reference).abs().max()
        allowed = (2 if name == "out" else 3) * (original[name] - reference).abs().max() + 1e-5
        assert error <= allowed, name


@pytest.mark.parametrize("need_weights", [True, False])
def test_unbatched(need_weights):
    for kind in ("plain", "all"):
        layer = make_layer(**KINDS[kind])
        sparse = SparseMultiheadAttention.from_module(layer)
        tensors = tuple(x[0] for x in inputs(layer, 1, 40, 50, True))
        x = torch.randn(40, DIM, dtype=torch.float64)
        padding = torch.rand(50) < 0.3
        arguments = {"need_weights": need_weights, "key_padding_mask": padding, "average_attn_weights": False}
        assert_equal_results(run(sparse, tensors, **arguments), run(layer, tensors, **arguments))
        if kind == "plain":
            masked = {"need_weights": need_weights, "attn_mask": torch.randn(HEADS, 40, 40, dtype=torch.float64)}
            assert_equal_results(run(sparse, (x,) * 3, **masked), run(layer, (x,) * 3, **masked))


@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("keys", [None, 300])
def test_sparse_equals_the_original_under_the_same_mask(kind, need_weights, keys):
    layer = make_layer(batch_first=True, **KINDS[kind])
    if keys is None and kind == "all":
        keys = 400
    sparse = SparseMultiheadAttention.from_module(layer, RANDOM)
    tensors = inputs(layer, 2, 400, keys, True)
    extra = 2 if kind == "all" else 0
    mask = RANDOM.mask(TokenGrid.sequence(400), HEADS, key_grid=TokenGrid(1, keys or 400, 0, extra, (1, 128)))
    assert mask.density < 0.9
    arguments = {"need_weights": need_weights, "average_attn_weights": False}
    actual = run(sparse, tensors, **arguments)
    assert_equal_results(actual, original_under(layer, mask, tensors, **arguments), rtol=1e-8)


def test_a_grid_of_patches_with_a_class_token():
    grid = TokenGrid(13, 37, prefix=1)
    pattern = LocalWindow(radius=3)
    layer = make_layer(batch_first=True)
    sparse = SparseMultiheadAttention.from_module(layer, pattern, grid=grid)
    mask = pattern.mask(grid, HEADS)
    assert mask.density < 1
    tensors = inputs(layer, 1, grid.num_tokens, None, True)
    actual = run(sparse, tensors, need_weights=False)
    assert_equal_results(actual, original_under(layer, mask, tensors, need_weights=False), rtol=1e-8)


def test_cross_attention_between_two_grids():
    grid, key_grid = TokenGrid(13, 20), TokenGrid(9, 37, suffix=2)
    layer = make_layer(batch_first=True)
    sparse = SparseMultiheadAttention.from_module(layer, RANDOM, grid=grid, key_grid=key_grid)
    mask = RANDOM.mask(grid, HEADS, key_grid=key_grid)
    tensors = inputs(layer, 1, grid.num_tokens, key_grid.num_tokens, True)
    actual = run(sparse, tensors, need_weights=False)
    assert_equal_results(actual, original_under(layer, mask, tensors, need_weights=False), rtol=1e-8)


def test_tokens_that_do_not_fit_the_grid_get_dense_attention_and_one_notice(caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    layer = make_layer(batch_first=True)
    sparse = SparseMultiheadAttention.from_module(layer, LocalWindow(radius=0), grid=TokenGrid(13, 37, prefix=1))
    tensors = inputs(layer, 1, 300, None, True)
    with caplog.at_level(logging.WARNING, logger="sparse_attn_modules"):
        for _ in range(2):
            actual = run(sparse, tensors, need_weights=False)
    assert_equal_results(actual, run(layer, tensors, need_weights=False))
    said = [record.message for record in caplog.records if "SparseMultiheadAttention" in record.message]
    assert len(said) == 1
    assert "attention is dense where query and key tokens do not fit" in said[0]


@pytest.mark.parametrize("pattern", [None, RANDOM])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", ["bool", "as float", "float"])
def test_key_padding_mask(pattern, need_weights, padding):
    layer = make_layer(batch_first=True, add_bias_kv=True)
    sparse = SparseMultiheadAttention.from_module(layer, pattern)
    ignored = torch.rand(2, 300) < 0.4
    ignored[:, 0] = False
    as_float = torch.zeros(2, 300, dtype=torch.float64).masked_fill(ignored, -torch.inf)
    given = {"bool": ignored, "as float": as_float, "float": as_float + torch.randn(2, 300, dtype=torch.float64)}
    tensors = inputs(layer, 2, 300, None, True)
    arguments = {"need_weights": need_weights, "key_padding_mask": given[padding]}
    mask = (pattern or Dense()).mask(
        TokenGrid.sequence(300), HEADS, key_grid=TokenGrid(1, 300, suffix=1, tile=(1, 128))
    )
    actual = run(sparse, tensors, **arguments)
    arguments["key_padding_mask"] = given["float" if padding == "float" else "as float"]
    assert_equal_results(actual, original_under(layer, mask, tensors, **arguments), rtol=1e-8)


@pytest.mark.parametrize("pattern", [None, RANDOM])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attn_mask(pattern, need_weights, dim, kind):
    layer = make_layer(batch_first=False, add_zero_attn=True)
    sparse = SparseMultiheadAttention.from_module(layer, pattern)
    shape = (300, 300) if dim == 2 else (2 * HEADS, 300, 300)
    attn_mask = torch.rand(shape) < 0.3 if kind == "bool" else torch.randn(shape, dtype=torch.float64)
    tensors = inputs(layer, 2, 300, None, False)
    mask = (pattern or Dense()).mask(
        TokenGrid.sequence(300), HEADS, key_grid=TokenGrid(1, 300, suffix=1, tile=(1, 128))
    )
    arguments = {"need_weights": need_weights, "average_attn_weights": False}
    actual = run(sparse, tensors, attn_mask=attn_mask, **arguments)
    assert_equal_results(actual, original_under(layer, mask, tensors, attn_mask, **arguments), rtol=1e-8)


def test_both_masks_and_a_causal_hint():
    layer = make_layer(batch_first=True)
    sparse = SparseMultiheadAttention.from_module(layer)
    tensors = inputs(layer, 2, 140, None, True)
    causal = nn.Transformer.generate_square_subsequent_mask(140, dtype=torch.float64)
    padding = torch.zeros(2, 140, dtype=torch.float64)
    padding[1, 100:] = -torch.inf
    for arguments in (
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"attn_mask": causal.isinf(), "is_causal": True, "need_weights": False},
        {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True, "need_weights": True},
        {"attn_mask": causal, "key_padding_mask": padding + 0.5, "need_weights": False},
    ):
        assert_equal_results(run(sparse, tensors, **arguments), run(layer, tensors, **arguments))


def test_a_learned_attn_mask_gets_its_gradient():
    layer = make_layer(batch_first=True)
    sparse = SparseMultiheadAttention.from_module(layer)
    tensors = inputs(layer, 1, 30, None, True)
    gradients = []
    for module in (layer, sparse):
        bias = torch.linspace(-1, 1, 900, dtype=torch.float64).view(30, 30).requires_grad_()
        padding = torch.linspace(-1, 1, 30, dtype=torch.float64)[None].clone().requires_grad_()
        out, _ = module(*tensors, attn_mask=bias, key_padding_mask=padding, need_weights=False)
        out.square().sum().backward()
        gradients.append((bias.grad, padding.grad))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_mask_of_the_most_negative_number_in_a_narrower_dtype(need_weights):
    sparse = SparseMultiheadAttention(DIM, HEADS, batch_first=True, compute_dtype=torch.float16)
    x = torch.randn(2, 30, DIM)
    masks = torch.zeros(2, 30, dtype=torch.bool), torch.rand(30, 30) < 0.3
    masks[0][0, 12:] = True
    masks[1][:, 0] = False
    most_negative = [torch.zeros(mask.shape).masked_fill(mask, torch.finfo(torch.float32).min) for mask in masks]
    (expected, _), (actual, _) = (
        sparse(x, x, x, key_padding_mask=padding, attn_mask=pairs, need_weights=need_weights)
        for padding, pairs in (masks, most_negative)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
    everything = torch.full((30, 30), torch.finfo(torch.float32).min)
    assert sparse(x, x, x, attn_mask=everything, need_weights=need_weights)[0].isfinite().all()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("with_attn_mask", [True, False])
def test_a_query_without_keys_yields_the_projection_of_zero(need_weights, with_attn_mask):
    layer = make_layer(batch_first=True)
    sparse = SparseMultiheadAttention.from_module(layer)
    tensors = inputs(layer, 2, 30, None, True)
    arguments = {"need_weights": need_weights}
    if with_attn_mask:
        arguments["attn_mask"] = torch.zeros(30, 30, dtype=torch.bool)
        arguments["attn_mask"][7] = True
        empty = (slice(None), 7)
    else:
        arguments["key_padding_mask"] = torch.zeros(2, 30, dtype=torch.bool)
        arguments["key_padding_mask"][1] = True
        empty = (1,)
    results = run(sparse, tensors, **arguments)
    assert all(tensor.isfinite().all() for tensor in results.values())
    torch.testing.assert_close(results["out"][empty], layer.out_proj.bias.detach().expand_as(results["out"][empty]))
    if need_weights:
        assert (results["weights"][empty] == 0).all()


def test_dropout_acts_in_training_only():
    layer = make_layer(batch_first=True, dropout=0.4)
    sparse = SparseMultiheadAttention.from_module(layer, RANDOM)
    x = torch.randn(1, 300, DIM, dtype=torch.float64)
    assert not torch.equal(sparse(x, x, x, need_weights=False)[0], sparse(x, x, x, need_weights=False)[0])
    mask = RANDOM.mask(TokenGrid.sequence(300), HEADS).token_mask()
    _, weights = sparse(x, x, x, average_attn_weights=False)
    dropped = (weights == 0)[mask.expand_as(weights)].double().mean()
    assert 0.35 < dropped < 0.45
    sparse.eval()
    assert torch.equal(sparse(x, x, x, need_weights=False)[0], sparse(x, x, x, need_weights=False)[0])
    _, weights = sparse(x, x, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 300, dtype=torch.float64))


def test_compiles_in_one_graph_with_gradients():
    layer = make_layer(batch_first=True)
    sparse = SparseMultiheadAttention.from_module(layer, RANDOM)
    padding = torch.zeros(2, 300, dtype=torch.bool)
    padding[1, 200:] = True
    as_float = torch.zeros(2, 300, dtype=torch.float64).masked_fill(padding, -torch.inf)
    for backend, arguments in (
        ("inductor", {"need_weights": False}),
        ("aot_eager", {"need_weights": False, "key_padding_mask": padding}),
        ("aot_eager", {"need_weights": False, "key_padding_mask": as_float}),
        ("aot_eager", {"need_weights": True, "attn_mask": torch.rand(300, 300) < 0.2}),
    ):
        torch.compiler.reset()
        compiled = torch.compile(sparse, fullgraph=True, backend=backend)
        tensors = inputs(layer, 2, 300, None, True)
        actual = {name.removeprefix("_orig_mod."): x for name, x in run(compiled, tensors, **arguments).items()}
        assert_equal_results(actual, run(sparse, tensors, **arguments))


@pytest.mark.parametrize("need_weights", [True, False])
def test_compute_dtype_and_autocast(need_weights):
    layer = make_layer(torch.float32, batch_first=True)
    x = torch.randn(2, 60, DIM)
    exact, _ = copy.deepcopy(layer).double()(*(x.double(),) * 3)
    for dtype, bound in ((torch.float64, 1e-6), (torch.bfloat16, 0.1)):
        sparse = SparseMultiheadAttention.from_module(layer, compute_dtype=dtype)
        out, _ = sparse(x, x, x, need_weights=need_weights)
        assert out.dtype == torch.float32
        error = (out - exact).abs().max()
        assert error < bound
        assert (error > 1e-5) == (dtype == torch.bfloat16)
    sparse = SparseMultiheadAttention.from_module(layer)
    with torch.autocast("cpu", torch.bfloat16):
        (original, _), (actual, _) = (module(x, x, x, need_weights=need_weights) for module in (layer, sparse))
    assert actual.dtype == original.dtype
    assert (actual - exact).abs().max() <= 2 * (original - exact).abs().max() + 1e-5
