"""ViTSparseAttention against the layers of timm that it replaces, in float64."""

import logging
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from sparse_attn_modules import notices
from sparse_attn_modules.modules import ViTSparseAttention
from sparse_attn_modules.patterns import CustomPattern, LocalWindow
from sparse_attn_modules.token_grid import TokenGrid

timm_attention = pytest.importorskip("timm.layers.attention")
timm_eva = pytest.importorskip("timm.models.eva")

LAYERS = {
    "plain": (timm_attention.Attention, {}),
    "bias, qk norm": (timm_attention.Attention, {"qkv_bias": True, "qk_norm": True, "norm_layer": nn.LayerNorm}),
    "scale norm, gate": (timm_attention.Attention, {"scale_norm": True, "gated": True, "norm_layer": nn.LayerNorm}),
    "other sizes": (timm_attention.Attention, {"attn_head_dim": 10, "dim_out": 17, "proj_bias": False}),
    "rope": (timm_attention.AttentionRope, {"num_prefix_tokens": 2}),
    "rope, halves, gate": (timm_attention.AttentionRope, {"num_prefix_tokens": 2, "rotate_half": True, "gated": True}),
    "rope, separate, norms": (
        timm_attention.AttentionRope,
        {"num_prefix_tokens": 2, "qkv_fused": False, "qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
    ),
    "rope, grouped queries": (
        timm_attention.AttentionRope,
        {"num_prefix_tokens": 2, "qkv_fused": False, "num_kv_heads": 2, "qk_norm": True, "norm_layer": nn.LayerNorm},
    ),
    "eva": (timm_eva.EvaAttention, {"num_prefix_tokens": 2, "scale_norm": False}),
    "eva, bias apart": (
        timm_eva.EvaAttention,
        {"num_prefix_tokens": 2, "scale_norm": False, "qkv_bias_separate": True},
    ),
    "eva, no bias": (timm_eva.EvaAttention, {"num_prefix_tokens": 2, "scale_norm": False, "qkv_bias": False}),
    "eva, separate, norms": (
        timm_eva.EvaAttention,
        {"num_prefix_tokens": 2, "qkv_fused": False, "qk_norm": True, "norm_layer": nn.LayerNorm, "gated": True},
    ),
}
DIM, HEADS, PREFIX, HEIGHT, WIDTH = 48, 4, 2, 5, 7
GRID = TokenGrid(HEIGHT, WIDTH, PREFIX)


def make(name: str, **more) -> nn.Module:
    layer_class, arguments = LAYERS[name]
    layer = layer_class(DIM, HEADS, **arguments, **more).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def inputs(layer: nn.Module, batch: int = 2) -> tuple[torch.Tensor, dict]:
    x = torch.randn(batch, GRID.num_tokens, DIM, dtype=torch.float64)
    if isinstance(layer, timm_attention.Attention):
        return x, {}
    return x, {"rope": torch.randn(GRID.num_patches, 2 * round(layer.scale**-2), dtype=torch.float64)}


def gradients(out: torch.Tensor, module: nn.Module) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    names, parameters = zip(*module.named_parameters())
    return dict(zip(names, torch.autograd.grad((out * weights).sum(), parameters)))


@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_replaced_layer(name):
    layer = make(name)
    x, arguments = inputs(layer)
    expected = layer(x, **arguments)
    expected_gradients = gradients(expected, layer)
    new = ViTSparseAttention.from_module(layer, grid=GRID)
    out = new(x, **arguments, attn_mask=None, is_causal=False)
    torch.testing.assert_close(out, expected)
    found = gradients(out, new)
    assert list(found) == list(expected_gradients)
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(found[parameter], gradient, msg=parameter)


@pytest.mark.parametrize("name", LAYERS)
def test_shares_parameters_and_attributes(name):
    layer = make(name)
    new = ViTSparseAttention.from_module(layer)
    assert list(new.state_dict()) == list(layer.state_dict())
    for (ours, shared), (theirs, original) in zip(new.named_parameters(), layer.named_parameters()):
        assert ours == theirs
        assert shared is original
    for attribute in ("num_heads", "head_dim", "scale", "fused_attn", "qkv", "proj", "attn_drop"):
        assert getattr(new, attribute) is getattr(layer, attribute)
    assert new.training is layer.training


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bias, qk norm", {"qkv_bias": True, "qk_norm": True}),
        ("scale norm, gate", {"scale_norm": True, "gated": True}),
        ("other sizes", {"attn_head_dim": 10, "dim_out": 17, "proj_bias": False}),
        ("rope", {"qkv_bias": True, "num_prefix_tokens": 2}),
        (
            "rope, grouped queries",
            {"qkv_bias": True, "qkv_fused": False, "num_kv_heads": 2, "qk_norm": True, "num_prefix_tokens": 2},
        ),
        ("eva", {"qkv_bias": True, "k_bias": False, "num_prefix_tokens": 2}),
        (
            "eva, separate, norms",
            {
                "qkv_bias": True,
                "k_bias": False,
                "qkv_fused": False,
                "qk_norm": True,
                "scale_norm": True,
                "gated": True,
                "num_prefix_tokens": 2,
            },
        ),
    ],
)
def test_constructed_directly_loads_the_same_checkpoint(name, arguments):
    layer = make(name)
    new = ViTSparseAttention(DIM, HEADS, grid=GRID, **arguments).double()
    new.load_state_dict(layer.state_dict())
    layer.load_state_dict(new.state_dict())
    x, rope = inputs(layer)
    torch.testing.assert_close(new(x, **rope), layer(x, **rope))


def masks() -> dict[str, torch.Tensor]:
    tokens = GRID.num_tokens
    allowed = torch.rand(2, 1, tokens, tokens) < 0.6
    allowed |= torch.eye(tokens, dtype=torch.bool)
    present = torch.rand(2, tokens) < 0.7
    present[:, 0] = True
    lowest = torch.finfo(torch.float64).min
    pairs = present[:, None, :, None] & present[:, None, None, :]
    return {
        "boolean": allowed,
        "boolean, one for all": allowed[0, 0],
        "additive": torch.randn(2, HEADS, tokens, tokens, dtype=torch.float64),
        # As timm's NaFlexVit makes it: the rows of absent tokens hold the lowest finite value throughout.
        "finite minimum": torch.zeros(pairs.shape, dtype=torch.float64).masked_fill(~pairs, lowest),
        "keys alone": torch.zeros(2, 1, 1, tokens, dtype=torch.float64).masked_fill(~present[:, None, None], lowest),
    }


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("name", ["bias, qk norm", "rope, grouped queries", "eva"])
def test_attn_mask_is_honoured(name, kind):
    layer = make(name)
    x, arguments = inputs(layer)
    mask = masks()[kind]
    expected = layer(x, attn_mask=mask, **arguments)
    out = ViTSparseAttention.from_module(layer, grid=GRID)(x, attn_mask=mask, **arguments)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("shape", [(3, 77, 77), (77, 76), (5, 2, 2, 77, 77), (3, 1, 1, 77), (0,)])
def test_attn_mask_that_does_not_broadcast_is_refused(shape):
    layer = ViTSparseAttention(8, 2)
    message = re.escape(f"ViTSparseAttention: attn_mask must broadcast to [2, 2, 77, 77], got shape {list(shape)}")
    for mask in (torch.ones(shape, dtype=torch.bool), torch.zeros(shape)):
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(2, 77, 8), attn_mask=mask)


@pytest.mark.parametrize("kind", ["allowed", "bias"])
def test_attn_mask_of_keys_alone(kind):
    layer, x = ViTSparseAttention(8, 2), torch.randn(2, 77, 8)
    mask = torch.rand(77) < 0.5 if kind == "allowed" else torch.randn(77)
    torch.testing.assert_close(layer(x, attn_mask=mask), layer(x, attn_mask=mask.expand(77, 77)))


def test_causal_is_honoured():
    layer = make("rope")
    x, arguments = inputs(layer)
    out = ViTSparseAttention.from_module(layer, grid=GRID)(x, is_causal=True, **arguments)
    torch.testing.assert_close(out, layer(x, is_causal=True, **arguments))


LARGE = TokenGrid(11, 37, PREFIX)  # 2 × 3 tiles, the last row and column of them partial


def random_tiles(query_grid, key_grid, num_heads):
    generator = torch.Generator().manual_seed(query_grid.num_tokens)
    tiles = torch.rand(num_heads, query_grid.num_tiles, key_grid.num_tiles, generator=generator) < 0.4
    return tiles | torch.eye(query_grid.num_tiles, dtype=torch.bool)


def allowed_pairs(grid: TokenGrid) -> torch.Tensor:
    """The token mask of ``random_tiles``, pair by pair from the definition of a tile."""
    tiles = random_tiles(grid, grid, HEADS)
    across = -(-grid.width // 16)
    tile = torch.tensor([y // 8 * across + x // 16 for y in range(grid.height) for x in range(grid.width)])
    allowed = torch.ones(HEADS, grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    allowed[:, grid.prefix :, grid.prefix :] = tiles[:, tile[:, None], tile[None]]
    return allowed


@pytest.mark.parametrize("given", ["none", "boolean", "additive", "causal"])
def test_sparse_pattern_equals_masked_attention(given):
    layer = make("rope, grouped queries")
    x = torch.randn(2, LARGE.num_tokens, DIM, dtype=torch.float64)
    rope = torch.randn(LARGE.num_patches, 2 * round(layer.scale**-2), dtype=torch.float64)
    allowed = allowed_pairs(LARGE)
    new = ViTSparseAttention.from_module(layer, CustomPattern(random_tiles), LARGE)
    arguments, oracle_mask = {}, allowed
    if given == "boolean":
        mask = torch.rand(2, 1, LARGE.num_tokens, LARGE.num_tokens) < 0.7
        arguments, oracle_mask = {"attn_mask": mask}, allowed & mask
    elif given == "additive":
        bias = torch.randn(2, 1, LARGE.num_tokens, LARGE.num_tokens, dtype=torch.float64)
        arguments, oracle_mask = {"attn_mask": bias}, bias.masked_fill(~allowed, -torch.inf)
    elif given == "causal":
        arguments, oracle_mask = {"is_causal": True}, allowed.tril()
    expected = layer(x, rope, attn_mask=oracle_mask)
    out = new(x, rope, **arguments)
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, layer(x, rope))
    ours, theirs = gradients(out, new), gradients(expected, layer)
    for parameter, gradient in theirs.items():
        torch.testing.assert_close(ours[parameter], gradient, msg=parameter)


def test_query_key_and_value_are_views_of_the_fused_projection(monkeypatch):
    layer = ViTSparseAttention.from_module(make("plain"), grid=GRID)
    seen = []
    attend = layer.attend
    monkeypatch.setattr(layer, "attend", lambda *tensors, **more: seen.extend(tensors[:3]) or attend(*tensors, **more))
    projected = []
    layer.qkv.register_forward_hook(lambda module, args, out: projected.append(out))
    layer(inputs(make("plain"))[0])
    assert len({tensor.untyped_storage().data_ptr() for tensor in (*seen, *projected)}) == 1
    assert [tuple(tensor.shape) for tensor in seen] == [(2, HEADS, GRID.num_tokens, DIM // HEADS)] * 3


def test_projection_is_called_whatever_it_is():
    class Adapter(nn.Module):  # like a LoRA wrapper, but without even an attribute called weight
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 1.5 * self.inner(x)

    layer = make("bias, qk norm")
    new = ViTSparseAttention.from_module(layer, grid=GRID)
    x, _ = inputs(layer)
    layer.qkv = new.qkv = Adapter(layer.qkv)
    torch.testing.assert_close(new(x), layer(x))


def test_dropout_of_attention_weights_in_training_alone():
    layer = make("plain", attn_drop=1.0)
    new = ViTSparseAttention.from_module(layer, grid=GRID)
    x, _ = inputs(layer)
    # With every weight dropped, the output is that of the projection of zeros.
    torch.testing.assert_close(new.train()(x), layer.proj.bias.expand(2, GRID.num_tokens, -1))
    torch.testing.assert_close(new.eval()(x), layer.eval()(x))
    assert (new.eval()(x) - layer.proj.bias).abs().max() > 0.1


def test_dropout_is_unbiased():
    layer = make("plain", attn_drop=0.5)
    layer.proj = nn.Identity()
    new = ViTSparseAttention.from_module(layer, grid=GRID)
    x, _ = inputs(layer, batch=1)
    draws = new.train()(x.expand(2000, -1, -1))
    standard_error = draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - layer.eval()(x)[0]).abs() < 6 * standard_error).all()
    assert standard_error.min() > 0


def test_tokens_that_do_not_fit_the_grid_get_dense_attention_and_one_warning(caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    layer = make("plain")
    new = ViTSparseAttention.from_module(layer, LocalWindow(density=0.3), TokenGrid(13, 41, 1))
    x = torch.randn(1, 400, DIM, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "sparse_attn_modules"):
        for _ in range(2):
            torch.testing.assert_close(new(x), layer(x))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the tokens do not fit the grid" in caplog.text


def test_a_dense_pattern_says_nothing_of_other_tokens(caplog):
    new = ViTSparseAttention.from_module(make("plain"), grid=TokenGrid(13, 43, 1))
    with caplog.at_level(logging.WARNING, "sparse_attn_modules"):
        new(torch.randn(1, 401, DIM, dtype=torch.float64))
    assert not caplog.records


def test_without_a_grid_tokens_are_a_plain_sequence():
    layer = make("plain")
    new = ViTSparseAttention.from_module(layer, LocalWindow(radius=0))
    x = torch.randn(1, 300, DIM, dtype=torch.float64)
    block = torch.arange(300) // 128
    torch.testing.assert_close(new(x), layer(x, attn_mask=block[:, None] == block))


def test_compute_dtype_is_that_of_attention_alone():
    layer = make("bias, qk norm").float()
    x = torch.randn(2, GRID.num_tokens, DIM)
    low = ViTSparseAttention.from_module(layer, grid=GRID, compute_dtype=torch.bfloat16)
    exact = layer(x)
    for out in (low(x), low(x, attn_mask=torch.zeros(GRID.num_tokens, GRID.num_tokens))):
        assert out.dtype == torch.float32
        assert 0 < (out - exact).abs().max() < 0.05 * exact.abs().max()


def test_lowest_finite_mask_value_survives_a_lower_compute_dtype():
    layer = make("plain").float()
    x = torch.randn(1, GRID.num_tokens, DIM)
    mask = torch.zeros(GRID.num_tokens, GRID.num_tokens)
    mask[3] = torch.finfo(torch.float32).min
    expected = layer(x, attn_mask=mask)
    out = ViTSparseAttention.from_module(layer, grid=GRID, compute_dtype=torch.bfloat16)(x, attn_mask=mask)
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", ["eva", "bias, qk norm"])
def test_autocast_keeps_the_dtype_of_the_original(name):
    layer = make(name).float()
    x = torch.randn(2, GRID.num_tokens, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        out = ViTSparseAttention.from_module(layer, grid=GRID)(x)
        projected = ViTSparseAttention.from_module(layer)._project(x)
    assert out.dtype == expected.dtype
    assert {tensor.dtype for tensor in projected} == {torch.bfloat16}
    exact = layer(x)
    assert (out - exact).abs().max() <= 3 * (expected - exact).abs().max() + 1e-3


def test_split_biases_are_reset_as_in_eva():
    new = ViTSparseAttention.from_module(make("eva"))
    new.k_bias.fill_(1)
    new.reset_parameters()
    assert not any(bias.any() for bias in (new.q_bias, new.k_bias, new.v_bias))
    assert "k_bias" not in new.state_dict()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attn_mask": True}, TypeError, "attn_mask must be a tensor or None, got bool"),
        ({"attn_mask": torch.zeros(1, dtype=torch.int64)}, TypeError, "attn_mask must be boolean or floating-point"),
        (
            {"attn_mask": torch.ones(37, 37, dtype=torch.bool), "is_causal": True},
            ValueError,
            "attn_mask must be None with is_causal",
        ),
        ({"rope": torch.zeros(35, 24)}, ValueError, "rope must be None for a layer without rotary position"),
    ],
)
def test_wrong_calls(arguments, error, message):
    layer = make("plain")
    with pytest.raises(error, match=f"ViTSparseAttention: {message}"):
        ViTSparseAttention.from_module(layer, grid=GRID)(inputs(layer)[0], **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 50, "num_heads": 4}, "dim must be a multiple of num_heads, got 50 and 4"),
        ({"dim": 48, "num_heads": 4, "num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"dim": 48, "num_heads": 4, "num_kv_heads": 2}, "qkv_fused must be False with num_kv_heads"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=f"ViTSparseAttention: {message}"):
        ViTSparseAttention(**arguments)


def test_subclasses_are_not_taken_for_the_class():
    class Other(timm_attention.Attention):
        pass

    with pytest.raises(TypeError, match=r"layer must be one of .* got .*Other"):
        ViTSparseAttention.from_module(Other(DIM, HEADS))


@pytest.mark.parametrize("num_heads", [0, -2])
def test_number_of_heads_is_checked(num_heads):
    with pytest.raises(ValueError, match=f"ViTSparseAttention: num_heads must be at least 1, got {num_heads}"):
        ViTSparseAttention(16, num_heads)


def test_grid_and_dimensions_are_checked():
    with pytest.raises(TypeError, match="ViTSparseAttention: grid must be a TokenGrid, a function or None, got tuple"):
        ViTSparseAttention(16, 2, grid=(4, 4))
    with pytest.raises(ValueError, match=r"ViTSparseAttention: x must have shape \[B, N, dim\], got \[9, 16\]"):
        ViTSparseAttention(16, 2)(torch.randn(9, 16))


def test_compute_dtype_on_the_meta_device():
    layer = ViTSparseAttention(16, 2, compute_dtype=torch.bfloat16).to("meta")
    assert layer(torch.empty(1, 9, 16, device="meta")).shape == (1, 9, 16)


def test_threads_share_a_layer_while_masks_come_and_go():
    layer = ViTSparseAttention(16, num_heads=2, pattern=LocalWindow(density=0.5))
    grids = [TokenGrid(height, 16, tile=(2, 4)) for height in range(2, 26)]
    device = torch.device("cpu")

    def walk(start):
        for step in range(300):
            grid = grids[(start + step) % len(grids)]
            assert layer.block_mask(grid, 2, device).query_grid == grid
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(walk, range(0, 24, 6)))
    assert len(layer.kept_masks) <= 8
