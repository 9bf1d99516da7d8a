"""calibrate: masses against softmax written out in float64, choices against brute force, the model left as it was."""

import itertools

import pytest
import torch
from sparse_attn_modules.patching import AttentionMass, LayerMass, measure_attention_mass
from sparse_attn_modules.patching import calibration as calibration_module
from sparse_attn_modules.patching.observing import AttentionCall
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_attn_modules import (
    BlockMask,
    CalibratedPattern,
    Dense,
    LocalWindow,
    TokenGrid,
    calibrate,
    patch_model,
    patch_report,
    unpatch_model,
)

timm = pytest.importorskip("timm")
samvit = pytest.importorskip("timm.models.vision_transformer_sam")

HEADS = 3
SIZE = (68, 160)  # 17 × 40 patches: 9 tiles, those at the edge ragged
GRID = TokenGrid(17, 40, prefix=1)


def vit(name="vit_tiny_patch16_224", **arguments):
    sizes = {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": HEADS, "num_classes": 5}
    model = timm.create_model(name, **{**sizes, "img_size": SIZE, **arguments}).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # attention of random weights is next to uniform otherwise
    return model


def images(count=2, size=SIZE):
    return torch.randn(count, 3, *size)


def by_blocks(weights, query_grid, key_grid):
    """Token weights ``[H, Nq, Nk]`` summed over blocks ``[H, Q, K]``."""
    rows = torch.nn.functional.one_hot(query_grid.block_of_token(), query_grid.num_blocks).double()
    columns = torch.nn.functional.one_hot(key_grid.block_of_token(), key_grid.num_blocks).double()
    return rows.T @ weights.double() @ columns


def layer_mass(mass, grid, name="layer"):
    return LayerMass((name,), mass.shape[0], 16, grid, mass, (), "")


class TestMass:
    @pytest.mark.parametrize("chunk", [1, 1 << 24])
    def test_of_random_calls_is_that_of_the_softmax_written_out(self, drawn_case, oracle, monkeypatch, chunk):
        monkeypatch.setattr(calibration_module, "_CHUNK", chunk)
        for seed in torch.randint(2**31, (12,)).tolist():
            case = drawn_case(seed)
            scale = case.query.shape[-1] ** -0.5 if case.scale is None else case.scale
            grids = case.mask.query_grid, case.mask.key_grid
            call = AttentionCall(case.query, case.key, *grids, scale, case.relative_position, case.key_padding_mask)
            case.mask = BlockMask.dense(*grids)
            # With the identity for values, attention returns its weights.
            case.value = torch.eye(grids[1].num_tokens, dtype=torch.float64).expand(*case.key.shape[:2], -1, -1)
            weights, _ = oracle(case)
            expected = sum(by_blocks(image, *grids) for image in weights)
            torch.testing.assert_close(calibration_module.block_mass(call), expected, atol=1e-9, rtol=1e-9)

    def test_takes_memory_in_proportion_to_the_number_of_tokens(self, monkeypatch):
        monkeypatch.setattr(calibration_module, "_CHUNK", 1)

        class Largest(TorchDispatchMode):
            size = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                self.size = max(self.size, out.numel() if isinstance(out, torch.Tensor) else 0)
                return out

        for side in (32, 64):
            grid = TokenGrid(side, side)
            query, key = torch.randn(2, 1, 2, side * side, 4)
            with Largest() as largest:
                calibration_module.block_mass(AttentionCall(query, key, grid, grid, 0.5, None, None))
            assert largest.size == 2 * 128 * side * side

    def test_of_a_vit(self):
        model = vit().double()
        seen = []
        for block in model.blocks:
            block.attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
        batches = [images(2).double(), images(1).double()]
        for batch in batches:
            model(batch)
        result = measure_attention_mass(model, batches)
        assert result.images == 3
        for index, layer in enumerate(result.layers):
            total = torch.zeros(HEADS, 10, 10, dtype=torch.float64)
            for qkv in (seen[index], seen[2 + index]):
                query, key, _ = qkv.unflatten(-1, (3, HEADS, 16)).permute(2, 0, 3, 1, 4)
                weights = (query @ key.mT / 4).softmax(-1)
                total += sum(by_blocks(image, GRID, GRID) for image in weights)
            assert layer.names == (f"blocks.{index}.attn",)
            torch.testing.assert_close(layer.mass, total / (3 * GRID.num_tokens), atol=1e-9, rtol=1e-9)

    def test_of_segment_anything_includes_the_relative_position(self):
        model = samvit.VisionTransformerSAM(
            img_size=256, patch_size=8, embed_dim=32, depth=2, num_heads=2, window_size=14, global_attn_indexes=(1,),
            use_rel_pos=True, neck_chans=16, num_classes=0,
        ).double().eval()  # fmt: skip
        for name, parameter in model.named_parameters():
            if "rel_pos" in name:
                nn.init.normal_(parameter, std=0.5)
        layer, seen = model.blocks[1].attn, []
        layer.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
        x = images(1, (256, 256)).double()
        model(x)
        result = measure_attention_mass(model, [x])
        grid = TokenGrid(32, 32)
        query, key, _ = seen[0].view(1, 1024, 3, 2, 16).permute(2, 0, 3, 1, 4).flatten(1, 2)
        bias = samvit.get_decomposed_rel_pos_bias(query, layer.rel_pos_h, layer.rel_pos_w, (32, 32), (32, 32))
        weights = (query @ key.mT / 4 + bias.view(2, 1024, 1024)).softmax(-1)
        torch.testing.assert_close(result.layers[1].mass, by_blocks(weights, grid, grid) / 1024, atol=1e-9, rtol=1e-9)
        windows = result.layers[0]
        assert windows.mass is None
        assert "14×14 patches are 2 tiles" in windows.note
        pattern = result.choose(density=0.5)
        patch_model(model, pattern)
        first, second = patch_report(model).layers
        assert first.density == 1
        assert second.density == pytest.approx(0.5, abs=0.02)

    @pytest.mark.parametrize("kind", ["dinov3", "eva", "torchvision", "segment_anything"])
    def test_of_other_models_adds_up_to_one_and_comes_back_as_their_mask(self, kind):
        x = images(2, (128, 128))
        if kind == "torchvision":
            vision = pytest.importorskip("torchvision.models.vision_transformer")
            model = vision.VisionTransformer(128, 4, 2, 2, 32, 32, num_classes=3).eval()
        elif kind == "segment_anything":
            encoder = pytest.importorskip("segment_anything.modeling.image_encoder")
            model = encoder.ImageEncoderViT(
                img_size=128, patch_size=4, embed_dim=32, depth=3, num_heads=2, out_chans=8, use_rel_pos=True,
                window_size=14, global_attn_indexes=(0, 2),
            ).eval()  # fmt: skip
        else:
            name = {"dinov3": "vit_small_patch16_dinov3", "eva": "eva02_tiny_patch14_224"}[kind]
            model = timm.create_model(
                name, img_size=128, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3
            ).eval()
        result = measure_attention_mass(model, [x])
        assert len(result.measured) == 2
        for layer in result.measured:
            torch.testing.assert_close(layer.mass.sum((1, 2)), torch.ones(2).double(), atol=1e-5, rtol=0)
        pattern = result.choose(min_mass=0.7)
        patch_model(model, pattern)
        with torch.no_grad():
            assert all(part.isfinite().all() for part in [model(x)])
        for layer in patch_report(model).layers:
            assert layer.density == pytest.approx(pattern.layer(layer.name).density)

    def test_a_shared_layer_is_measured_once_and_named_in_all_its_places(self):
        model = vit()
        model.blocks[1].attn = model.blocks[0].attn
        result = measure_attention_mass(model, [images()])
        assert [layer.names for layer in result.layers] == [("blocks.0.attn", "blocks.1.attn")]
        torch.testing.assert_close(result.layers[0].mass.sum((1, 2)), torch.ones(HEADS).double(), atol=1e-5, rtol=0)
        patch_model(model, result.choose(density=0.5))
        assert model.blocks[0].attn is model.blocks[1].attn


class TestChoice:
    def test_no_other_choice_of_as_many_blocks_keeps_more(self):
        grid = TokenGrid(1, 3, tile=(1, 1))
        every = ((torch.arange(2**18)[:, None] >> torch.arange(18)) & 1).bool()
        every = every[every.view(-1, 6, 3).any(-1).all(-1)]  # choices that leave no row empty
        for _ in range(5):
            masses = [torch.rand(1, 3, 3).double(), torch.rand(1, 3, 3).double() ** 3]
            layers = [layer_mass(mass / mass.sum(), grid, str(index)) for index, mass in enumerate(masses)]
            flat = torch.cat([layer.mass.flatten() for layer in layers])
            for budget in (6, 9, 14):
                pattern = AttentionMass(tuple(layers), 1).choose(density=budget / 18)
                kept = sum(sum(layer.mass) for layer in pattern.layers)
                best = float((every[every.sum(-1) == budget].double() @ flat).max())
                assert sum(int(layer.chosen_blocks().sum()) for layer in pattern.layers) == budget
                assert kept == pytest.approx(best, abs=1e-5)

    def test_min_mass_takes_as_few_blocks_as_each_head_needs(self):
        grid = TokenGrid(1, 3, tile=(1, 1))
        for _ in range(10):
            mass = torch.rand(2, 3, 3).double() ** 4
            mass /= mass.sum((1, 2), keepdim=True)
            (layer,) = AttentionMass((layer_mass(mass, grid),), 1).choose(min_mass=0.9).layers
            blocks = layer.chosen_blocks()
            for head in range(2):
                assert layer.mass[head] >= 0.9 - 1e-6
                feasible = []
                for chosen in itertools.product([False, True], repeat=9):
                    own = torch.tensor(chosen).view(3, 3)
                    if own.any(-1).all() and mass[head][own].sum() >= 0.9:
                        feasible.append(int(own.sum()))
                assert int(blocks[head].sum()) == min(feasible)

    def test_whole_mass_keeps_all_that_has_any(self):
        mass = torch.rand(2, 4, 4).double()
        mass[0, 1, 2] = 0
        mass /= mass.sum((1, 2), keepdim=True)
        (layer,) = AttentionMass((layer_mass(mass, TokenGrid(2, 2, tile=(1, 1))),), 1).choose(min_mass=1).layers
        assert torch.equal(layer.chosen_blocks(), mass > 0)

    def test_extra_tokens_and_the_best_block_of_each_row_are_kept_whatever_the_budget(self):
        grid = TokenGrid(2, 3, prefix=1, suffix=1, tile=(1, 1))
        mass = torch.rand(2, 8, 8).double()
        mass[:, 3] *= 1e-9
        (layer,) = AttentionMass((layer_mass(mass, grid),), 1).choose(density=0.01).layers
        blocks = layer.chosen_blocks()
        assert blocks[:, [0, 7]].all()
        assert blocks[:, :, [0, 7]].all()
        inner = blocks[:, 1:7, 1:7]
        heaviest = mass.argmax(-1)[:, 1:7]
        for head, row in itertools.product(range(2), range(6)):
            best = int(heaviest[head, row])
            assert blocks[head, row + 1, best]
            assert int(inner[head, row].sum()) == (1 if 1 <= best <= 6 else 0)

    def test_global_heads_get_more_than_local_ones(self):
        local = torch.eye(16).double()[None] / 16
        everywhere = torch.full((1, 16, 16), 1 / 256).double()
        mass = torch.cat([local, everywhere])
        (layer,) = AttentionMass((layer_mass(mass, TokenGrid(4, 4, tile=(1, 1))),), 1).choose(density=0.3).layers
        densities = layer.chosen_blocks().double().mean((1, 2))
        assert densities[0] == 1 / 16
        assert densities.mean() == pytest.approx(0.3, abs=1 / 512)

    def test_mass_kept_by_any_pattern(self):
        grid = TokenGrid(4, 4, tile=(1, 1))
        mass = torch.rand(2, 16, 16).double()
        mass /= mass.sum((1, 2), keepdim=True)
        measured = AttentionMass((layer_mass(mass, grid),), 1)
        mask = LocalWindow(density=0.4).mask(grid, 2).blocks[0, 0]
        expected = [float(mass[head][mask].sum()) for head in range(2)]
        assert measured.kept_by(LocalWindow(density=0.4))["layer"] == pytest.approx(expected)
        chosen = measured.choose(density=0.4)
        assert measured.kept_by(chosen)["layer"] == pytest.approx(chosen.layers[0].mass, abs=1e-6)


class TestCalibrate:
    def test_keeps_more_than_static_patterns_of_its_density(self):
        model = vit()
        batches = [images() for _ in range(2)]
        for density in (0.5, 0.4):
            pattern = calibrate(model, batches, density=density)
            assert isinstance(pattern, CalibratedPattern)
            assert pattern.density == pytest.approx(density, abs=1 / 600)
            measured = measure_attention_mass(model, batches)
            local = LocalWindow(density=density)
            assert local.density_on(GRID) <= density + 0.06
            kept = [mass for masses in measured.kept_by(local).values() for mass in masses]
            assert pattern.mass_kept + 0.03 > sum(kept) / len(kept)
        target = calibrate(model, batches, min_mass=0.8)
        assert all(mass >= 0.8 - 1e-6 for layer in target.layers for mass in layer.mass)

    def test_layers_that_are_not_included_stay_dense(self):
        model = vit()
        pattern = calibrate(model, [images()], density=0.5, include="blocks.1*")
        assert [layer.is_dense for layer in pattern.layers] == [True, False]
        assert pattern.density == pytest.approx(0.5, abs=0.01)
        patch_model(model, pattern)
        assert [layer.density < 1 for layer in patch_report(model).layers] == [False, True]

    def test_takes_what_loaders_yield_and_a_forward_of_ones_own(self):
        model, x = vit(), images()
        expected = calibrate(model, [x], density=0.5)
        assert calibrate(model, [(x, torch.zeros(2))], density=0.5) == expected
        assert calibrate(model, iter([[x]]), density=0.5) == expected
        by_hand = calibrate(
            model, [{"pixels": x}], density=0.5, forward=lambda model, batch: model.forward_features(batch["pixels"])
        )
        assert by_hand == expected
        assert by_hand.images == 2
        few = calibrate(model, itertools.repeat(x), density=0.5, max_images=3)
        assert few.images == 4

    @pytest.mark.parametrize("before", [None, Dense(), LocalWindow(density=0.5), {"blocks.1*": LocalWindow(radius=3)}])
    def test_the_model_is_afterwards_as_it_was(self, before):
        model, x = vit(), images()
        if before is not None:
            patch_model(model, before)
        model.train()
        model.blocks[0].eval()

        def state():
            return [
                (name, id(module), module.training, list(module._forward_hooks), "attend" in vars(module))
                for name, module in model.named_modules()
            ]

        was, parameters = state(), [id(parameter) for parameter in model.parameters()]
        pattern = calibrate(model, [x], density=0.5)
        assert state() == was
        assert [id(parameter) for parameter in model.parameters()] == parameters
        assert all(parameter.grad is None for parameter in model.parameters())

        def breaks():
            yield x
            raise RuntimeError("the disk is full")

        with pytest.raises(RuntimeError, match="the disk is full"):
            calibrate(model, breaks(), density=0.5)
        assert state() == was
        # What was patched before makes no difference to what is measured.
        assert calibrate(unpatch_model(model), [x], density=0.5) == pattern

    def test_a_compiled_model_runs_eagerly_meanwhile(self):
        model, x = vit(), images()
        expected = calibrate(model, [x], density=0.5)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        out = compiled(x)
        assert calibrate(compiled, [x], density=0.5) == expected
        torch.testing.assert_close(compiled(x), out)

    def test_dropout_and_depth_do_not_disturb(self):
        model, x = vit(attn_drop_rate=0.5, drop_path_rate=0.9).train(), images()
        assert calibrate(model, [x], density=0.5) == calibrate(model, [x], density=0.5)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, r"calibrate: exactly one of density or min_mass must be given, got none"),
            ({"density": 0.5, "min_mass": 0.9}, r"exactly one of density or min_mass must be given"),
            ({"density": 0.0}, r"calibrate: density must lie in \(0, 1\], got 0.0"),
            ({"min_mass": 1.5}, r"calibrate: min_mass must lie in \(0, 1\], got 1.5"),
            ({"min_mass": float("nan")}, r"calibrate: min_mass must lie in"),
            ({"density": True}, r"calibrate: density must lie in"),
            ({"density": 0.5, "max_images": 0}, r"calibrate: max_images must be an integer ≥ 1, got 0"),
            ({"density": 0.5, "include": "layers.*"}, r"calibrate: 'layers.\*' must match the name of an attention"),
            ({"density": 0.5, "batches": []}, r"calibrate: batches must yield at least one image, got none"),
        ],
    )
    def test_of_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            calibrate(**{"model": vit(), "batches": [images()], **arguments})

    def test_of_types(self):
        with pytest.raises(TypeError, match="calibrate: model must be a torch.nn.Module, got str"):
            calibrate("vit", [images()], density=0.5)
        with pytest.raises(TypeError, match=r"batches must be an iterable of the model's inputs, such as \[images\]"):
            calibrate(vit(), images(), density=0.5)
        with pytest.raises(TypeError, match="batches must yield tensors, .* got dict"):
            calibrate(vit(), [{"pixels": images()}], density=0.5)
        with pytest.raises(TypeError, match="forward must be a function"):
            calibrate(vit(), [images()], density=0.5, forward="model")

    def test_of_models_with_nothing_to_calibrate(self):
        with pytest.raises(ValueError, match="calibrate: model must have an attention layer"):
            calibrate(nn.Linear(3, 3), [torch.zeros(1, 3)], density=0.5)
        small = vit(img_size=(32, 32))
        with pytest.raises(ValueError, match="skipping blocks can pay, got none: 8×8 patches are 1 tile"):
            calibrate(small, [images(1, (32, 32))], density=0.5)

    def test_of_images_of_several_sizes(self):
        model = vit(dynamic_img_size=True)
        with pytest.raises(
            ValueError, match="batches must be of images of one size, got 1 \\+ 17×40 .* and 1 \\+ 32×32"
        ):
            calibrate(model, [images(), images(1, (128, 128))], density=0.5)
