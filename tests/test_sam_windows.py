"""Windows read in place from the image against the libraries' blocks, which pad it, cut it and put it together."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from sparse_attn_modules.patching import patch_model, patch_report, unpatch_model
from torch import nn
from torch.overrides import TorchFunctionMode

from sparse_attn_modules.modules import SAMAttentionSparse, SAMWindowBlock
from sparse_attn_modules.patterns import CustomPattern, LocalWindow
from sparse_attn_modules.windows import partition, unpartition

segment_anything = pytest.importorskip("segment_anything.modeling.image_encoder")
samvit = pytest.importorskip("timm.models.vision_transformer_sam")
DIM, HEADS, WINDOW = 24, 2, 4
BLOCKS = {"segment_anything": segment_anything.Block, "timm": samvit.Block}
SIZES = [(8, 8), (10, 11), (4, 7), (3, 2)]  # whole windows, windows that hang over, one window larger than the image


def make_block(library, dtype=torch.float64, window_size=WINDOW, **arguments):
    arguments = {"use_rel_pos": True, "input_size": (8, 8), **arguments}
    block = BLOCKS[library](DIM, HEADS, window_size=window_size, **arguments).to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.eval()


def patched(block):
    """The block as a model holds it once patched, and that model."""
    model = patch_model(nn.Sequential(block))
    assert type(model[0]) is SAMWindowBlock
    return model


def gradients(out, module, x):
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    named = {"x": x, **dict(module.named_parameters())}
    return dict(zip(named, torch.autograd.grad((out * weights).sum(), named.values())))


def assert_same(model, original, x):
    x = x.requires_grad_()
    out, expected = model(x), original(x)
    torch.testing.assert_close(out, expected)
    found = gradients(out, model, x)
    for name, gradient in gradients(expected, original, x).items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("size", SIZES)
def test_windows_are_those_of_the_library(size):
    x = torch.randn(2, *size, 6)
    windows, padded = segment_anything.window_partition(x, WINDOW)
    tokens = x.flatten(1, 2).unflatten(-1, (2, 3)).transpose(1, 2)  # [B, 2 heads, N, 3]
    cut = partition(tokens, size, (WINDOW, WINDOW))
    assert torch.equal(cut.transpose(1, 2).flatten(2), windows.flatten(1, 2))
    assert torch.equal(unpartition(cut, size, (WINDOW, WINDOW)), tokens)
    assert padded == tuple(-(-side // WINDOW) * WINDOW for side in size)


def test_windows_need_not_be_square():
    tokens = torch.randn(2, 3, 5 * 7, 4)
    cut = partition(tokens, (5, 7), (2, 3))
    assert cut.shape == (2 * 3 * 3, 3, 6, 4)
    assert torch.equal(cut[4, :, 0], tokens[0, :, 2 * 7 + 3])
    assert torch.equal(unpartition(cut, (5, 7), (2, 3)), tokens)


@pytest.mark.parametrize("library", BLOCKS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arguments", [{}, {"use_rel_pos": False}, {"qkv_bias": False}], ids=str)
def test_a_block_equals_the_original(library, size, arguments):
    block = make_block(library, **arguments)
    assert_same(patched(copy.deepcopy(block))[0], block, torch.randn(2, *size, DIM, dtype=torch.float64))


@pytest.mark.parametrize(
    "arguments",
    [{"qk_norm": True}, {"init_values": 0.3}, {"drop_path": 0.5}, {"proj_drop": 0.5, "attn_drop": 0.5}],
    ids=str,
)
def test_what_only_timm_has(arguments):
    block = make_block("timm", **arguments)
    assert_same(patched(copy.deepcopy(block))[0], block, torch.randn(2, 10, 11, DIM, dtype=torch.float64))


def test_rotary_position():
    from timm.layers import RotaryEmbeddingCat

    rope = RotaryEmbeddingCat(DIM // HEADS, in_pixels=False, feat_shape=[WINDOW, WINDOW])
    block = make_block("timm", use_rel_pos=False, rope=rope)
    assert_same(patched(copy.deepcopy(block))[0], block, torch.randn(2, 10, 11, DIM, dtype=torch.float64))


def test_stochastic_depth_drops_windows():
    """As in the library; dropping whole images would be another regularisation."""
    block = make_block("timm", drop_path=0.5)
    model = patched(copy.deepcopy(block)).train()
    block.train()
    x = torch.randn(1, 8, 8, DIM, dtype=torch.float64)
    torch.manual_seed(3)
    expected = block(x)
    torch.manual_seed(3)
    torch.testing.assert_close(model(x), expected)


def test_dropout_acts_in_training_only():
    model = patched(make_block("timm", attn_drop=0.5))
    x = torch.randn(1, 8, 8, DIM, dtype=torch.float64)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("library", BLOCKS)
def test_dropped_weights_drop_the_bias_of_the_values_too(library):
    block = make_block(library)
    attention = SAMAttentionSparse.from_module(block.attn)
    attention.attn_drop = nn.Dropout(1.0)
    out = attention.train()(image(10, 11), window_size=WINDOW)
    torch.testing.assert_close(out, block.attn.proj.bias.expand_as(out))


def test_queries_without_keys_get_no_bias_of_values():
    def of_first_tile(query_grid, key_grid, num_heads):
        blocks = torch.zeros(1, query_grid.num_tiles, key_grid.num_tiles, dtype=torch.bool)
        blocks[:, 0] = True
        return blocks

    block = make_block("segment_anything", window_size=16, use_rel_pos=False)
    attention = SAMAttentionSparse.from_module(block.attn, CustomPattern(of_first_tile))
    out = attention(image(16, 16), window_size=16)
    assert not torch.allclose(out[:, :8], block.attn.proj.bias.expand_as(out[:, :8]))
    torch.testing.assert_close(out[:, 8:], block.attn.proj.bias.expand_as(out[:, 8:]))


class Adapter(nn.Module):
    """A low-rank addition to a projection, as LoRA makes it."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False, dtype=linear.weight.dtype)
        self.up = nn.Linear(2, linear.out_features, dtype=linear.weight.dtype)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def double_output(module, arguments, output):
    return 2 * output


class AdapterOfSAMed(nn.Module):
    """LoRA of queries and values that takes what it is given for [B, height, width, C], as SAMed's does."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.query, self.value = (nn.Linear(DIM, DIM, bias=False, dtype=linear.weight.dtype) for _ in range(2))

    def forward(self, x):
        projected = self.linear(x)
        projected[:, :, :, :DIM] += self.query(x)
        projected[:, :, :, -DIM:] += self.value(x)
        return projected


class ConvolvingAdapter(nn.Module):
    """An adapter that mixes patches, as Conv-LoRA's does: it must see the windows of the library."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.mix = nn.Conv2d(linear.in_features, linear.out_features, 3, padding=1, dtype=linear.weight.dtype)

    def forward(self, x):
        return self.linear(x) + self.mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, change) for name in ("qkv", "proj") for change in (Adapter, ConvolvingAdapter, "hook", "forward")),
        ("qkv", AdapterOfSAMed),
    ],
)
def test_projections_that_are_more_than_linear(name, change):
    block = make_block("segment_anything")
    projection = getattr(block.attn, name)
    if change == "hook":
        projection.register_forward_hook(double_output)
    elif change == "forward":
        linear = projection.forward
        projection.forward = lambda x: 3 * linear(x)
    else:
        setattr(block.attn, name, change(projection))
    x = image(10, 11)
    expected = block(x)
    model = patched(block)
    torch.testing.assert_close(model(x), expected)
    if change != "forward":  # a copy would call the block's own
        unpatch_model(model)
        assert_same(patched(copy.deepcopy(block))[0], block, x)


def image(height, width):
    return torch.randn(2, height, width, DIM, dtype=torch.float64)


@pytest.mark.parametrize("name", ["qkv", "proj"])
def test_hooks_see_what_they_saw_in_the_library(name):
    block = make_block("segment_anything")
    seen = []
    getattr(block.attn, name).register_forward_hook(lambda module, arguments, out: seen.append(out))
    block(x := image(10, 11))
    patched(block)(x)
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0])


def test_hooks_on_norms_are_called():
    block = make_block("timm")
    seen = []
    block.attn.k_norm.register_forward_hook(lambda module, arguments, out: seen.append(out))
    block(x := image(10, 11))
    patched(block)(x)
    assert len(seen) == 2
    torch.testing.assert_close(seen[1].reshape(seen[0].shape), seen[0])


def test_hooks_of_all_modules_see_what_they_saw_in_the_library():
    block = make_block("timm")
    seen = []

    def double(module, arguments, output):
        if isinstance(module, nn.Linear):
            seen.append(module)
            return output * 2
        return None

    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        x = image(10, 11)
        expected, projections = block(x), len(seen)
        torch.testing.assert_close(patched(block)(x), expected)
        assert len(seen) == 2 * projections
    finally:
        handle.remove()


def test_float32_is_as_accurate_as_the_original():
    exact = make_block("segment_anything")
    x = torch.randn(2, 10, 11, DIM, dtype=torch.float64)
    low = copy.deepcopy(exact).float()
    expected = exact(x)
    model = patched(copy.deepcopy(low))
    error, allowed = ((module(x.float()) - expected).abs().max() for module in (model, low))
    assert error <= 2 * allowed + 1e-5


def test_compute_dtype():
    block = make_block("segment_anything", dtype=torch.float32)
    x = torch.randn(2, 10, 11, DIM)
    model = patch_model(nn.Sequential(copy.deepcopy(block)), compute_dtype=torch.float64)
    out = model(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, block(x))
    low = patch_model(nn.Sequential(block), compute_dtype=torch.bfloat16)(x)
    assert low.dtype == torch.float32
    assert 0 < (low - out).abs().max() < 0.1


def test_autocast():
    block = make_block("segment_anything", dtype=torch.float32)
    x = torch.randn(2, 10, 11, DIM)
    model = patched(copy.deepcopy(block))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(x), block(x)
    assert found.dtype == expected.dtype
    assert (found - block(x)).abs().max() <= 2 * (expected - block(x)).abs().max()


def test_the_layer_by_itself():
    block = make_block("segment_anything")
    x = torch.randn(2, 10, 11, DIM, dtype=torch.float64)
    windows, padded = segment_anything.window_partition(x, WINDOW)
    expected = segment_anything.window_unpartition(block.attn(windows), WINDOW, padded, (10, 11))
    attention = SAMAttentionSparse.from_module(block.attn)
    torch.testing.assert_close(attention(x, window_size=WINDOW), expected)
    with pytest.raises(ValueError, match=r"window_size must be positive and x of shape \[B, H, W, C\], got -1"):
        attention(x, window_size=-1)
    with pytest.raises(ValueError, match=r"got 4 and \[2, 110, 24\]"):
        attention(x.flatten(1, 2), grid_size=(10, 11), window_size=WINDOW)


class TokensProjected(TorchFunctionMode):
    """Counts the vectors that go through attention's projections."""

    def __init__(self):
        super().__init__()
        self.counts = set()

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is F.linear:
            self.counts.add(arguments[0].numel() // arguments[0].shape[-1])
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("library", BLOCKS)
def test_no_padding_is_projected(library):
    block = make_block(library)
    x = torch.randn(1, 10, 11, DIM, dtype=torch.float64)
    with TokensProjected() as expected:
        block(x)
    model = patched(block)
    with TokensProjected() as found:
        model(x)
    assert expected.counts == {144, 110}  # padded windows in attention; the image in the MLP
    assert found.counts == {110, 1}  # and the bias of the values


def test_patching_and_back():
    block, whole = make_block("timm"), make_block("timm", window_size=0)
    model = nn.Sequential(block, whole, block)  # the first twice
    attention, keys = block.attn, list(model.state_dict())
    x = torch.randn(1, 10, 11, DIM, dtype=torch.float64)
    expected = model(x)
    calls = []
    block.register_forward_hook(lambda *_: calls.append(1))
    patch_model(model)
    assert model[0] is model[2]
    assert type(model[0]) is SAMWindowBlock
    assert type(model[1]) is samvit.Block
    assert list(model.state_dict()) == keys
    assert model[0].window_size == WINDOW
    assert [row.note for row in patch_report(model).layers] == ["windows read in place", "no image seen yet"]
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 2
    replacement = model[0]
    patch_model(model, LocalWindow(density=0.5))
    assert model[0] is replacement
    assert "; windows read in place" in patch_report(model).layers[0].note
    model.train()
    unpatch_model(model)
    assert model[0] is block is model[2]
    assert block.attn is attention
    assert block.training
    torch.testing.assert_close(model.eval()(x), expected)


def test_a_block_and_its_replacement_hold_the_same():
    """What was registered or set on one before or after patching is found on the other."""
    block = make_block("segment_anything")
    block.register_parameter("gain", nn.Parameter(torch.ones(DIM)))
    block.register_buffer("seen", torch.zeros(3), persistent=False)
    model = nn.Sequential(block)
    parameters, keys = set(model.parameters()), list(model.state_dict())
    patch_model(model)
    assert set(model.parameters()) == parameters
    assert list(model.state_dict()) == keys
    assert model[0].seen is block.seen
    model[0].shift = nn.Parameter(torch.ones(DIM))
    model[0].register_buffer("count", torch.zeros(1))
    model[0].layer_id = 7
    model.to(torch.float32)
    keys = list(model.state_dict())
    assert {"0.shift", "0.count"} < set(keys)
    twin = copy.deepcopy(model)
    for module in (model, twin):
        unpatch_model(module)
        assert type(module[0]) is segment_anything.Block
        assert list(module.state_dict()) == keys
        assert module[0].layer_id == 7
        assert module[0].seen.dtype == torch.float32
    assert model[0] is block


def test_only_blocks_with_patched_attention_are_replaced():
    model = nn.Sequential(make_block("timm"), make_block("timm"))
    patch_model(model, include="1.*")
    assert [type(block) for block in model] == [samvit.Block, SAMWindowBlock]
    patch_model(model, include="0.*")
    assert [type(block) for block in model] == [SAMWindowBlock, samvit.Block]


class SpecialBlock(segment_anything.Block):
    pass


def test_blocks_that_may_compute_something_else_are_left_alone():
    special, rebound = SpecialBlock(DIM, HEADS, window_size=WINDOW), make_block("segment_anything")
    rebound.forward = rebound.forward
    model = patch_model(nn.Sequential(special, rebound))
    assert [type(block) for block in model] == [SpecialBlock, segment_anything.Block]
    assert [row.note for row in patch_report(model).layers] == ["", ""]
    with pytest.raises(TypeError, match=r"block must be the Block of .*SpecialBlock"):
        SAMWindowBlock.from_module(special)
    with pytest.raises(ValueError, match=r"must have a positive window_size, got 0"):
        SAMWindowBlock.from_module(make_block("timm", window_size=0))


def test_a_block_of_a_patched_model_can_be_patched_again():
    model = patched(make_block("timm"))
    x = image(10, 11)
    expected = model(x)
    assert patch_model(model[0]) is model[0]
    assert type(model[0]) is SAMWindowBlock
    assert torch.equal(model(x), expected)


def test_unpatching_a_block_from_within():
    """The block itself cannot be replaced then, and must go on as the library's."""
    block = make_block("segment_anything")
    original = copy.deepcopy(block)
    model = patched(block)
    unpatch_model(model[0])
    assert type(model[0]) is SAMWindowBlock
    assert type(model[0].attn) is segment_anything.Attention
    assert_same(model[0], original, torch.randn(1, 10, 11, DIM, dtype=torch.float64))
    unpatch_model(model)
    assert model[0] is block


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_stand_by_themselves(way):
    model = patched(make_block("timm"))
    x = torch.randn(1, 10, 11, DIM, dtype=torch.float64)
    expected = model(x)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(twin(x), expected)
    unpatch_model(twin)
    assert type(twin[0]) is samvit.Block
    assert type(twin[0].attn) is samvit.Attention
    torch.testing.assert_close(twin(x), expected)
    assert type(model[0]) is SAMWindowBlock
    torch.testing.assert_close(model(x), expected)
