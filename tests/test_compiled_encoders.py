"""Whole patched encoders under torch.compile, which makes as few graphs as of the original, and torch.export."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
from sparse_attn_modules.patching import patch_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_attn_modules.patterns import LocalWindow

samvit = pytest.importorskip("timm.models.vision_transformer_sam")


def sam():
    return samvit.VisionTransformerSAM(
        img_size=96,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        window_size=5,
        global_attn_indexes=(1,),
        use_rel_pos=True,
        neck_chans=16,
        num_classes=0,
    )


def dinov3():
    return timm.create_model("vit_small_patch16_dinov3", img_size=128, depth=1, num_classes=0, dynamic_img_size=True)


ENCODERS = {"samvit": (sam, (128, 160)), "dinov3": (dinov3, (160, 224))}


def make(name):
    model = ENCODERS[name][0]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def images(model, batch, size=None):
    return torch.randn(batch, 3, *(size or model.patch_embed.img_size))


@torch.no_grad()
def graphs(model, sizes, eager=None):
    """Number of graphs after each call of the compiled model, for batches of 2, 3 and 5 of each size."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for size in sizes:
        for batch in (2, 3, 5):
            x = images(model, batch, size)
            out = compiled(x)
            if eager is not None:
                torch.testing.assert_close(out, eager(x), atol=1e-4, rtol=1e-4)
            counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("name", ENCODERS)
def test_as_few_graphs_as_the_original(name):
    original = make(name)
    sizes = (None, ENCODERS[name][1])
    expected = graphs(original, sizes)
    found = graphs(patch_model(copy.deepcopy(original), LocalWindow(density=0.5)), sizes)
    assert found == expected
    assert found[2] == found[0]  # batches
    assert found[5] == found[3]


def test_eager_calls_in_between_change_nothing():
    model = patch_model(make("dinov3"))
    found = graphs(model, (None,), eager=model)
    assert found[2] == found[0]


def test_a_batch_as_large_as_a_mask_is_no_special_batch():
    """The grid has 2 × 1 tiles, which must not be taken for the 2 images of the first batch."""
    model = patch_model(make("samvit"), LocalWindow(density=0.5))
    assert model.blocks[1].attn.kept_masks[0].blocks.shape[2] == 2
    found = graphs(model, (None,))
    assert found[2] == found[0]


def test_replaced_parameters_are_followed():
    """What is kept of the tables must not be compiled in."""
    torch.compiler.reset()
    model = patch_model(make("samvit"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(model, 2)
    with torch.no_grad():
        before = compiled(x)
        for block in model.blocks:
            block.attn.rel_pos_h.mul_(3)
        after = compiled(x)
        torch.testing.assert_close(after, model(x))
    assert not torch.allclose(before, after)


@pytest.mark.parametrize(("name", "pattern"), [("samvit", LocalWindow(density=0.5)), ("dinov3", None)])
def test_exported_encoder_runs_in_a_fresh_process(name, pattern, tmp_path):
    model = patch_model(make(name), pattern)
    x = images(model, 2)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "encoder.pt2")
        torch.save((x, model(x)), tmp_path / "case.pt")
    program = f"""
import torch
import sparse_attn_modules
x, expected = torch.load({str(tmp_path / "case.pt")!r})
torch.testing.assert_close(torch.export.load({str(tmp_path / "encoder.pt2")!r}).module()(x), expected)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
