"""Calibration on the GPU: the masses and the choice of the CPU, up to ties; and a mask file that moves between them."""

import copy

import pytest
import timm
import torch
from sparse_attn_modules.patching import measure_attention_mass

from sparse_attn_modules import CalibratedPattern, calibrate, patch_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
samvit = pytest.importorskip("timm.models.vision_transformer_sam")


def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=(272, 640), depth=3, num_heads=3, num_classes=0)


def sam():
    return samvit.VisionTransformerSAM(
        img_size=320, patch_size=8, embed_dim=128, depth=2, num_heads=2, window_size=14, global_attn_indexes=(1,),
        use_rel_pos=True, neck_chans=16, num_classes=0,
    )  # fmt: skip


def drawn(encoder):
    torch.manual_seed(0)
    model = encoder().eval()
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "attn.qkv.weight" in name:
            parameter.data.mul_(4)
    size = (272, 640) if encoder is vit else (320, 320)
    return model, [torch.randn(2, 3, *size) for _ in range(2)]


@pytest.mark.parametrize("encoder", [vit, sam])
def test_agrees_with_the_cpu_up_to_ties(encoder, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, batches = drawn(encoder)
    here = measure_attention_mass(model, batches)
    there = measure_attention_mass(model.cuda(), batches)
    assert len(there.measured) == len(here.measured) >= 1
    for ours, theirs in zip(there.measured, here.measured):
        torch.testing.assert_close(ours.mass, theirs.mass, atol=1e-6, rtol=5e-3)
    for target in ({"density": 0.5}, {"density": 0.4}, {"min_mass": 0.9}):
        ours, theirs = there.choose(**target), here.choose(**target)
        assert ours.density == pytest.approx(theirs.density, abs=2e-3)
        assert ours.mass_kept == pytest.approx(theirs.mass_kept, abs=1e-4)
        different = [
            own.mass[a.chosen_blocks() != b.chosen_blocks()]
            for own, a, b in zip(here.measured, ours.sparse_layers, theirs.sparse_layers)
        ]
        tied = torch.cat(different)
        # What one chose and the other did not lies at the limit, where rounding decides.
        assert len(tied) <= 0.01 * sum(own.mass.numel() for own in here.measured)
        if "density" in target and len(tied):
            assert tied.max() - tied.min() <= 1e-4


@pytest.mark.parametrize("encoder", [vit, sam])
def test_a_file_moves_from_device_to_device_and_compiles(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.compiler.reset()
    model, batches = drawn(encoder)
    calibrate(copy.deepcopy(model).cuda(), batches, density=0.4).save(tmp_path / "mask.safetensors")
    pattern = CalibratedPattern.load(tmp_path / "mask.safetensors")
    expected = patch_model(copy.deepcopy(model), pattern)(batches[0]).detach()
    scale = expected.abs().max()
    patched = patch_model(model.cuda(), pattern)
    torch.testing.assert_close(patched(batches[0].cuda()).cpu(), expected, atol=float(1e-2 * scale), rtol=0)
    low = patched.bfloat16()
    with torch.no_grad():
        compiled = torch.compile(low, fullgraph=True)(batches[0].cuda().bfloat16())
    similarity = torch.cosine_similarity(compiled.float().cpu().flatten(1), expected.flatten(1))
    assert similarity.min() > 0.98
