"""patch_report: as data and as a table."""

import pytest
import torch
from sparse_attn_modules.patching import patch_model, patch_report

from sparse_attn_modules.patterns import LocalWindow

timm = pytest.importorskip("timm")

DIM, HEADS = 48, 3
SIZE = (68, 160)  # 17 × 40 patches


def vit(name: str = "vit_tiny_patch16_224", **arguments) -> torch.nn.Module:
    sizes = {"patch_size": 4, "embed_dim": DIM, "depth": 2, "num_heads": HEADS, "num_classes": 5}
    return timm.create_model(name, **{**sizes, "img_size": SIZE, **arguments}).eval()


def test_numbers_are_those_of_the_token_mask():
    model = patch_model(vit(), {"blocks.0.*": LocalWindow(radius=2), "blocks.1.*": "dense"})
    sparse, dense = patch_report(model).layers
    tokens = 1 + 17 * 40
    # Two products of N × N × head_dim per head, two FLOPs per multiplication.
    assert dense.flops_before == dense.flops_after == sparse.flops_before == 2 * 2 * HEADS * tokens**2 * (DIM // HEADS)
    assert (dense.density, dense.note) == (1.0, "")

    y, x = torch.arange(17 * 40) // 40, torch.arange(17 * 40) % 40
    near = ((y[:, None] - y).abs() <= 2) & ((x[:, None] - x).abs() <= 2)
    tile = y // 8 * 3 + x // 16
    blocks = torch.zeros(9, 9, dtype=torch.bool)
    blocks[tile[near.nonzero()[:, 0]], tile[near.nonzero()[:, 1]]] = True
    pairs = int(blocks[tile[:, None], tile].sum()) + 2 * tokens - 1
    assert sparse.flops_after == pytest.approx(sparse.flops_before * pairs / tokens**2, abs=1)
    # The class token's block sees and is seen by everything.
    assert sparse.density == pytest.approx((int(blocks.sum()) + 19) / 100)
    report = patch_report(model)
    assert report.flops_before == 2 * dense.flops_before
    assert report.flops_after == dense.flops_after + sparse.flops_after


def test_prints_an_aligned_table():
    model = patch_model(vit("vit_base_patch16_siglip_224"), {"blocks.0.*": LocalWindow(radius=2)})
    lines = str(patch_report(model)).split("\n")
    header, row, total, left, *others = lines
    assert header.split() == ["layer", "kind", "grid", "heads", "pattern", "density", "attention", "FLOPs"]
    assert "LocalWindow(radius=2)" in row
    for title, cell in (("kind", "timm Attention"), ("grid", "17×40"), ("heads", "3 "), ("pattern", "LocalWindow")):
        assert row.index(cell) == header.index(title)
    assert "→" in row
    assert total.startswith("total")
    assert total.endswith("% saved")
    assert left == "left alone:"
    assert [line.split()[0] for line in others] == ["blocks.1.attn", "attn_pool"]
    assert "not selected for patching" in others[0]
    assert repr(patch_report(model)) == str(patch_report(model))


def test_windows_and_prefix_tokens_in_the_grid_column():
    model = timm.create_model(
        "samvit_base_patch16", patch_size=4, embed_dim=32, depth=2, num_heads=2, img_size=64, window_size=7
    )
    report = patch_report(patch_model(model, "local"))
    assert "9 × 7×7" in str(report)
    assert report.layers[0].flops_before == 4 * 32 * 49**2 * 9
    assert "1 + 17×40" in str(patch_report(patch_model(vit())))


def test_dynamic_grids_before_and_after_images():
    model = patch_model(vit(dynamic_img_size=True), "local")
    assert {(row.grid.height, row.grid.width) for row in patch_report(model).layers} == {(17, 40)}
    model(torch.randn(1, 3, 128, 100))
    report = patch_report(model)
    assert {(row.grid.height, row.grid.width) for row in report.layers} == {(32, 25)}
    assert report.layers[0].flops_before == 4 * DIM * 801**2
    model(torch.randn(1, 3, 32, 32))
    assert all("nothing to gain: 8×8 patches" in row.note and row.density == 1 for row in patch_report(model).layers)


def test_a_pattern_that_covers_the_whole_grid_gains_nothing():
    model = patch_model(vit(), LocalWindow(radius=100))
    (first, _) = patch_report(model).layers
    assert (first.density, first.note) == (1.0, "nothing to gain: the pattern covers every block of this grid")


def test_a_pattern_assigned_by_hand_is_reported_as_it_is():
    model = patch_model(vit(img_size=(64, 64)), LocalWindow(radius=0))
    assert patch_report(model).layers[0].density == 1
    model.blocks[0].attn.pattern = LocalWindow(radius=0)
    assert patch_report(model).layers[0].density < 1
    assert patch_report(model).layers[0].note == ""


def test_unpatched_models():
    report = patch_report(vit())
    assert report.layers == ()
    assert {row.reason for row in report.left_alone} == {"not selected for patching"}
    assert str(report).startswith("no attention layer is patched\nleft alone:\n  blocks.0.attn  timm Attention")
    assert str(patch_report(torch.nn.Linear(2, 2))) == "no attention layer is patched"


def test_a_part_of_a_patched_model():
    model = patch_model(vit(), {"blocks.0.*": LocalWindow(radius=2)})
    report = patch_report(model.blocks)
    (layer,) = report.layers
    assert (layer.name, layer.grid, layer.num_heads, layer.density) == ("0.attn", None, HEADS, None)
    assert (layer.pattern, layer.note) == (LocalWindow(radius=2), "the grid is not known from this part of the model")
    assert [row.name for row in report.left_alone] == ["1.attn"]
    assert "no attention layer is patched" not in str(report)


def test_a_report_changes_nothing():
    model = patch_model(vit(), "local")
    x = torch.randn(1, 3, *SIZE)
    expected = model(x)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    patch_report(model)
    assert all(vars(module) == before[name] for name, module in model.named_modules())
    torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
