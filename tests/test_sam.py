"""SAMAttentionSparse against the layers it replaces, and against attention written out under sparse masks."""

import copy
import pickle

import pytest
import torch
from torch import nn

from sparse_attn_modules import TokenGrid
from sparse_attn_modules.modules import SAMAttentionSparse, SparseAttention, why_skipping_cannot_pay
from sparse_attn_modules.patterns import CustomPattern, Dense, Hybrid, ImageToPrompt, LocalWindow

segment_anything = pytest.importorskip("segment_anything.modeling.image_encoder")
samvit = pytest.importorskip("timm.models.vision_transformer_sam")
LAYERS = {"segment_anything": segment_anything.Attention, "timm": samvit.Attention}
DIM, HEADS = 24, 2


def make_layer(library, dtype=torch.float64, **arguments):
    layer = LAYERS[library](DIM, HEADS, **arguments).to(dtype)
    for name, parameter in layer.named_parameters():
        if name.startswith("rel_pos"):  # zero at first, which would hide the bias
            nn.init.normal_(parameter, std=0.5)
    return layer


def run(module, x, grad_out, *arguments):
    """Output, gradient of the input and of every parameter, by name."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x, *arguments)
    out.backward(grad_out)
    return {"out": out.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


def random_blocks(query_grid, key_grid, num_heads):
    generator = torch.Generator().manual_seed(query_grid.num_patches)
    return torch.rand(num_heads, query_grid.num_tiles, key_grid.num_tiles, generator=generator) < 0.4


def written_out(module, x, grid, token_mask, height_table, width_table):
    """Attention over ``[B, N, C]`` with every pair of tokens written out; tables already of the grid's size."""
    batch, tokens, _ = x.shape
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in module.qkv(x).chunk(3, dim=-1))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    patches = torch.arange(grid.num_patches)
    rows, columns = patches // grid.width, patches % grid.width
    image_q = q[:, :, : grid.num_patches]
    of_row = height_table[rows[:, None] - rows + grid.height - 1]  # [patches, patches, D]
    of_column = width_table[columns[:, None] - columns + grid.width - 1]
    bias = torch.einsum("bnqd,qkd->bnqk", image_q, of_row) + torch.einsum("bnqd,qkd->bnqk", image_q, of_column)
    logits = logits + nn.functional.pad(bias, (0, grid.suffix, 0, grid.suffix))
    weights = logits.masked_fill(~token_mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    return module.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, -1))


@pytest.mark.parametrize("library", LAYERS)
@pytest.mark.parametrize("size", [(13, 19), (20, 27), (14, 14), (1, 3)])
@pytest.mark.parametrize("use_rel_pos", [True, False])
def test_dense_equals_the_original_in_float64(library, size, use_rel_pos):
    layer = make_layer(library, use_rel_pos=use_rel_pos, input_size=(13, 19))  # interpolated but for the first size
    sparse = SAMAttentionSparse.from_module(layer)
    x, grad_out = torch.randn(2, 2, *size, DIM, dtype=torch.float64)
    expected, actual = run(layer, x, grad_out), run(sparse, x, grad_out)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("library", LAYERS)
def test_dense_is_as_accurate_as_the_original_in_float32(library):
    exact_layer = make_layer(library, use_rel_pos=True, input_size=(27, 19))
    layer = copy.deepcopy(exact_layer).float()
    sparse = SAMAttentionSparse.from_module(layer)
    x, grad_out = torch.randn(2, 2, 30, 21, DIM, dtype=torch.float64)
    exact = run(exact_layer, x, grad_out)
    original, actual = (run(module, x.float(), grad_out.float()) for module in (layer, sparse))
    for name, reference in exact.items():
        error = (actual[name] - reference).abs().max()
        allowed = (2 if name == "out" else 3) * (original[name] - reference).abs().max() + 1e-5
        assert error <= allowed, name


def test_timm_q_and_k_norm_come_before_the_bias():
    layer = make_layer("timm", use_rel_pos=True, input_size=(9, 8), qk_norm=True)
    nn.init.normal_(layer.q_norm.weight)
    nn.init.normal_(layer.k_norm.bias)
    sparse = SAMAttentionSparse.from_module(layer)
    x, grad_out = torch.randn(2, 1, 9, 8, DIM, dtype=torch.float64)
    expected, actual = run(layer, x, grad_out), run(sparse, x, grad_out)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-11)


def test_timm_rotary_position():
    from timm.layers import RotaryEmbeddingCat

    rope = RotaryEmbeddingCat(DIM // HEADS, max_res=224, in_pixels=False, feat_shape=[9, 8])
    layer = make_layer("timm", rope=rope)
    sparse = SAMAttentionSparse.from_module(layer)
    assert sparse.rope is rope
    x = torch.randn(2, 9, 8, DIM, dtype=torch.float64)
    torch.testing.assert_close(sparse(x), layer(x), rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match=r"as many patches as the rotary position, 72, got 9×9"):
        sparse(torch.randn(2, 9, 9, DIM, dtype=torch.float64))


def test_rotary_position_leaves_prompt_tokens_alone():
    from timm.layers import RotaryEmbeddingCat

    rope = RotaryEmbeddingCat(DIM // HEADS, max_res=224, in_pixels=False, feat_shape=[3, 4])
    sparse = SAMAttentionSparse.from_module(make_layer("timm", rope=rope))
    x = torch.randn(1, 14, DIM, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in sparse.qkv(x).chunk(3, dim=-1))
    no_rotation = torch.cat([torch.zeros(2, DIM // HEADS), torch.ones(2, DIM // HEADS)], -1)
    embedding = torch.cat([rope.get_embed(), no_rotation])  # sine 0 and cosine 1 turn nothing
    from timm.layers import apply_rot_embed_cat

    q, k = apply_rot_embed_cat(q, embedding), apply_rot_embed_cat(k, embedding)
    out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    actual = sparse(x, 12, 2, grid_size=(3, 4))
    torch.testing.assert_close(actual, sparse.proj(out), rtol=1e-9, atol=1e-11)


def test_timm_dropout_acts_in_training_only():
    layer = make_layer("timm", attn_drop=0.5, proj_drop=0.5)
    sparse = SAMAttentionSparse.from_module(layer)
    assert sparse.training
    x = torch.randn(1, 9, 8, DIM, dtype=torch.float64)
    zeros = (sparse(x) == 0).double().mean()
    assert 0.35 < zeros < 0.65  # proj_drop, the very module of the layer
    layer.proj_drop.p = 0.0
    assert not torch.equal(sparse(x), sparse(x))  # attn_drop
    torch.testing.assert_close(sparse.eval()(x), layer.eval()(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "pattern",
    [CustomPattern(random_blocks), LocalWindow(density=0.3), Hybrid(Dense(), LocalWindow(radius=2), heads=1)],
    ids=["random with empty rows", "local", "hybrid"],
)
def test_sparse_equals_attention_written_out(pattern):
    layer = make_layer("segment_anything", use_rel_pos=True, input_size=(25, 33))
    sparse = SAMAttentionSparse.from_module(layer, pattern)
    grid = TokenGrid(25, 33)
    mask = pattern.mask(grid, HEADS)
    assert mask.density < 0.8
    x, grad_out = torch.randn(2, 2, 25, 33, DIM, dtype=torch.float64)

    def reference(x):
        out = written_out(layer, x.flatten(1, 2), grid, mask.token_mask(), layer.rel_pos_h, layer.rel_pos_w)
        return out.view_as(x)

    actual = run(sparse, x, grad_out)
    layer.zero_grad()
    x.requires_grad_()
    out = reference(x)
    out.backward(grad_out)
    expected = {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("pattern", [ImageToPrompt(LocalWindow(density=0.3)), CustomPattern(random_blocks)])
def test_prompt_tokens_are_the_suffix_and_have_no_relative_position(pattern):
    sparse = SAMAttentionSparse(DIM, HEADS, use_rel_pos=True, input_size=(25, 33), pattern=pattern).double()
    nn.init.normal_(sparse.rel_pos_h)
    nn.init.normal_(sparse.rel_pos_w)
    grid = TokenGrid(25, 33, suffix=5)
    mask = pattern.mask(grid, HEADS)
    assert mask.density < 1
    x = torch.randn(2, grid.num_tokens, DIM, dtype=torch.float64)
    grad_out = torch.randn_like(x)
    actual = run(sparse, x, grad_out, 25 * 33, 5, (25, 33))
    sparse.zero_grad()
    x.requires_grad_()
    out = written_out(sparse, x, grid, mask.token_mask(), sparse.rel_pos_h, sparse.rel_pos_w)
    out.backward(grad_out)
    expected = {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in sparse.named_parameters()}}
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_a_flat_image_equals_the_image():
    sparse = SAMAttentionSparse(DIM, HEADS, use_rel_pos=True, input_size=(28, 28), pattern=LocalWindow(density=0.3))
    nn.init.normal_(sparse.rel_pos_w)
    square, oblong = torch.randn(1, 33, 33, DIM), torch.randn(1, 25, 33, DIM)
    expected = sparse(square).flatten(1, 2)
    for arguments in ((), (33 * 33,), (None, 0), (33 * 33, 0, (33, 33))):
        assert torch.equal(sparse(square.flatten(1, 2), *arguments), expected)
    assert torch.equal(sparse(oblong.flatten(1, 2), grid_size=(25, 33)), sparse(oblong).flatten(1, 2))


def test_why_skipping_cannot_pay():
    assert why_skipping_cannot_pay(TokenGrid(14, 14)) == (
        "14×14 patches are 2 tiles of 8×16, and skipping pays from 8 on"
    )
    assert "1 tile of" in why_skipping_cannot_pay(TokenGrid(8, 16))
    assert why_skipping_cannot_pay(TokenGrid(32, 32)) is None
    assert why_skipping_cannot_pay(TokenGrid(64, 64), TokenGrid(14, 14)) is not None


@pytest.mark.parametrize("library", LAYERS)
def test_shares_parameters_and_state_dict_keys(library):
    layer = make_layer(library, use_rel_pos=True, input_size=(9, 8)).eval()
    layer.proj.weight.requires_grad_(False)
    sparse = SAMAttentionSparse.from_module(layer, LocalWindow(density=0.3))
    assert list(sparse.state_dict()) == list(layer.state_dict())
    parameters = dict(layer.named_parameters())
    assert list(dict(sparse.named_parameters())) == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in sparse.named_parameters())
    assert sparse.qkv is layer.qkv
    assert sparse.proj is layer.proj
    assert not sparse.training
    assert not sparse.proj.weight.requires_grad

    other = SAMAttentionSparse(DIM, HEADS, use_rel_pos=True, input_size=(9, 8)).double().eval()
    x = torch.randn(1, 9, 8, DIM, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x), rtol=1e-9, atol=1e-11)
    nn.init.normal_(other.rel_pos_h)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x), rtol=1e-9, atol=1e-11)


def write_by_fused_optimizer(tables):
    optimizer = torch.optim.AdamW(tables, lr=0.3, fused=True)
    for table in tables:
        table.grad = torch.randn_like(table)
    optimizer.step()


def write_through_data(tables):
    for table in tables:
        table.data.copy_(torch.randn_like(table))


def write_in_place(tables):
    with torch.no_grad():
        for table in tables:
            table.mul_(2)


def swap_data(tables):
    """As an average of weights is swapped in: the storage of before is written to and comes back."""
    for table in tables:
        own, table.data = table.data, torch.randn_like(table)
        table.data = own.mul_(-1)


@pytest.mark.parametrize("write", [write_by_fused_optimizer, write_through_data, write_in_place, swap_data])
@pytest.mark.parametrize("window_size", [0, 4])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_follows_tables_however_they_are_written(write, window_size, mode):
    """Evaluated before and after; neither a version nor an address tells of some of these writes."""
    layer = make_layer("segment_anything", use_rel_pos=True, input_size=(8, 8))
    layer = SAMAttentionSparse.from_module(layer).eval()
    x = torch.randn(1, 8, 8, DIM, dtype=torch.float64)
    with mode():
        before = layer(x, window_size=window_size)
    write([layer.rel_pos_h, layer.rel_pos_w])
    with mode():
        found = layer(x, window_size=window_size)
        expected = copy.deepcopy(layer)(x, window_size=window_size)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, before)


@pytest.mark.parametrize("window_size", [0, 3])
def test_no_images(window_size):
    module = SAMAttentionSparse(DIM, HEADS, use_rel_pos=True, input_size=(4, 4))
    x = torch.randn(0, 4, 4, DIM, requires_grad=True)
    out = module(x, window_size=window_size)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None
    assert not module.rel_pos_h.grad.any()


def test_calls_the_projection_so_that_adapters_act():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    layer = make_layer("segment_anything")
    sparse = SAMAttentionSparse.from_module(layer)
    sparse.qkv = layer.qkv = Adapted(layer.qkv)
    x = torch.randn(1, 9, 8, DIM, dtype=torch.float64)
    torch.testing.assert_close(sparse(x), layer(x), rtol=1e-9, atol=1e-11)


def test_reads_views_and_keeps_the_bias_factored(monkeypatch):
    sparse = SAMAttentionSparse(DIM, HEADS, use_rel_pos=True, input_size=(9, 8))
    projected, given = [], {}
    sparse.qkv.register_forward_hook(lambda module, inputs, output: projected.append(output))

    def attend(self, query, key, value, *arguments, **options):
        given.update(options, tensors=(query, key, value))
        return torch.zeros_like(query)

    monkeypatch.setattr(SparseAttention, "attend", attend)
    sparse(torch.randn(2, 9, 8, DIM))
    storage = projected[0].untyped_storage().data_ptr()
    assert all(tensor.untyped_storage().data_ptr() == storage for tensor in given["tensors"])
    assert [list(rel.shape) for rel in given["relative_position"]] == [[2, HEADS, 72, 9], [2, HEADS, 72, 8]]


def test_compiles_in_one_graph_with_gradients():
    sparse = SAMAttentionSparse(DIM, HEADS, use_rel_pos=True, input_size=(25, 33), pattern=LocalWindow(density=0.3))
    nn.init.normal_(sparse.double().rel_pos_h)
    for size, backend in (((25, 33), "inductor"), ((25, 33), "aot_eager"), ((33, 40), "aot_eager")):
        compiled = torch.compile(sparse, fullgraph=True, backend=backend)
        x, grad_out = torch.randn(2, 1, *size, DIM, dtype=torch.float64)
        expected, actual = run(sparse, x, grad_out), run(compiled, x, grad_out)
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name if name in ("out", "x") else f"_orig_mod.{name}"], tensor)


def test_exports():
    sparse = SAMAttentionSparse(DIM, HEADS, use_rel_pos=True, input_size=(25, 33), pattern=LocalWindow(density=0.3))
    nn.init.normal_(sparse.rel_pos_h)
    x = torch.randn(1, 25, 33, DIM)
    torch.testing.assert_close(torch.export.export(sparse, (x,)).module()(x), sparse(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_keep_weights_and_pattern(clone):
    sparse = SAMAttentionSparse(DIM, HEADS, use_rel_pos=True, input_size=(25, 33), pattern=LocalWindow(density=0.3))
    nn.init.normal_(sparse.rel_pos_h)
    x = torch.randn(1, 25, 33, DIM)
    expected = sparse(x)
    cloned = clone(sparse)
    assert cloned.pattern == sparse.pattern
    assert torch.equal(cloned(x), expected)
    with torch.no_grad():
        cloned.qkv.weight.zero_()
    assert torch.equal(sparse(x), expected)


def test_compute_dtype_and_autocast():
    layer = make_layer("segment_anything", torch.float32, use_rel_pos=True, input_size=(9, 8))
    x = torch.randn(1, 9, 8, DIM)
    exact = copy.deepcopy(layer).double()(x.double())
    for sparse in (
        SAMAttentionSparse.from_module(layer, compute_dtype=torch.float64),
        SAMAttentionSparse.from_module(layer, compute_dtype=torch.bfloat16),
    ):
        out = sparse(x)
        assert out.dtype == torch.float32
        error = (out - exact).abs().max()
        assert error < 1e-6 if sparse.compute_dtype == torch.float64 else 1e-5 < error < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        original, actual = layer(x), SAMAttentionSparse.from_module(layer)(x)
    assert actual.dtype == original.dtype
    assert (actual - exact).abs().max() <= 2 * (original - exact).abs().max() + 1e-5


def test_refuses_layers_it_does_not_reproduce():
    class Changed(segment_anything.Attention):
        pass

    for layer in (Changed(DIM), nn.Linear(2, 2), nn.MultiheadAttention(DIM, HEADS)):
        with pytest.raises(TypeError, match=r"from_module: layer must be the Attention of segment_anything's .* got "):
            SAMAttentionSparse.from_module(layer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 24, "num_heads": 5}, "embed_dim must be a multiple of num_heads, got 24 and 5"),
        ({"embed_dim": 24, "num_heads": 0}, "embed_dim must be a multiple of num_heads"),
        ({"embed_dim": 24, "num_heads": 2, "use_rel_pos": True}, "input_size must be .height, width. with use_rel_pos"),
        ({"embed_dim": 24, "num_heads": 2, "use_rel_pos": True, "input_size": (0, 3)}, "input_size must be"),
        ({"embed_dim": 24, "num_heads": 2, "use_rel_pos": True, "input_size": 4}, "input_size must be .* got 4"),
    ],
)
def test_bad_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        SAMAttentionSparse(**arguments)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((4, DIM), {}, r"x must have shape \[B, H, W, C\] or \[B, N, C\], got \[4, 24\]"),
        ((1, 3, 4, DIM), {"num_image_tokens": 12}, r"x must have shape \[B, N, C\] with num_image_tokens"),
        ((1, 3, 4, DIM), {"grid_size": (3, 4)}, r"x must have shape \[B, N, C\] with num_image_tokens"),
        ((1, 12, DIM), {}, "grid_size must be given if it is not square, got 12 patches"),
        ((1, 12, DIM), {"grid_size": (3, 5)}, "grid_size must hold the 12 image tokens, got 3×5"),
        ((1, 12, DIM), {"num_image_tokens": 9, "num_prompt_tokens": 2}, "must add up to the 12 tokens of x, got 9 and"),
        ((1, 12, DIM), {"num_image_tokens": 16}, "must add up to the 12 tokens of x, got 16 and -4"),
        ((1, 12, DIM), {"num_prompt_tokens": 12}, "must add up to the 12 tokens of x, got 0 and 12"),
    ],
)
def test_bad_input(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        SAMAttentionSparse(DIM, HEADS)(torch.randn(shape), **arguments)
