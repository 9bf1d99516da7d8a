"""The command ``choose``: what it prints and writes, in a process of its own and here, and what it refuses at once."""

import argparse
import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from sparse_attn_modules.patching import choose_inputs, measure_attention_mass, trade
from sparse_attn_modules.patching.choose import attention_of_query
from torch import nn

from sparse_attn_modules import CalibratedPattern, LocalWindow, TokenGrid, patch_model, viz
from sparse_attn_modules.__main__ import main

timm = pytest.importorskip("timm")
pytest.importorskip("matplotlib")
np = pytest.importorskip("numpy")

MODEL = """
import timm, torch

def make():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=128, patch_size=4, embed_dim=32, depth=2, num_heads=2,
                              num_classes=7)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model

def nothing():
    return "no model"

def fail():
    raise KeyError("weights")

size = 3
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photographs" / "below").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index, name in enumerate(("a.png", "b.jpg", "below/c.png", "d.bmp")):
        pixels = generator.integers(0, 256, (100 + 20 * index, 150, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photographs" / name)
    (tmp_path / "photographs" / "broken.jpg").write_text("no image")
    (tmp_path / "photographs" / "notes.txt").write_text("no image")
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def arguments(folder, **changes):
    options = {
        "model": f"{folder / 'model.py'}:make",
        "image-size": 128,
        "images": folder / "photographs",
        "out": folder / "out",
        "rounds": 1,
        "device": "cpu",
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [
        "choose",
        *(part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))),
    ]


def test_writes_mask_trade_and_pictures(folder):
    command = [sys.executable, "-m", "sparse_attn_modules", *arguments(folder, density=0.4)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout
    assert "4 photographs; measured on 1 of them kept back" in shown
    assert "could not be read" in shown
    assert "broken.jpg" in shown
    pattern = CalibratedPattern.load(folder / "out" / "mask.safetensors")
    assert pattern.density == pytest.approx(0.4, abs=0.01)
    assert pattern.images == 3
    rows = json.loads((folder / "out" / "trade.json").read_text())["rows"]
    # The blocks of the class token alone are 17 of 81, and every row keeps one more.
    assert [row["density"] for row in rows] == pytest.approx([0.5, 0.4, 0.31], abs=0.02)
    assert [row["mass"] for row in rows] == sorted((row["mass"] for row in rows), reverse=True)
    for row in rows:
        assert 0 < row["least_mass"] <= row["mass"] < 1
        assert 0 < row["cosine"] <= 1
        assert row["estimated_speedup"] > 1
        assert row["measured_speedup"] > 0
        assert f"{row['density']:.3f}  " in shown
    for name in ("density", "trade", "attention"):
        with Image.open(folder / "out" / f"{name}.png") as picture:
            assert picture.size[0] > 300

    sys.path.insert(0, str(folder))
    namespace = {}
    exec(MODEL, namespace)
    model = patch_model(namespace["make"]().eval(), pattern)
    assert model(torch.randn(1, 3, 128, 128)).shape == (1, 7)


def test_by_min_mass_and_with_few_photographs(folder, capsys):
    assert main(arguments(folder, min_mass=0.7, max_images=2, rounds=0)) == 0
    shown = capsys.readouterr().out
    assert "2 photographs; measured on the same ones, for want of others" in shown
    pattern = CalibratedPattern.load(folder / "out" / "mask.safetensors")
    assert all(mass >= 0.7 - 1e-6 for layer in pattern.layers for mass in layer.mass)
    rows = json.loads((folder / "out" / "trade.json").read_text())["rows"]
    chosen = min(rows, key=lambda row: abs(row["density"] - pattern.density))
    # What is measured on the images of calibration is what calibration found.
    assert chosen["mass"] == pytest.approx(pattern.mass_kept, abs=1e-5)
    assert all(row["measured_speedup"] is None for row in rows)


def test_models_of_timm_by_name(folder, capsys):
    assert main([*arguments(folder, model="test_vit", image_size=512, rounds=0, max_images=1), "--random-weights"]) == 0
    assert "test_vit with random weights, images of 512 × 512, cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "nowhere"}, "choose: images must be a folder, got nowhere"),
        ({"images": "{folder}/out"}, "choose: images must be a folder with images, got none in "),
        ({"model": "vit_of_nobody"}, "choose: model must be one of timm's, one of sam_vit_b, sam_vit_l, sam_vit_h, or"),
        ({"model": "vit_smal_patch16"}, "or path.py:function, got 'vit_smal_patch16'"),
        ({"model": "nowhere.py:make"}, "choose: model must be a file and a function in it, got nowhere.py"),
        (
            {"model": "test_vit.of_nobody"},
            "choose: model and image-size must be what timm can make, got test_vit.of_no",
        ),
        ({"model": "{folder}/model.py:take"}, "got 'take', which it does not have"),
        ({"model": "{folder}/model.py:size"}, "got 'size', which it does not have"),
        ({"model": "{folder}/model.py:nothing"}, "choose: model must be what nothing of .* returns, got str"),
        ({"image-size": None}, "choose: image-size must be given for a model from a file"),
        ({"image-size": "-3"}, "choose: image-size must be positive, got -3"),
        ({"checkpoint": "nowhere.pt"}, "choose: checkpoint must be a file, got nowhere.pt"),
        ({"model": "sam_vit_b", "image-size": None}, "choose: checkpoint must be given for sam_vit_b, got none"),
        ({"model": "sam_vit_b"}, "choose: image-size must be 1024 for sam_vit_b, got 128"),
        ({"density": 1.5}, r"choose: density must lie in \(0, 1\], got 1.5"),
        ({"rounds": "-1"}, "choose: rounds must be at least 0, got -1"),
        ({"max-images": 0}, "choose: max-images must be at least 1, got 0"),
        ({"out": "{folder}/model.py"}, "choose: out must be a folder, got"),
        ({"out": "{folder}/model.py/below"}, "choose: out must be a folder that can be written, got .*below: "),
        ({"device": "nonsense"}, "choose: device must be one that is here, got nonsense"),
        ({"device": "meta"}, "choose: device must be one that is here, got meta"),
        (
            {"model": "{folder}/broken.py:make"},
            r"choose: model must be in a file that runs, got .*: SyntaxError: .*line 1",
        ),
        ({"model": "{folder}/model.py:fail"}, "choose: model must be what fail of .* returns, got KeyError: 'weights'"),
        (
            {"checkpoint": "{folder}/model.py"},
            "choose: checkpoint must hold weights of .*model.py:make, got .*model.py: ",
        ),
        ({"checkpoint": "{folder}/other.pth"}, "choose: checkpoint must hold weights of .*: RuntimeError: "),
        (
            {"checkpoint": "{folder}/other.pth", "model": "test_vit"},
            "choose: checkpoint must hold weights of test_vit, got .*: RuntimeError: ",
        ),
        (
            {"checkpoint": "{folder}/other.pth", "model": "sam_vit_b", "image-size": None},
            "choose: checkpoint must hold weights of sam_vit_b, got .*: RuntimeError: ",
        ),
    ],
)
def test_refuses_before_anything_runs(folder, capsys, monkeypatch, changes, message):
    (folder / "out").mkdir()
    (folder / "broken.py").write_text("def make(:")
    torch.save({"other": torch.zeros(1)}, folder / "other.pth")
    if changes.get("model", "").startswith("sam") and "checkpoint" in changes:
        pytest.importorskip("segment_anything")
    monkeypatch.setattr(nn.Module, "__call__", lambda *inputs, **options: pytest.fail("a model ran"))
    changed = {
        name: value.format(folder=folder) if isinstance(value, str) else value for name, value in changes.items()
    }
    options = {"model": f"{folder / 'model.py'}:make", "image-size": 128, **changed}
    assert main(arguments(folder, **options)) == 1
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert not captured.out
    assert not list((folder / "out").iterdir())


def test_an_image_over_the_pixel_limit_cannot_be_read(folder, monkeypatch):
    Image.new("1", (400, 300)).save(folder / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    subject = choose_inputs.Subject(nn.Identity(), 32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    paths = [folder / "large.png", folder / "photographs" / "a.png"]
    images, unreadable = choose_inputs.read_images(paths, subject, 2)
    assert len(images) == 1
    assert unreadable == paths[:1]


@pytest.mark.parametrize(
    "changes", [{}, {"model": "test_vit"}, {"model": "swin_tiny_patch4_window7_224", "image-size": 2}]
)
def test_refuses_sizes_that_the_model_does_not_take(folder, capsys, changes):
    options = {"image-size": 3, **changes}
    assert main([*arguments(folder, **options), "--random-weights"]) == 1
    captured = capsys.readouterr()
    assert re.search(rf"choose: .*image-size must be .* {options['image-size']}: [A-Z]\w+", captured.err)
    assert not captured.out


def test_names_the_extra_that_is_missing(folder, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert main(arguments(folder)) == 1
    assert 'choose: matplotlib must be installed, but is not; pip install "sparse_attn_modules[viz]"' in (
        capsys.readouterr().err
    )


def test_photographs_are_cut_or_padded_to_squares_and_back():
    pixels = np.zeros((60, 120, 3), dtype=np.uint8)
    pixels[:, 30:90] = (200, 100, 50)
    picture = Image.fromarray(pixels)
    cut = choose_inputs.Subject(nn.Identity(), 60, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    image = cut.prepare(picture)
    assert image.shape == (3, 60, 60)
    expected = (torch.tensor([200, 100, 50]) / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.2, 0.1])
    torch.testing.assert_close(image, expected[:, None, None].expand(3, 60, 60))
    torch.testing.assert_close(cut.photograph(image), torch.tensor([200, 100, 50]).expand(60, 60, 3) / 255)
    padded = choose_inputs.Subject(nn.Identity(), 120, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), pads=True).prepare(picture)
    assert padded[:, 60:].abs().max() == 0
    torch.testing.assert_close(padded[:, :60, 30:90], expected[:, None, None].expand(3, 60, 60))


def test_flops_beside_attention_are_those_of_the_linear_layers():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=128, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=7
    ).eval()
    tokens, width = 1 + 32 * 32, 32
    per_block = 2 * tokens * width * (3 * width + width + 4 * width + 4 * width)
    embed, head = 2 * 1024 * width * 3 * 16, 2 * width * 7
    assert trade.other_flops(model, torch.randn(1, 3, 128, 128)) == 2 * per_block + embed + head


def test_rows_hold_what_their_names_say():
    namespace = {}
    exec(MODEL, namespace)
    model, x = namespace["make"]().eval(), torch.randn(2, 3, 128, 128)
    mass = measure_attention_mass(model, [x])
    pattern = mass.choose(density=0.4)
    (row,) = trade.trade(model, x, [pattern], mass, rounds=0)
    with torch.no_grad():
        dense = model(x)
        sparse = patch_model(model, pattern)(x)
    assert row.cosine == pytest.approx(float(torch.cosine_similarity(dense, sparse).mean()), abs=1e-5)
    local = [head for heads in mass.kept_by(LocalWindow(density=pattern.density)).values() for head in heads]
    assert row.local_mass == pytest.approx(sum(local) / len(local))
    assert row.mass == pytest.approx(pattern.mass_kept, abs=1e-5)
    assert row.least_mass == pytest.approx(min(min(layer.mass) for layer in pattern.layers), abs=1e-5)
    assert isinstance(argparse.Namespace(**row.as_dict()).density, float)


def test_attention_of_a_query_is_a_row_of_the_softmax():
    namespace = {}
    exec(MODEL, namespace)
    model, x, seen = namespace["make"]().eval(), torch.randn(1, 3, 128, 128), []
    model.blocks[1].attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    weights = attention_of_query(model, x, "blocks.1.attn", (3, 5))
    query, key, _ = seen[0][0].unflatten(-1, (3, 2, 16)).permute(1, 2, 0, 3)
    expected = (query[:, 1 + 3 * 32 + 5, None].double() @ key.double().mT / 4).softmax(-1)[:, 0]
    torch.testing.assert_close(weights.double(), expected, atol=1e-5, rtol=1e-4)


class TestPictures:
    def test_of_heads(self):
        figure = viz.plot_head_density([("a", [0.1, 0.9]), ("b", None)])
        shown = [text.get_text() for text in figure.axes[0].texts]
        assert shown == [".10", ".90", "dense"]
        with pytest.raises(ValueError, match="plot_head_density: layers must not be empty"):
            viz.plot_head_density([])
        with pytest.raises(ValueError, match="density must lie in"):
            viz.plot_head_density([("a", [1.5])])

    def test_of_the_trade(self):
        figure = viz.plot_trade([(0.5, 0.9, 0.99), (0.25, 0.8, 0.95)], chosen=0.25)
        for ax, values in zip(figure.axes, ([0.8, 0.9, 1.0], [0.95, 0.99, 1.0])):
            x, y = ax.lines[0].get_data()
            assert list(x) == [0.25, 0.5, 1.0]
            assert list(y) == values
        with pytest.raises(ValueError, match="plot_trade: points must not be empty"):
            viz.plot_trade([])

    def test_of_the_attention_of_a_query(self):
        grid = TokenGrid(16, 32, prefix=1)
        mask = LocalWindow(density=0.5).mask(grid, 2)
        weights = torch.rand(2, grid.num_tokens).softmax(-1)
        figure = viz.plot_query_attention(torch.rand(64, 128), weights, mask, (9, 20), title="here")
        token_mask = mask.token_mask()[0, 0, 1 + 9 * 32 + 20]
        share = float(weights[:, token_mask].sum() / 2)
        assert figure.axes[2].get_title() == f"kept: {share:.1%} of the weight"
        kept = torch.from_numpy(np.asarray(figure.axes[2].images[1].get_array()))
        assert torch.equal(kept > 0, token_mask[1:].view(16, 32))
        with pytest.raises(ValueError, match="weights must have shape"):
            viz.plot_query_attention(torch.rand(64, 128), weights[:, 1:], mask, (9, 20))
        with pytest.raises(ValueError, match=r"query row must lie in \[0, 16\), got 16"):
            viz.plot_query_attention(torch.rand(64, 128), weights, mask, (16, 20))
