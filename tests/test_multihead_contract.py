"""What SparseMultiheadAttention promises around its output: parameters, copies, graphs, clear errors."""

import copy
import pickle

import pytest
import torch
from torch import nn

from sparse_attn_modules import BlockMask, TokenGrid
from sparse_attn_modules.modules import SparseMultiheadAttention
from sparse_attn_modules.modules.masked import masked_attention
from sparse_attn_modules.patterns import Dense, LocalWindow, Pattern, Random
from sparse_attn_modules.patterns.traced import register_for_tracing, traced_mask

DIM, HEADS = 24, 4
RANDOM = Random(0.5)
KINDS = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 10, "vdim": 14},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "all": {"kdim": 10, "vdim": 14, "add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_shares_parameters_and_state_dict_keys(kind):
    layer = nn.MultiheadAttention(DIM, HEADS, 0.1, batch_first=True, **KINDS[kind]).double().eval()
    layer.out_proj.weight.requires_grad_(False)
    sparse = SparseMultiheadAttention.from_module(layer, LocalWindow(density=0.3))
    assert isinstance(sparse, nn.MultiheadAttention)
    assert list(sparse.state_dict()) == list(layer.state_dict())
    parameters = dict(layer.named_parameters())
    assert list(dict(sparse.named_parameters())) == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in sparse.named_parameters())
    assert sparse.out_proj is layer.out_proj
    assert not sparse.training
    assert sparse.dropout == 0.1

    other = SparseMultiheadAttention(DIM, HEADS, batch_first=True, **KINDS[kind], dtype=torch.float64).eval()
    assert list(other.state_dict()) == list(layer.state_dict())
    other.load_state_dict(layer.state_dict())
    tensors = tuple(torch.randn(1, 20, size, dtype=torch.float64) for size in (DIM, layer.kdim, layer.vdim))
    torch.testing.assert_close(other(*tensors), layer(*tensors), rtol=1e-9, atol=1e-11)
    fresh = nn.MultiheadAttention(DIM, HEADS, batch_first=True, **KINDS[kind]).double().eval()
    fresh.load_state_dict(sparse.state_dict())
    torch.testing.assert_close(fresh(*tensors), layer(*tensors), rtol=1e-9, atol=1e-11)


def test_starts_from_the_same_random_weights():
    torch.manual_seed(3)
    original = nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True)
    torch.manual_seed(3)
    sparse = SparseMultiheadAttention(DIM, HEADS, add_bias_kv=True)
    torch.testing.assert_close(dict(sparse.state_dict()), dict(original.state_dict()), rtol=0, atol=0)


def test_calls_the_output_projection_so_that_adapters_act():
    layer = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    sparse = SparseMultiheadAttention.from_module(layer)
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    expected = 2 * layer(x, x, x)[0]
    layer.out_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(sparse(x, x, x)[0], expected, rtol=1e-9, atol=1e-11)


def test_compiles_without_a_mask_built_before():
    tensors = (torch.randn(1, 300, DIM),) * 3
    sparse = SparseMultiheadAttention(DIM, HEADS, batch_first=True, pattern=RANDOM)
    compiled = torch.compile(copy.deepcopy(sparse), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors)[0], sparse(*tensors)[0])
    longer = (torch.randn(1, 500, DIM),) * 3
    torch.testing.assert_close(compiled(*longer)[0], sparse(*longer)[0])


def test_the_pattern_may_be_assigned_later():
    sparse = SparseMultiheadAttention(DIM, HEADS, batch_first=True)
    x = torch.randn(1, 900, DIM)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    outputs = []
    for pattern in (None, "local", LocalWindow(density=0.5)):
        if pattern is not None:
            sparse.pattern = pattern
        fresh = SparseMultiheadAttention(DIM, HEADS, batch_first=True, pattern=pattern)
        fresh.load_state_dict(sparse.state_dict())
        outputs.append(fresh(x, x, x, need_weights=False)[0])
        torch.testing.assert_close(sparse(x, x, x, need_weights=False)[0], outputs[-1])
        torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], outputs[-1])
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert (outputs[1] - outputs[2]).abs().max() > 1e-3


@pytest.mark.parametrize(("pattern", "is_dense"), [(Dense(), True), (LocalWindow(density=0.5), False)])
def test_a_traced_mask_is_dense_where_the_pattern_is(pattern, is_dense):
    grid = TokenGrid.sequence(900)
    mask = traced_mask(register_for_tracing(pattern), grid, grid, HEADS, torch.device("cpu"))
    assert mask.is_dense == is_dense


def test_exports():
    sparse = SparseMultiheadAttention(DIM, HEADS, batch_first=True, pattern=RANDOM)
    x = torch.randn(1, 300, DIM)
    program = torch.export.export(sparse, (x, x, x), {"need_weights": False})
    torch.testing.assert_close(program.module()(x, x, x, need_weights=False)[0], sparse(x, x, x)[0])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_keep_weights_pattern_and_grid(clone):
    grid = TokenGrid(13, 37, prefix=1)
    sparse = SparseMultiheadAttention(DIM, HEADS, batch_first=True, pattern=LocalWindow(radius=1), grid=grid)
    x = torch.randn(1, grid.num_tokens, DIM)
    expected = sparse(x, x, x, need_weights=False)[0]
    cloned = clone(sparse)
    assert (cloned.pattern, cloned.grid) == (sparse.pattern, grid)
    assert torch.equal(cloned(x, x, x, need_weights=False)[0], expected)
    with torch.no_grad():
        cloned.in_proj_weight.zero_()
    assert torch.equal(sparse(x, x, x, need_weights=False)[0], expected)


def test_blocks_are_computed_where_they_can_express_the_call(monkeypatch):
    sparse = SparseMultiheadAttention(DIM, HEADS, batch_first=True, pattern=RANDOM)
    calls = []
    monkeypatch.setattr(
        "sparse_attn_modules.modules.multihead.masked_attention",
        lambda *arguments, **options: calls.append(1) or masked_attention(*arguments, **options),
    )
    x = torch.randn(1, 300, DIM)
    padding = torch.zeros(1, 300, dtype=torch.bool)
    for arguments, is_dense in (
        ({"need_weights": False}, False),
        ({"need_weights": False, "key_padding_mask": padding}, False),
        ({"need_weights": False, "key_padding_mask": padding.float().masked_fill(padding, -torch.inf)}, False),
        ({"need_weights": False, "key_padding_mask": padding.float() + 1}, True),
        ({"need_weights": False, "attn_mask": torch.zeros(300, 300, dtype=torch.bool)}, True),
        ({}, True),
    ):
        calls.clear()
        sparse(x, x, x, **arguments)
        assert bool(calls) == is_dense, arguments


def test_a_custom_pattern_may_forbid_the_added_keys():
    class OwnBlock(Pattern):
        def blocks(self, query_grid, key_grid, num_heads):
            blocks = torch.zeros(1, query_grid.num_blocks, key_grid.num_blocks, dtype=torch.bool)
            return blocks.index_fill(2, torch.tensor([0]), True)

    layer = nn.MultiheadAttention(DIM, HEADS, batch_first=True, add_zero_attn=True).double()
    sparse = SparseMultiheadAttention.from_module(layer, OwnBlock())
    layer.add_zero_attn = False
    x = torch.randn(1, 128 + 5, DIM, dtype=torch.float64)
    expected, _ = layer(x, x[:, :128], x[:, :128])
    torch.testing.assert_close(sparse(x, x, x, need_weights=False)[0], expected, rtol=1e-9, atol=1e-10)


def test_from_module_takes_only_the_original():
    class Changed(nn.MultiheadAttention):
        pass

    for layer in (Changed(DIM, HEADS), SparseMultiheadAttention(DIM, HEADS), nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"layer must be a torch.nn.MultiheadAttention, got "):
            SparseMultiheadAttention.from_module(layer)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_heads": 5}, ValueError, "embed_dim must be a multiple of num_heads, got 24 and 5"),
        ({"num_heads": 0}, ValueError, "embed_dim must be a multiple of num_heads, got 24 and 0"),
        ({"grid": (3, 4)}, TypeError, "grid must be a TokenGrid or None, got tuple"),
        ({"key_grid": TokenGrid(3, 4)}, ValueError, "grid must be given with key_grid"),
        ({"pattern": "no such pattern"}, ValueError, "^SparseMultiheadAttention: pattern must be one of"),
        ({"pattern": BlockMask.dense(TokenGrid(3, 4))}, TypeError, "pattern must be a Pattern"),
    ],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        SparseMultiheadAttention(**{"embed_dim": DIM, "num_heads": HEADS, **arguments})


@pytest.mark.parametrize(
    ("shapes", "arguments", "error", "message"),
    [
        (((1, 2, 3, DIM),) * 3, {}, ValueError, r"query must have 2 or 3 dimensions, got shape \[1, 2, 3, 24\]"),
        (((2, 9, DIM), (9, DIM), (9, DIM)), {}, ValueError, "key must have 3 dimensions as query"),
        (((2, 9, 7),) * 3, {}, ValueError, r"query must have 24 channels, got shape \[2, 9, 7\]"),
        (((2, 9, DIM), (2, 9, 7), (2, 9, DIM)), {}, ValueError, "key must have 24 channels"),
        (((2, 9, DIM), (2, 8, DIM), (2, 9, DIM)), {}, ValueError, "value must have key's tokens"),
        (((2, 9, DIM), (3, 9, DIM), (3, 9, DIM)), {}, ValueError, "key must have query's batch of 2, got shape"),
        (((2, 9, DIM),) * 3, {"is_causal": True}, ValueError, "attn_mask must be given with is_causal"),
        (
            ((2, 9, DIM),) * 3,
            {"attn_mask": torch.zeros(9, 8)},
            ValueError,
            r"attn_mask must have shape \[9, 9\] or \[8, 9, 9\], got \[9, 8\]",
        ),
        (((2, 9, DIM),) * 3, {"attn_mask": torch.zeros(2, 9, 9)}, ValueError, "attn_mask must have shape"),
        (
            ((2, 9, DIM),) * 3,
            {"attn_mask": torch.zeros(9, 9).int()},
            TypeError,
            "attn_mask must be boolean or floating",
        ),
        (
            ((2, 9, DIM),) * 3,
            {"key_padding_mask": torch.zeros(2, 8)},
            ValueError,
            r"key_padding_mask must have shape \[2, 9\], got \[2, 8\]",
        ),
        (((9, DIM),) * 3, {"key_padding_mask": torch.zeros(1, 9)}, ValueError, r"must have shape \[9\], got \[1, 9\]"),
        (((2, 9, DIM),) * 3, {"key_padding_mask": torch.zeros(2, 9).long()}, TypeError, "must be boolean or floating"),
    ],
)
def test_bad_input(shapes, arguments, error, message):
    with pytest.raises(error, match=message):
        SparseMultiheadAttention(DIM, HEADS, batch_first=True)(*(torch.randn(shape) for shape in shapes), **arguments)
