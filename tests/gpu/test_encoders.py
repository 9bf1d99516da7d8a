"""Patched encoders on the GPU: as accurate as the originals, also in CUDA graphs, which must follow the parameters."""

import copy

import pytest
import timm
import torch
from torch import nn

from sparse_attn_modules import patch_model, patterns, relative_position

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
samvit = pytest.importorskip("timm.models.vision_transformer_sam")


def sam():
    return samvit.VisionTransformerSAM(
        img_size=320,
        patch_size=8,
        embed_dim=128,
        depth=2,
        num_heads=2,
        window_size=14,
        global_attn_indexes=(1,),
        use_rel_pos=True,
        neck_chans=16,
        num_classes=0,
    )


def dinov3():
    return timm.create_model("vit_small_patch16_dinov3", img_size=320, depth=2, num_classes=0)


def make(encoder):
    model = encoder().cuda().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.3)
        elif "gamma" in name:
            nn.init.ones_(parameter)
    return model


@pytest.mark.parametrize("encoder", [sam, dinov3])
@pytest.mark.parametrize("mode", ["eager", "compiled", "graphs"])
def test_as_accurate_as_the_original(encoder, mode):
    torch.compiler.reset()
    original = make(encoder)
    x = torch.randn(3, 3, 320, 320, device="cuda")
    expected = original(x)
    low = copy.deepcopy(original).bfloat16()
    allowed = (low(x.bfloat16()) - expected).abs().max()
    model = patch_model(low, backend="cuda")
    if mode != "eager":
        options = {"mode": "reduce-overhead"} if mode == "graphs" else {}
        model = torch.compile(model, fullgraph=True, **options)
    for _ in range(3):
        out = model(x.bfloat16()).clone()
        assert (out - expected).abs().max() <= 2 * allowed + 1e-5


@pytest.mark.parametrize("pattern", ["dense", "local"])
def test_a_first_call_in_cuda_graphs(pattern):
    """What is kept of it for later calls must not lie in the memory of the graphs, which is reused."""
    torch.compiler.reset()
    relative_position._distances.cache_clear()
    patterns.base._cached_mask.cache_clear()
    model = patch_model(make(sam).bfloat16(), pattern, backend="cuda")
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(2, 3, 320, 320, device="cuda", dtype=torch.bfloat16)
    for _ in range(4):
        torch.testing.assert_close(compiled(x).clone(), model(x), atol=0.05, rtol=0.05)


def test_graphs_follow_the_tables():
    torch.compiler.reset()
    model = patch_model(make(sam).bfloat16(), backend="cuda")
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(2, 3, 320, 320, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        before = compiled(x).clone()
    for block in model.blocks:
        block.attn.rel_pos_w.neg_()
    after = compiled(x).clone()
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, model(x), atol=0.05, rtol=0.05)
