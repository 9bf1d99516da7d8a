"""SparseMultiheadAttention inside PyTorch's transformer layers, whose fused paths would go past it."""

import copy
import pickle

import pytest
import torch
from torch import nn

from sparse_attn_modules import TokenGrid
from sparse_attn_modules.modules import SparseMultiheadAttention
from sparse_attn_modules.patterns import CustomPattern

DIM, HEADS = 24, 4


def random_blocks(query_grid, key_grid, num_heads):
    generator = torch.Generator().manual_seed(query_grid.num_patches)
    blocks = torch.rand(num_heads, query_grid.num_tiles, key_grid.num_tiles, generator=generator) < 0.5
    blocks[:, :, 0] = True  # so that the original, given the same mask, has no empty rows
    return blocks


RANDOM = CustomPattern(random_blocks)


def sparse_encoder(layers=2, pattern=RANDOM, **arguments):
    """An encoder in eval mode, with the original and with sparse attention."""
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 32, batch_first=True, dtype=torch.float64, **arguments)
    original = nn.TransformerEncoder(layer, layers).eval()
    for name, parameter in original.named_parameters():
        if "in_proj" in name:  # large logits, so that it matters which keys are seen
            nn.init.normal_(parameter)
    sparse = copy.deepcopy(original)
    for encoder_layer in sparse.layers:
        encoder_layer.self_attn = SparseMultiheadAttention.from_module(encoder_layer.self_attn, pattern)
    return original, sparse


def pair_mask(mask, batch):
    return ~mask.token_mask().expand(batch, HEADS, -1, -1).flatten(0, 1)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fused_fast_path_of_an_encoder_is_not_taken(copied, norm_first):
    original, sparse = sparse_encoder(norm_first=norm_first)
    if copied:
        sparse = pickle.loads(pickle.dumps(copy.deepcopy(sparse)))
    x = torch.randn(2, 300, DIM, dtype=torch.float64)
    mask = RANDOM.mask(TokenGrid.sequence(300), HEADS)
    with torch.inference_mode():
        actual, expected, dense = sparse(x), original(x, mask=pair_mask(mask, 2)), original(x)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
    assert (expected - dense).abs().max() > 0.05
    # The same weights without the guard go past the layer: what this test would miss if it could not fail.
    for layer in sparse.layers:
        layer.self_attn._qkv_same_embed_dim = True
    with torch.inference_mode():
        torch.testing.assert_close(sparse(x), dense, rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_an_encoder_that_makes_nested_tensors_of_padding():
    original, sparse = sparse_encoder()
    assert sparse.use_nested_tensor
    x = torch.randn(2, 300, DIM, dtype=torch.float64)
    padding = torch.zeros(2, 300, dtype=torch.bool)
    padding[1, 170:] = True
    mask = RANDOM.mask(TokenGrid.sequence(300), HEADS)
    with torch.inference_mode():
        actual = sparse(x, src_key_padding_mask=padding)
        original.use_nested_tensor = False
        pairs = pair_mask(mask, 2).unflatten(0, (2, HEADS)) | padding[:, None, None]
        expected = original(x, mask=pairs.flatten(0, 1))
    torch.testing.assert_close(actual[~padding], expected[~padding], rtol=1e-8, atol=1e-9)
    assert (actual[padding] == 0).all()


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_nested_tensors_keep_their_place_on_a_grid():
    _, sparse = sparse_encoder()
    grid = TokenGrid(20, 16, tile=(4, 16))
    for layer in sparse.layers:
        layer.self_attn.grid = grid
    x = torch.randn(2, 320, DIM, dtype=torch.float64)
    padding = torch.zeros(2, 320, dtype=torch.bool)
    padding[0, 200:] = padding[1, 290:] = True  # the longest sequence is shorter than the grid
    with torch.inference_mode():
        actual = sparse(x, src_key_padding_mask=padding)
        sparse.use_nested_tensor = False
        expected = sparse(x, src_key_padding_mask=padding)
        for layer in sparse.layers:
            layer.self_attn.grid = None
        elsewhere = sparse(x, src_key_padding_mask=padding)
    torch.testing.assert_close(actual[~padding], expected[~padding], rtol=1e-8, atol=1e-9)
    assert (elsewhere - expected)[~padding].abs().max() > 0.05


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_an_encoder_built_from_a_sparse_layer():
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 32, batch_first=True, dtype=torch.float64)
    layer.self_attn = SparseMultiheadAttention.from_module(layer.self_attn, RANDOM)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.zeros(2, 300, dtype=torch.bool)
    padding[1, 170:] = True
    x = torch.randn(2, 300, DIM, dtype=torch.float64)
    with torch.inference_mode():
        short = encoder(x, src_key_padding_mask=padding)
        changed = x.clone()
        changed[1, 170:] = 5
        torch.testing.assert_close(encoder(changed, src_key_padding_mask=padding)[~padding], short[~padding])
        assert (encoder(x) - short)[1].abs().max() > 0.01


def test_decoder_layer():
    original = nn.TransformerDecoderLayer(DIM, HEADS, 32, dropout=0.0, batch_first=True).double()
    sparse = copy.deepcopy(original)
    for name in ("self_attn", "multihead_attn"):
        setattr(sparse, name, SparseMultiheadAttention.from_module(getattr(sparse, name)))
    x, memory = torch.randn(2, 20, DIM, dtype=torch.float64), torch.randn(2, 33, DIM, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(20, dtype=torch.float64)
    arguments = {"tgt_mask": causal, "tgt_is_causal": True}
    torch.testing.assert_close(sparse(x, memory, **arguments), original(x, memory, **arguments), rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_nested_input_elsewhere_is_refused():
    sparse = SparseMultiheadAttention(DIM, HEADS, batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(5, DIM), torch.randn(3, DIM)])
    assert sparse(nested, nested, nested, need_weights=False)[0].is_nested
    jagged = torch.nested.nested_tensor([torch.randn(5, DIM), torch.randn(3, DIM)], layout=torch.jagged)
    other = torch.nested.nested_tensor([torch.randn(5, DIM), torch.randn(3, DIM)])
    for tensors, arguments in (
        ((nested,) * 3, {}),
        ((nested, other, other), {"need_weights": False}),
        ((jagged,) * 3, {"need_weights": False}),
    ):
        with pytest.raises(ValueError, match="query must not be nested but for self-attention"):
            sparse(*tensors, **arguments)
