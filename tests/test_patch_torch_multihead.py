"""torchvision's ViT, patched, against the original."""

import copy

import pytest
import torch
from sparse_attn_modules.patching import patch_model, patch_report
from torch import nn

from sparse_attn_modules.modules import SparseMultiheadAttention
from sparse_attn_modules.patterns import CustomPattern

torchvision = pytest.importorskip("torchvision")
VisionTransformer = torchvision.models.VisionTransformer

HEADS, LAYERS = 2, 2


def vit(image_size: int = 44, kind: type = VisionTransformer) -> nn.Module:
    model = kind(image_size, 4, LAYERS, HEADS, 32, 48, num_classes=5).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def gradients(out: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad((out * weights).sum(), parameters)))


def assert_same(model: nn.Module, out: torch.Tensor, original: nn.Module, expected: torch.Tensor) -> None:
    torch.testing.assert_close(out, expected)
    found = gradients(out, model)
    for name, gradient in gradients(expected, original).items():
        torch.testing.assert_close(found[name], gradient, msg=name, atol=1e-9, rtol=1e-7)


def test_dense_reproduces_the_original():
    original = vit()
    model = patch_model(copy.deepcopy(original))
    assert sum(isinstance(module, SparseMultiheadAttention) for module in model.modules()) == LAYERS
    x = torch.randn(2, 3, 44, 44, dtype=torch.float64)
    assert_same(model, model(x), original, original(x))


def random_tiles(query_grid, key_grid, num_heads):
    generator = torch.Generator().manual_seed(query_grid.num_tokens)
    tiles = torch.rand(num_heads, query_grid.num_tiles, key_grid.num_tiles, generator=generator) < 0.3
    return tiles | torch.eye(query_grid.num_tiles, dtype=torch.bool)


def masked(model: nn.Module, side: int) -> nn.Module:
    """The original model with every attention under the token mask of ``random_tiles``."""
    across, down = -(-side // 16), -(-side // 8)

    class Grid:
        num_tokens = 1 + side * side
        num_tiles = across * down

    tile = torch.tensor([y // 8 * across + x // 16 for y in range(side) for x in range(side)])
    allowed = torch.ones(HEADS, Grid.num_tokens, Grid.num_tokens, dtype=torch.bool)
    allowed[:, 1:, 1:] = random_tiles(Grid, Grid, HEADS)[:, tile[:, None], tile[None]]

    def add_mask(module, args, kwargs):
        return args, {**kwargs, "attn_mask": (~allowed).repeat(args[0].shape[0], 1, 1)}

    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(add_mask, with_kwargs=True)
    return model


def test_sparse_equals_the_original_under_the_token_mask():
    original = vit(132)
    model = patch_model(copy.deepcopy(original), CustomPattern(random_tiles))
    x = torch.randn(1, 3, 132, 132, dtype=torch.float64)
    assert not torch.allclose(model(x), original(x))
    masked(original, 33)
    assert_same(model, model(x), original, original(x))


def test_report():
    layers = patch_report(patch_model(vit(132), "local")).layers
    assert [row.name for row in layers] == [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(LAYERS)]
    assert {(row.grid.prefix, row.grid.height, row.grid.width) for row in layers} == {(1, 33, 33)}
    assert all(row.density < 0.3 for row in layers)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.TransformerEncoderLayer(16, 2), "no model around it says how its tokens lie on a grid"),
        (vit(kind=type("Other", (VisionTransformer,), {})), "Other may lay out its tokens in a way of its own"),
        (
            nn.ModuleList([type("Special", (nn.MultiheadAttention,), {})(16, 2)]),
            "it is a subclass of nn.MultiheadAttention",
        ),
    ],
)
def test_other_models_are_left_alone(model, reason):
    with pytest.raises(ValueError, match=reason):
        patch_model(model)
