"""CalibratedPattern: its file, the models it is refused by and finds its way into, and what it survives."""

import copy
import io
import json
import logging
import pickle
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sparse_attn_modules.patching import measure_attention_mass
from torch import nn

from sparse_attn_modules import (
    CalibratedPattern,
    DensitySchedule,
    LocalWindow,
    TokenGrid,
    calibrate,
    notices,
    patch_model,
    patch_report,
    unpatch_model,
)
from sparse_attn_modules.patterns import CalibratedLayer
from sparse_attn_modules.patterns.calibrated_layer import pack_blocks, unpack_blocks

timm = pytest.importorskip("timm")

HEADS = 3
SIZE = (68, 160)  # 17 × 40 patches in 9 tiles
GRID = TokenGrid(17, 40, prefix=1)


def vit(name="vit_tiny_patch16_224", seed=0, **arguments):
    torch.manual_seed(seed)
    sizes = {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": HEADS, "num_classes": 5}
    return timm.create_model(name, **{**sizes, "img_size": SIZE, **arguments}).eval()


@pytest.fixture(scope="module")
def calibrated():
    return calibrate(vit(), [torch.randn(2, 3, *SIZE)], density=0.5)


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    caplog.set_level(logging.WARNING, "sparse_attn_modules")
    return caplog


def masked_output(model, pattern, x):
    """Of a model whose layers get masks by hand, one by one, in float64."""
    model = copy.deepcopy(model).double()
    handles = []
    for index, block in enumerate(model.blocks):
        mask = pattern.layer(f"blocks.{index}.attn").block_mask().token_mask()

        def forward(x, *rest, layer=block.attn, mask=mask, **options):
            query, key, value = layer.qkv(x).unflatten(-1, (3, HEADS, 16)).permute(2, 0, 3, 1, 4)
            logits = (query @ key.mT / 4).masked_fill(~mask, -torch.inf)
            return layer.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))

        handles.append(block.attn)
        block.attn.forward = forward
    return model(x.double())


class TestFile:
    def test_gives_back_what_was_saved_in_the_same_bytes(self, calibrated, tmp_path):
        first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        calibrated.save(first)
        loaded = CalibratedPattern.load(first)
        assert loaded == calibrated
        assert hash(loaded) == hash(calibrated)
        assert loaded.digest == calibrated.digest
        assert [layer.mass for layer in loaded.layers] == [layer.mass for layer in calibrated.layers]
        assert loaded.images == 2
        loaded.save(second)
        assert first.read_bytes() == second.read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]

    def test_can_be_read_by_the_safetensors_package(self, calibrated, tmp_path):
        calibrated.save(tmp_path / "a.safetensors")
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            metadata = file.metadata()
            assert sorted(file.keys()) == ["blocks.0.attn", "blocks.1.attn"]
            packed = file.get_tensor("blocks.1.attn")
        assert packed.shape == (HEADS, 10, 2)
        columns = torch.arange(10)
        blocks = (packed[..., columns // 8] >> (columns % 8)) & 1
        assert torch.equal(blocks.bool(), calibrated.layer("blocks.1.attn").chosen_blocks())
        assert float(metadata["density"]) == pytest.approx(calibrated.density, abs=1e-6)
        facts = json.loads(metadata["layers"])[0]
        assert (facts["name"], facts["heads"], facts["head_dim"]) == ("blocks.0.attn", HEADS, 16)
        assert facts["grid"] == {
            "height": 17,
            "width": 40,
            "prefix": 1,
            "suffix": 0,
            "tile_height": 8,
            "tile_width": 16,
        }

    @pytest.mark.parametrize("length", [1, 7, 8, 9, 33, 128])
    def test_bits(self, length):
        blocks = torch.rand(2, 3, length) < 0.5
        assert torch.equal(unpack_blocks(pack_blocks(blocks), blocks.shape), blocks)

    def test_dense_layers_and_unknown_grids(self, tmp_path):
        kept = CalibratedLayer(
            "b", 2, 16, TokenGrid(1, 9, tile=(1, 1)), pack_blocks(torch.rand(2, 9, 9) < 0.5), (0.5, 1.0)
        )
        pattern = CalibratedPattern((CalibratedLayer("a", 2, 16, None, None, (1.0, 1.0), (), "windows"), kept), 3)
        pattern.save(tmp_path / "a")
        loaded = CalibratedPattern.load(tmp_path / "a")
        assert loaded == pattern
        assert loaded.layers[0].note == "windows"
        assert pattern.mass_kept == 0.75

    def test_other_files_are_refused(self, calibrated, tmp_path):
        path = tmp_path / "a.safetensors"
        save_file({"x": torch.zeros(1)}, path, {"format": "pt"})
        with pytest.raises(
            ValueError, match=r"load: .*a.safetensors must have the format '.*CalibratedPattern' .* 'pt'"
        ):
            CalibratedPattern.load(path)
        for content in (
            b"",
            b"PK\x03\x04 and so on, longer",
            struct.pack("<Q", 10) + b"not a JSON",
            pickle.dumps(calibrated),
        ):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="must be a safetensors file, got"):
                CalibratedPattern.load(path)
        with pytest.raises(FileNotFoundError):
            CalibratedPattern.load(tmp_path / "none")

    def test_damaged_files_are_refused(self, calibrated, tmp_path):
        path = tmp_path / "a.safetensors"
        calibrated.save(path)
        content = path.read_bytes()
        path.write_bytes(content[:-5])
        with pytest.raises(ValueError, match="must be complete, got"):
            CalibratedPattern.load(path)
        for old, new in ((b'"version": "1"', b'"version": "9"'), (b'"heads\\": 3', b'"heads\\": 4'), (b"U8", b"I8")):
            assert old in content
            path.write_bytes(content.replace(old, new))
            with pytest.raises(ValueError, match="must be (of version 1, .* got '9'|complete, got)"):
                CalibratedPattern.load(path)


class TestUse:
    def test_each_layer_computes_its_own_blocks(self, calibrated):
        model, x = vit(), torch.randn(2, 3, *SIZE)
        expected = masked_output(model, calibrated, x)
        assert calibrated.layers[0].packed != calibrated.layers[1].packed
        patch_model(model, calibrated)
        torch.testing.assert_close(model(x).double(), expected, atol=1e-4, rtol=1e-4)
        densities = [layer.density for layer in patch_report(model).layers]
        assert densities == pytest.approx([layer.density for layer in calibrated.layers])
        assert "CalibratedLayer(name=blocks.1.attn)" in str(patch_report(model))

    def test_another_process_computes_the_same(self, calibrated, tmp_path):
        calibrated.save(tmp_path / "mask.safetensors")
        model, x = patch_model(vit(), calibrated), torch.randn(1, 3, *SIZE)
        torch.save((x, model(x), calibrated.digest), tmp_path / "expected.pt")
        program = f"""
import timm, torch
from sparse_attn_modules import CalibratedPattern, patch_model
torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=5,
                          img_size={SIZE}).eval()
pattern = CalibratedPattern.load("mask.safetensors")
x, expected, digest = torch.load("expected.pt")
torch.testing.assert_close(patch_model(model, pattern)(x), expected)
assert pattern.digest == digest
pattern.save("again.safetensors")
"""
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "mask.safetensors").read_bytes()

    def test_survives_copies_pickles_and_compilation(self, calibrated):
        x = torch.randn(1, 3, *SIZE)
        model = patch_model(vit(), calibrated)
        expected = model(x)
        torch.testing.assert_close(copy.deepcopy(model)(x), expected)
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        loaded = torch.load(stored, weights_only=False)
        torch.testing.assert_close(loaded(x), expected)
        assert loaded.blocks[0].attn.pattern == model.blocks[0].attn.pattern
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        assert pickle.loads(pickle.dumps(calibrated)) == calibrated

    def test_some_layers_by_include_or_by_mapping(self, calibrated):
        model = patch_model(vit(), calibrated, include="blocks.1*")
        assert [layer.name for layer in patch_report(model).layers] == ["blocks.1.attn"]
        patch_model(model, {"blocks.0*": calibrated, "*": LocalWindow(density=0.4)})
        first, second = patch_report(model).layers
        assert first.pattern == calibrated.layers[0]
        assert second.pattern == LocalWindow(density=0.4)

    def test_finds_its_layers_in_a_larger_model_and_a_smaller_one(self, calibrated):
        outer = nn.ModuleDict({"encoder": vit(), "head": nn.Linear(5, 2)})
        patch_model(outer, calibrated)
        assert outer["encoder"].blocks[1].attn.pattern.pattern == calibrated.layers[1]
        unpatch_model(outer)
        x = torch.randn(1, 3, *SIZE)
        of_outer = calibrate(outer, [x], density=0.5, forward=lambda model, batch: model["encoder"](batch))
        assert of_outer.layers[0].name == "encoder.blocks.0.attn"
        patch_model(outer, of_outer)
        model = patch_model(vit(), of_outer)
        assert model.blocks[0].attn.pattern.pattern == of_outer.layers[0]

    def test_looks_through_the_wrappers_of_torch(self, calibrated):
        model = vit()
        compiled = torch.compile(model, backend="eager")
        of_compiled = calibrate(compiled, [torch.randn(1, 3, *SIZE)], density=0.5)
        assert of_compiled.layers[0].name == "blocks.0.attn"
        wrapped = nn.Module()
        wrapped.module = compiled
        patch_model(wrapped, calibrated)
        assert model.blocks[1].attn.pattern.pattern == calibrated.layers[1]

    def test_two_places_that_fit_are_told_apart_by_include_alone(self, calibrated):
        pair = nn.ModuleDict({"student": vit(), "teacher": vit()})
        with pytest.raises(ValueError, match=r"must be found once in the model, got them under 'student.', 'teacher.'"):
            patch_model(pair, calibrated)
        patch_model(pair, calibrated, include="teacher.*")
        assert pair["teacher"].blocks[0].attn.pattern.pattern == calibrated.layers[0]
        assert type(pair["student"].blocks[0].attn).__module__.startswith("timm")
        outer = vit()
        outer.teacher = vit()
        for include, patched, untouched in (("blocks.*", outer, outer.teacher), ("teacher.*", outer.teacher, outer)):
            patch_model(outer, calibrated, include=include)
            assert patched.blocks[0].attn.pattern.pattern == calibrated.layers[0]
            assert type(untouched.blocks[0].attn).__module__.startswith("timm")

    def test_other_image_sizes_are_dense_with_one_notice(self, calibrated, said):
        model = vit(dynamic_img_size=True)
        x = torch.randn(1, 3, 96, 160)
        expected = model(x)
        patch_model(model, calibrated)
        assert not said.messages
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
        assert [message for message in said.messages if "CalibratedLayer" in message] == [
            "CalibratedLayer: attention is dense on 1 + 24×40 tokens in tiles of 8×16: its blocks were chosen on "
            "1 + 17×40 tokens in tiles of 8×16"
        ]
        torch.testing.assert_close(
            model(torch.ones(1, 3, *SIZE)).double(),
            masked_output(vit(dynamic_img_size=True), calibrated, torch.ones(1, 3, *SIZE)),
            atol=1e-4,
            rtol=1e-4,
        )

    def test_weights_may_differ_a_little_and_the_log_says_so_where_they_differ_by_much(self, calibrated, said):
        tuned = vit()
        for parameter in tuned.parameters():
            parameter.data.mul_(1 + 0.05 * torch.randn_like(parameter))
        patch_model(tuned.bfloat16(), calibrated)
        assert not said.messages
        for seed in (1, 2):
            patch_model(vit(seed=seed), calibrated)
        assert said.messages == [
            "CalibratedPattern: the weights of the model are not those it was calibrated with: the blocks that were "
            "chosen may not be where its attention lies"
        ]


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"depth": 1}, "must be of this model, whose attention layers are 'blocks.0.attn', got one with 1 more: "
             "'blocks.1.attn'"),
            ({"depth": 3}, "must know every attention layer of this model, .* of 2 layers without 'blocks.2.attn'"),
            ({"num_heads": 6}, "blocks.0.attn must have 3 heads, as calibrated, got 6"),
            ({"embed_dim": 96}, "blocks.0.attn must have 16 channels per head, as calibrated, got 32"),
            ({"img_size": (64, 160)}, r"blocks.0.attn must work on the grid of calibration, 1 \+ 17×40 tokens in tiles "
             r"of 8×16, got 1 \+ 16×40"),
            ({"class_token": False, "global_pool": "avg"}, r"grid of calibration, 1 \+ 17×40 .*, got 17×40"),
            ({"class_token": False, "global_pool": "avg", "dynamic_img_size": True}, "must work on the grid"),
            ({"patch_size": 8}, "must work on the grid of calibration"),
        ],
    )  # fmt: skip
    def test_of_other_models_name_the_difference(self, calibrated, arguments, message):
        model = vit(**arguments)
        before = {name: id(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match=f"CalibratedPattern: .*{message}"):
            patch_model(model, calibrated)
        assert {name: id(module) for name, module in model.named_modules()} == before

    def test_of_models_of_other_names(self, calibrated):
        class Other(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = vit()
                self.inner.layers = self.inner.blocks
                del self.inner.blocks

        with pytest.raises(
            ValueError, match="whose attention layers are 'inner.layers.0.attn', .* got one of 2 layers"
        ):
            patch_model(Other(), calibrated)

    def test_of_layers_that_cannot_be_patched(self, calibrated):
        model = vit()
        model.blocks[1].attn.forward = lambda x, **options: x
        with pytest.raises(ValueError, match="must be a layer that can be patched, got one that cannot: its forward"):
            patch_model(model, calibrated)

    def test_of_use_as_the_pattern_of_a_layer(self, calibrated):
        with pytest.raises(
            ValueError, match="must be given to patch_model as it is, .* got a single layer with 3 heads"
        ):
            calibrated.mask(GRID, 3)
        with pytest.raises(ValueError, match="num_heads must be 3 for blocks.0.attn, got 4"):
            calibrated.layers[0].mask(GRID, 4)
        with pytest.raises(KeyError, match=r"name must be one of \['blocks.0.attn', 'blocks.1.attn'\], got 'head'"):
            calibrated.layer("head")

    def test_of_a_density_schedule(self, calibrated):
        model = patch_model(vit(), calibrated)
        with pytest.raises(ValueError, match=r"must be given as a function of the density .* blocks.0.attn"):
            DensitySchedule(model, {0: 1.0, 3: 0.5})
        assert DensitySchedule(model, {0: 0.5}, pattern=LocalWindow(density=0.5)).density == 0.5

    def test_of_layers_that_do_not_add_up(self):
        with pytest.raises(ValueError, match="packed must hold 60 bytes for 3 heads .* got 4 for a"):
            CalibratedLayer("a", 3, 16, GRID, b"1234", ())
        layer = CalibratedLayer("a", 3, 16, None, None, ())
        with pytest.raises(ValueError, match="layers must have distinct names"):
            CalibratedPattern((layer, layer))


def test_equal_patterns_share_their_masks(calibrated, tmp_path):
    calibrated.save(tmp_path / "a")
    loaded = CalibratedPattern.load(tmp_path / "a")
    assert loaded.layers[0].mask(GRID, HEADS) is calibrated.layers[0].mask(GRID, HEADS)
    other = measure_attention_mass(vit(), [torch.randn(1, 3, *SIZE)]).choose(density=0.4)
    assert other != calibrated
    assert other.digest != calibrated.digest
