"""The benchmark of fidelity on a tiny model: its masks, the mass that it says they keep, and its record."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("timm")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from sparse_attn_modules import Dense, DynamicTopK, LocalWindow, Random, TokenGrid, patch_model  # noqa: E402

SIZE = 256  # pixels; 32 × 32 patches are 8 tiles, and 8 strips of four rows


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


@pytest.fixture
def model():
    from testbed.model import create

    torch.manual_seed(0)
    model = create(SIZE, 64, 2, 2).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 4  # attention that is not nearly uniform
    return model


def attention(model, images):
    """The attention weights of the first block, written out: ``[B, heads, N, N]``."""
    with torch.no_grad():
        x = model.pos_drop(model.patch_embed(images) + model.pos_embed)
        block = model.blocks[0]
        query, key, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        return (query @ key.mT / 32**0.5).softmax(-1)


@pytest.mark.parametrize("pattern", [LocalWindow(density=0.4), Random(0.3), DynamicTopK(0.4)], ids=str)
@pytest.mark.parametrize("is_strips", [False, True], ids=["tiles", "strips"])
def test_the_mass_kept_against_attention_written_out(model, pattern, is_strips):
    from kept_mass import AttentionSample
    from raster_strips import patch_with_strips

    images = torch.randn(2, 3, SIZE, SIZE)
    weights = attention(model, images)
    sample = AttentionSample.of(model, [images])
    sample.calls = sample.calls[:1]
    (patch_with_strips if is_strips else patch_model)(model, pattern)
    density, mass = sample.kept_by(model)
    call = sample.calls[0][1]
    mask = model.blocks[0].attn.mask_for(call.query, call.key, call.query_grid, scale=call.scale)
    tokens = torch.arange(1024)
    block = tokens // 128 if is_strips else tokens // 32 // 8 * 2 + tokens % 32 // 16
    active = mask.blocks[..., block[:, None], block]  # [B | 1, heads | 1, N, N]
    assert density == pytest.approx(float(active.expand_as(weights).float().mean()), abs=1e-6)
    assert 0.2 < density < 0.5
    assert mass == pytest.approx(float((weights * active).sum(-1).mean()), abs=1e-5)
    assert mass < 0.99


def test_strips_are_consecutive_tokens(model):
    """A model patched with strips computes attention among them."""
    from raster_strips import RasterStrips, patch_with_strips

    grid = TokenGrid(32, 32)
    mask = RasterStrips(LocalWindow(density=0.3)).mask(grid, 2)
    assert mask.query_grid == mask.key_grid == TokenGrid(1, 1024, tile=(1, 128))
    offsets = torch.arange(8)[:, None] - torch.arange(8)
    assert not mask.blocks[0, 0][offsets.abs() > 2].any()
    assert mask.blocks[0, 0].diagonal().all()
    x = torch.randn(1, 1024, 64)
    dense = patch_model(model, Dense()).blocks[0].attn(x)
    x.requires_grad_(True)
    out = patch_with_strips(model, LocalWindow(density=0.3)).blocks[0].attn(x)
    assert (out - dense).abs().max() > 1e-3
    (gradient,) = torch.autograd.grad(out[0, 5].sum(), x)
    assert set(gradient[0].abs().sum(-1).nonzero().flatten().div(128, rounding_mode="floor").tolist()) == set(
        mask.blocks[0, 0, 0].nonzero().flatten().tolist()
    )


def test_the_record(monkeypatch, tmp_path, capsys, model):
    import block_selectors
    import fidelity
    import plot_fidelity
    import records
    from testbed.scenes import Setting

    monkeypatch.setattr(fidelity, "load", lambda device: model)
    monkeypatch.setattr(fidelity, "Setting", lambda: Setting(size=SIZE, digits=4, digit_sizes=(16, 90)))
    path = tmp_path / "fidelity-cpu.json"
    names = ["local", "butterfly", "random, strips", "calibrated", "dynamic top-k", "dynamic top-p"]
    assert set(names) < set(block_selectors.SELECTORS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = ["--device", "cpu", "--densities", "0.5", "0.25", "--selectors", *names]
    arguments += ["--tune", "dense", "calibrated", "--steps", "2", "--batch", "3", "--batches", "1"]
    arguments += ["--calibration", "2", "--mass", "1", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["fidelity.py", *arguments])
    fidelity.main()
    meta, rows = records.read(path)
    untuned = [row for row in rows if not row["tuned"]]
    assert [row["selector"] for row in rows] == [
        "dense", *["local"] * 2, "butterfly", *["random, strips"] * 2, *["calibrated"] * 2, *["dynamic top-k"] * 2,
        *["dynamic top-p"] * 3, "dense", "calibrated",
    ]  # fmt: skip
    assert (rows[0]["density"], rows[0]["mass"], rows[0]["agreement"]) == (1, 1, 100)
    for row in untuned[1:]:
        assert row["dense_accuracy"] == rows[0]["accuracy"]
        assert 0 < row["mass"] <= 1
        assert row["digits"] == rows[0]["digits"] > 4
        if row["kind"] != "dynamic" or row["target"] in (0.5, 0.25):
            assert row["target"] is None or row["density"] == pytest.approx(row["target"], abs=0.01)
    by_mass = [row for row in rows if row["selector"] == "dynamic top-p"]
    assert by_mass[0]["density"] >= by_mass[1]["density"] >= by_mass[2]["density"]
    assert meta["steps"] == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert records.table(rows, fidelity.COLUMNS) in capsys.readouterr().out
    plot_fidelity.draw(rows, records.caption(meta), tmp_path / "fidelity.svg")
    assert (tmp_path / "fidelity.svg").stat().st_size > 10_000


def test_the_summary_takes_the_best_of_each_static_kind():
    from fidelity_summary import summarize

    def row(selector, kind, accuracy, target=0.25, tuned=False):
        return {"selector": selector, "kind": kind, "accuracy": accuracy, "target": target, "tuned": tuned}

    rows = [row("dense", "dense", 98, 1.0)]
    rows += [row("local", "tiles", 62), row("random", "tiles", 72), row("local", "tiles", 90, 0.5)]
    rows += [row("local", "strips", 64), row("dynamic", "dynamic", 97), row("calibrated", "calibrated", 95)]
    rows += [row("local", "tiles", 57, 0.125), row("dynamic", "dynamic", 98.1, tuned=True)]
    assert [(row["selector"], row["accuracy"]) for row in summarize(rows)] == [
        ("dense", 98), ("local", 64), ("random", 72), ("calibrated", 95), ("dynamic", 97), ("local", 57),
        ("dynamic", 98.1),
    ]  # fmt: skip


def test_a_row_that_fails_does_not_cost_the_others(monkeypatch, tmp_path, model):
    import block_selectors
    import fidelity
    from testbed.scenes import Setting

    def broken(model, target, given):
        raise ValueError("no such blocks")

    monkeypatch.setattr(fidelity, "load", lambda device: model)
    monkeypatch.setattr(fidelity, "Setting", lambda: Setting(size=SIZE, digits=2, digit_sizes=(16, 40)))
    monkeypatch.setitem(block_selectors.SELECTORS, "random", block_selectors.Selector("random", "tiles", broken))
    arguments = ["--device", "cpu", "--densities", "0.5", "--selectors", "random", "local"]
    arguments += ["--batch", "2", "--batches", "1", "--calibration", "1", "--mass", "1"]
    arguments += ["--out", str(tmp_path / "f.json")]
    monkeypatch.setattr(sys, "argv", ["fidelity.py", *arguments])
    with pytest.raises(SystemExit, match="failed: random 0.5"):
        fidelity.main()
    assert '"selector": "local"' in (tmp_path / "f.json").read_text()
