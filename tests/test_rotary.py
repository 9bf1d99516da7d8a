"""Rotary position, written in place, against the rotation written out and against timm's."""

import pytest
import timm
import torch
from sparse_attn_modules.patching import patch_model

from sparse_attn_modules.modules.rotary import rotate

BATCH, HEADS, PREFIX, PATCHES, DIM = 2, 3, 4, 6, 8


def draw(dtype=torch.float64, leading=()):
    tensor = torch.randn(BATCH, PREFIX + PATCHES, 3, HEADS, DIM, dtype=dtype)[:, :, 0].transpose(1, 2)
    angle = torch.rand(*leading, PATCHES, DIM // 2) * 6
    return tensor, angle


def rope_of(angle, half, dtype):
    angle = torch.cat([angle, angle], -1) if half else angle.repeat_interleave(2, -1)
    return torch.cat([angle.sin(), angle.cos()], -1).to(dtype)


def as_complex_numbers(tensor, angle, half):
    """Pairs are complex numbers, and positions turn them."""
    patches = tensor[:, :, PREFIX:].double()
    shape = (*patches.shape[:-1], 2, DIM // 2) if half else (*patches.shape[:-1], DIM // 2, 2)
    pairs = patches.reshape(shape)
    pairs = pairs.mT.contiguous() if half else pairs.contiguous()
    turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angle), angle))
    turned = turned.mT if half else turned
    return torch.cat([tensor[:, :, :PREFIX].double(), turned.flatten(-2)], 2)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("leading", [(), (HEADS,), (BATCH, 1)], ids=str)
@pytest.mark.parametrize("way", ["copy", "overwrite", "autograd"])
def test_rotation(half, leading, way):
    tensor, angle = draw(leading=leading)
    rope = rope_of(angle.double(), half, torch.float64)
    expected, before = as_complex_numbers(tensor, angle.double(), half), tensor.clone()
    out = rotate(tensor.requires_grad_(way == "autograd"), rope, PREFIX, half, overwrite=way == "overwrite")
    torch.testing.assert_close(out, expected)
    if way == "overwrite":
        assert out is tensor
    else:
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wide_embedding_is_rounded_once(half, dtype):
    tensor, angle = draw(dtype)
    rope = rope_of(angle, half, torch.float32)
    exact = as_complex_numbers(tensor, angle.double(), half)
    for overwrite in (False, True):
        out = rotate(tensor.clone(), rope, PREFIX, half, overwrite=overwrite)
        assert out.dtype == dtype
        assert (out - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps / 2 + 1e-5


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "vit_base_patch16_rope_reg1_gap_256"]
)
def test_models_without_gradients(name):
    model = timm.create_model(name, img_size=64 if "14" not in name else 56, depth=2, num_classes=0).eval()
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    seen = []
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(patch_model(model)(x), expected)
        # What a hook has seen of the projection stays as it was.
        projection = next(module for part, module in model.named_modules() if part.endswith("attn.qkv"))
        handle = projection.register_forward_hook(
            lambda module, arguments, output: seen.append((output, output.clone()))
        )
        torch.testing.assert_close(model(x), expected)
        handle.remove()
    assert len(seen) == 1
    assert torch.equal(*seen[0])
