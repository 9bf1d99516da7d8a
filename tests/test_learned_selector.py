"""Selectors that are trained: where they start, what reaches their parameters, and that training helps."""

import copy

import pytest
import timm
import torch
from sparse_attn_modules.patching.observing import AttentionCall, observing_attention
from sparse_attn_modules.patching.selector_training import attended_mass, divergence
from torch import nn

from sparse_attn_modules import (
    Dense,
    DynamicTopK,
    LearnedTopK,
    SAMAttentionSparse,
    SparseMultiheadAttention,
    TokenGrid,
    ViTSparseAttention,
    patch_model,
    patch_report,
    train_selectors,
    unpatch_model,
)
from sparse_attn_modules.modules.block_selector import BlockSelector

GRID = TokenGrid(13, 22, prefix=2, suffix=1, tile=(4, 8))


def call_of(grid, batch=2, heads=4, key_heads=2, width=8, **options):
    query = torch.randn(batch, heads, grid.num_tokens, width).cumsum(2) / 4
    key = torch.randn(batch, key_heads, grid.num_tokens, width).cumsum(2) / 4
    values = {"relative_position": None, "key_padding_mask": None, **options}
    return AttentionCall(query, key, grid, grid, 0.3, values["relative_position"], values["key_padding_mask"])


def vit(depth=2):
    sizes = {"img_size": (192, 384), "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": depth}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 20  # or every query would attend to everything alike
    return model


def test_untrained_it_chooses_as_dynamic_top_k_does():
    sizes = (GRID.height, GRID.width)
    relative = tuple(torch.randn(2, 4, GRID.num_tokens, size) for size in sizes)
    padding = torch.rand(2, GRID.num_tokens) < 0.3
    for options in ({}, {"relative_position": relative}, {"key_padding_mask": padding}):
        call = call_of(GRID, **options)
        arguments = (call.query, call.key, GRID)
        expected = DynamicTopK(density=0.4).select(*arguments, scale=0.3, **options)
        selector = BlockSelector(4, 8)
        mask = LearnedTopK(density=0.4).select(*arguments, scale=0.3, selector=selector, **options)
        assert torch.equal(mask.blocks, expected.blocks)
        nn.init.normal_(selector.weight)
        mask = LearnedTopK(density=0.4).select(*arguments, scale=0.3, selector=selector, **options)
        assert not torch.equal(mask.blocks, expected.blocks)


def test_attended_mass_is_that_of_dense_attention():
    padding = torch.rand(2, GRID.num_tokens) < 0.3
    call = call_of(GRID, key_padding_mask=padding)
    logits = call.query @ call.key.repeat_interleave(2, 1).mT * 0.3
    weights = logits.masked_fill(padding[:, None, None], -torch.inf).softmax(-1)
    owner = nn.functional.one_hot(GRID.block_of_token()).float()
    expected = owner.T @ weights @ owner / owner.sum(0)[:, None]
    torch.testing.assert_close(attended_mass(call), expected)


def test_the_divergence_reaches_every_kind_of_parameter_and_is_right():
    torch.manual_seed(torch.randint(1000, ()).item())
    call = call_of(GRID)
    selector = BlockSelector(4, 8).double()
    selector.weight.requires_grad_(True)
    divergence(selector, call).backward()
    grad = selector.weight.grad
    content = 8 + 2
    for rows, columns in ((slice(content), slice(content)), (slice(content), slice(content, None))):
        assert grad[:, rows, columns].abs().sum() > 0
        assert grad[:, columns, rows].abs().sum() > 0
    assert grad[:, content:, content:].abs().sum() > 0
    assert (grad.flatten(1).abs().sum(1) > 0).all()  # every head
    direction = torch.randn_like(grad)
    step = 1e-4
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            bent = copy.deepcopy(selector)
            bent.weight += sign * step * direction
            losses.append(float(divergence(bent, call)))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float((grad * direction).sum()), rel=0.05, abs=1e-4)


def kept_mass(model, images):
    """What the model's own choice of blocks keeps of the dense attention, averaged over layers."""
    calls, kept = [], []
    with observing_attention(model, lambda layer, call: calls.append(call)):
        model(images)
    for block, call in zip(model.blocks, calls):
        layer = block.attn
        mask = layer.pattern.select(call.query, call.key, call.query_grid, scale=call.scale, selector=layer.selector)
        kept.append((attended_mass(call) * mask.blocks).sum(-1).mean())
    return float(torch.stack(kept).mean())


def test_training_keeps_more_mass_and_leaves_the_model_alone():
    model = vit(depth=1)
    images = torch.randn(2, 3, 192, 384)
    images += nn.functional.interpolate(torch.randn(2, 3, 6, 12), size=(192, 384)) * 2
    patch_model(model, LearnedTopK(density=0.5))
    # Started from scores that mislead, as features of blocks may.
    nn.init.normal_(model.blocks[0].attn.selector.weight, std=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept_before = kept_mass(model, images)
    losses = train_selectors(model, [images], epochs=15, learning_rate=1e-2)
    assert len(losses) == 15
    assert losses[-1] < 0.9 * losses[0]
    assert kept_mass(model, images) > kept_before + 0.002
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith("selector.weight"), name
    assert not any(block.attn.selector.weight.requires_grad for block in model.blocks)
    assert all(block.attn.selector.weight.grad is None for block in model.blocks)


def test_selectors_live_in_the_state_dict_and_move_with_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = vit(depth=2)
    images = torch.randn(1, 3, 192, 384)
    plain_keys = set(model.state_dict())
    patch_model(model, LearnedTopK(density=0.6))
    names = [f"blocks.{i}.attn.selector.weight" for i in range(2)]
    assert set(model.state_dict()) - plain_keys == set(names)
    assert "LearnedTopK(density=0.6)" in str(patch_report(model))
    for block in model.blocks:
        nn.init.normal_(block.attn.selector.weight)
    expected = model.forward_features(images)
    state = model.state_dict()
    safetensors.save_file({name: state[name] for name in names}, tmp_path / "selectors.safetensors")

    fresh = copy.deepcopy(model)
    unpatch_model(fresh)
    assert set(fresh.state_dict()) == plain_keys
    patch_model(fresh, LearnedTopK(density=0.6))
    assert not torch.allclose(fresh.forward_features(images), expected, atol=1e-4)
    fresh.load_state_dict(safetensors.load_file(tmp_path / "selectors.safetensors"), strict=False)
    torch.testing.assert_close(fresh.forward_features(images), expected)
    # Another density takes the same selectors, as does assigning a pattern.
    selector = fresh.blocks[0].attn.selector
    patch_model(fresh, LearnedTopK(density=0.5))
    assert fresh.blocks[0].attn.selector is selector
    fresh.blocks[0].attn.pattern = DynamicTopK(density=0.3)
    fresh.blocks[0].attn.pattern = LearnedTopK(density=0.3)
    assert fresh.blocks[0].attn.selector is selector


def test_training_the_model_goes_past_the_selectors():
    model = patch_model(vit(depth=1), LearnedTopK(density=0.3)).train()
    model(torch.randn(1, 3, 192, 384)).square().sum().backward()
    attention = model.blocks[0].attn
    assert attention.qkv.weight.grad.abs().sum() > 0
    assert attention.selector.weight.grad is None


def test_every_layer_gets_one_and_can_be_compiled():
    grid = TokenGrid(10, 14, prefix=1, tile=(4, 4))
    pattern = LearnedTopK(density=0.4)
    tokens = torch.randn(2, grid.num_tokens, 24)
    layer = ViTSparseAttention(24, num_heads=3, pattern=pattern, grid=grid)
    multihead = SparseMultiheadAttention(24, 3, batch_first=True, grid=grid)
    multihead.pattern = pattern
    sam = SAMAttentionSparse(24, num_heads=3, use_rel_pos=True, input_size=(20, 24), pattern=pattern)
    for module in (layer, multihead, sam):
        assert module.selector.weight.shape[0] == 3
        nn.init.normal_(module.selector.weight)
    assert sam(torch.randn(1, 20, 24, 24)).isfinite().all()
    assert multihead(tokens, tokens, tokens, need_weights=False)[0].isfinite().all()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), layer(tokens), atol=1e-5, rtol=1e-4)
    layer.pattern = Dense()
    assert not torch.allclose(compiled(tokens), layer.proj(tokens), atol=1e-3)


def test_errors():
    with pytest.raises(TypeError, match="LearnedTopK.select: selector must be a BlockSelector, got None"):
        LearnedTopK(density=0.5).select(torch.randn(1, 1, 16, 8), torch.randn(1, 1, 16, 8), TokenGrid(4, 4))
    with pytest.raises(ValueError, match=r"LearnedTopK: density must lie in \(0, 1\], got 2"):
        LearnedTopK(density=2)
    model = vit(depth=1)
    with pytest.raises(ValueError, match="train_selectors: model must have layers with a selector"):
        train_selectors(model, [torch.randn(1, 3, 192, 384)])
    patch_model(model, LearnedTopK(density=0.5))
    with pytest.raises(ValueError, match="train_selectors: batches must hold at least one batch, got none"):
        train_selectors(model, [])
    with pytest.raises(ValueError, match="train_selectors: epochs must be an integer ≥ 1, got 0"):
        train_selectors(model, [torch.randn(1, 3, 192, 384)], epochs=0)
    with pytest.raises(TypeError, match="train_selectors: batches must hold tensors, got dict"):
        train_selectors(model, [{"images": 1}])
