"""Patched timm models against the originals: exact where dense, equal to masked attention where sparse."""

import copy
import logging
import threading

import pytest
import torch
from sparse_attn_modules.patching import patch_model, patch_report, unpatch_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from sparse_attn_modules import notices
from sparse_attn_modules.modules import SAMAttentionSparse, ViTSparseAttention
from sparse_attn_modules.patterns import CustomPattern, LocalWindow

timm = pytest.importorskip("timm")

HEADS = 2
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": HEADS, "num_classes": 5}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {"img_size": (48, 80)}, (48, 80)),
    "vit, dynamic": ("vit_tiny_patch16_224", {"dynamic_img_size": True}, (48, 112)),
    "vit, dynamic, padded": ("vit_tiny_patch16_224", {"dynamic_img_size": True, "dynamic_img_pad": True}, (50, 99)),
    "deit": ("deit_tiny_patch16_224", {"img_size": (48, 80)}, (48, 80)),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {"img_size": (48, 80)}, (48, 80)),
    "deit3": ("deit3_small_patch16_224", {"img_size": (48, 80)}, (48, 80)),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": (42, 70)}, (42, 70)),
    "dinov2, registers": ("vit_small_patch14_reg4_dinov2", {"dynamic_img_size": True}, (70, 98)),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": (48, 80)}, (48, 80)),
    "rope": ("vit_small_patch16_rope_224", {"img_size": (48, 80)}, (48, 80)),
    "rope, mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": (48, 80)}, (48, 80)),
    "rope, registers": ("vit_medium_patch16_rope_reg1_gap_256", {"img_size": (48, 80)}, (48, 80)),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": (42, 70)}, (42, 70)),
    "eva02, large": ("eva02_large_patch14_224", {"dynamic_img_size": True}, (56, 98)),
    "eva": ("eva_large_patch14_196", {"img_size": (42, 70)}, (42, 70)),
    "dinov3": ("vit_small_patch16_dinov3", {}, (48, 80)),
    "dinov3, biases": ("vit_small_patch16_dinov3_qkvb", {}, (64, 48)),
    "sapiens2, grouped queries": (
        "vit_base_patch16_sapiens2",
        {"img_size": (48, 80), "num_kv_heads": (None, 1)},
        (48, 80),
    ),
    "samvit": (
        "samvit_base_patch16",
        {"img_size": 96, "window_size": 4, "global_attn_indexes": (1,)},
        (96, 96),
    ),
    "samvit, other size": (
        "samvit_base_patch16",
        {"img_size": 96, "window_size": 4, "global_attn_indexes": (1,)},
        (80, 112),
    ),
}
# Families whose patch embedding can be shrunk to get many patches from a small image.
SPARSE = {
    "vit": ("vit_tiny_patch16_224", {"img_size": (68, 160), "patch_size": 4}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {"img_size": (68, 160), "patch_size": 4}),
    "dinov2, registers": ("vit_small_patch14_reg4_dinov2", {"dynamic_img_size": True, "patch_size": 4}),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": (68, 160), "patch_size": 4}),
    "rope, mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": (68, 160), "patch_size": 4}),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": (68, 160), "patch_size": 4}),
    "dinov3": ("vit_small_patch16_dinov3", {"patch_size": 4}),
    "samvit": (
        "samvit_base_patch16",
        {"img_size": 128, "patch_size": 4, "window_size": 7, "global_attn_indexes": (1,)},
    ),
}


def create(name: str, arguments: dict, dtype=torch.float64) -> nn.Module:
    """A small variant with random weights large enough that attention is far from uniform."""
    model = timm.create_model(name, pretrained=False, **{**SMALL, **arguments}).to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def gradients(out: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor | None]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True)))


def assert_same_gradients(found: dict, expected: dict, **tolerance) -> None:
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, msg=name, **tolerance)


def attention_classes(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, (ViTSparseAttention, SAMAttentionSparse))}


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_reproduces_the_original(family):
    name, arguments, size = FAMILIES[family]
    model = create(name, arguments)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = model(x)
    expected_gradients = gradients(expected, model)
    assert patch_model(model) is model
    assert attention_classes(model) == {SAMAttentionSparse if "samvit" in family else ViTSparseAttention}
    out = model(x)
    torch.testing.assert_close(out, expected)
    assert_same_gradients(gradients(out, model), expected_gradients, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("family", ["vit", "eva02", "dinov3", "samvit"])
def test_dense_reproduces_the_original_in_float32(family):
    name, arguments, size = FAMILIES[family]
    model = create(name, arguments, torch.float32)
    x = torch.randn(2, 3, *size)
    exact = copy.deepcopy(model).double()(x.double())
    error = (model(x) - exact).abs().max()
    assert (patch_model(model)(x) - exact).abs().max() <= 2 * error + 1e-5


def random_tiles(query_grid, key_grid, num_heads):
    generator = torch.Generator().manual_seed(query_grid.num_tokens)
    tiles = torch.rand(num_heads, query_grid.num_tiles, key_grid.num_tiles, generator=generator) < 0.3
    return tiles | torch.eye(query_grid.num_tiles, dtype=torch.bool)


class MaskedSoftmax(TorchFunctionMode):
    """Makes the softmax of unfused attention over a whole grid leave out what ``random_tiles`` leaves out."""

    def __init__(self, height: int, width: int, prefix: int, heads: int) -> None:
        super().__init__()
        across, down = -(-width // 16), -(-height // 8)

        class Grid:
            num_tokens = prefix + height * width
            num_tiles = across * down

        tiles = random_tiles(Grid, Grid, heads)
        tile = torch.tensor([y // 8 * across + x // 16 for y in range(height) for x in range(width)])
        self.allowed = torch.ones(heads, Grid.num_tokens, Grid.num_tokens, dtype=torch.bool)
        self.allowed[:, prefix:, prefix:] = tiles[:, tile[:, None], tile[None]]
        self.calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.softmax and args[0].shape[-2:] == self.allowed.shape[-2:]:
            self.calls += 1
            logits = args[0]
            by_head = logits.view(-1, *self.allowed.shape)  # [B, heads, N, N], also from [B · heads, N, N]
            args = (by_head.masked_fill(~self.allowed, -torch.inf).view_as(logits), *args[1:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", SPARSE)
def test_sparse_equals_the_original_under_the_token_mask(family):
    name, arguments = SPARSE[family]
    model = create(name, arguments)
    size = (128, 128) if family == "samvit" else (68, 160)
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    original = copy.deepcopy(model)
    for module in original.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    prefix = getattr(model, "num_prefix_tokens", 0)
    with MaskedSoftmax(size[0] // 4, size[1] // 4, prefix, heads=HEADS) as masked:
        expected = original(x)
    assert masked.calls == (1 if family == "samvit" else 2)
    assert not torch.allclose(expected, original(x))
    out = patch_model(model, CustomPattern(random_tiles))(x)
    torch.testing.assert_close(out, expected)
    assert_same_gradients(gradients(out, model), gradients(expected, original), atol=1e-9, rtol=1e-7)


def dynamic_vit(dtype=torch.float64, **arguments) -> nn.Module:
    return create("vit_tiny_patch16_224", {"patch_size": 4, "dynamic_img_size": True, **arguments}, dtype)


def masked_reference(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Features of an unpatched ViT under the mask of ``random_tiles``."""
    original = copy.deepcopy(model)
    for block in original.blocks:
        block.attn.fused_attn = False
    with MaskedSoftmax(x.shape[-2] // 4, x.shape[-1] // 4, model.num_prefix_tokens, heads=HEADS):
        return original.forward_features(x)


SIZES = ((80, 160), (160, 80), (100, 128), (68, 160))  # the first three have equally many patches


def test_the_grid_is_followed_from_image_to_image():
    model = dynamic_vit()
    images = [torch.randn(1, 3, *size, dtype=torch.float64) for size in (*SIZES, SIZES[0])]
    expected = [masked_reference(model, x) for x in images]
    patch_model(model, CustomPattern(random_tiles))
    for x, reference in zip(images, expected):
        torch.testing.assert_close(model.forward_features(x), reference)


@pytest.mark.parametrize("how", ["forward_intermediates", "get_intermediate_layers"])
def test_the_grid_is_followed_whatever_is_called(how):
    model = dynamic_vit()
    images = [torch.randn(1, 3, *size, dtype=torch.float64) for size in SIZES[:2]]
    expected = [masked_reference(model, x) for x in images]
    patch_model(model, CustomPattern(random_tiles))
    for x, reference in zip(images, expected):
        out = getattr(model, how)(x, [1], norm=True, return_prefix_tokens=True)
        intermediates = out[1] if how == "forward_intermediates" else out
        patches, prefix = intermediates[-1]
        patches = patches.flatten(2).mT if patches.dim() == 4 else patches
        torch.testing.assert_close(torch.cat([prefix, patches], dim=1), reference)


def test_the_grid_follows_a_new_input_size_of_a_static_model():
    model = create("vit_tiny_patch16_224", {"patch_size": 4, "img_size": (80, 160)})
    patch_model(model, CustomPattern(random_tiles))
    model.set_input_size((160, 80))
    x = torch.randn(1, 3, 160, 80, dtype=torch.float64)
    out = model.forward_features(x)
    torch.testing.assert_close(out, masked_reference(unpatch_model(model), x))


def test_threads_do_not_mix_their_grids():
    model = dynamic_vit()
    images = [torch.randn(1, 3, *size, dtype=torch.float64) for size in SIZES[:2]]
    expected = [masked_reference(model, x) for x in images]
    patch_model(model, CustomPattern(random_tiles))
    # Both threads have embedded their image before either attends.
    barrier = threading.Barrier(2, timeout=60)

    def wait(*_) -> None:
        barrier.wait()

    model.norm_pre.register_forward_hook(wait)
    found = [None, None]

    def run(index: int) -> None:
        with torch.no_grad():
            found[index] = [model.forward_features(images[index]) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, reference in zip(found, expected):
        for out in outputs:
            torch.testing.assert_close(out, reference)


@pytest.mark.parametrize("in_thread", [False, True])
def test_activation_checkpointing_recomputes_on_the_grid_of_the_forward_pass(in_thread):
    model = dynamic_vit()
    images = [torch.randn(1, 3, *size, dtype=torch.float64) for size in (SIZES[0], SIZES[3])]
    expected = gradients(torch.cat([masked_reference_with_grad(model, x) for x in images]), model)
    patch_model(model, CustomPattern(random_tiles))
    model.set_grad_checkpointing()
    model.forward_features(torch.randn(1, 3, *SIZES[1], dtype=torch.float64)).sum().backward()
    model.zero_grad()
    out = torch.cat([model(x) for x in images])
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    # On accelerators backward passes run in threads of their own.
    backward = threading.Thread(target=(out * weights).sum().backward) if in_thread else None
    if backward is None:
        (out * weights).sum().backward()
    else:
        backward.start()
        backward.join()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same_gradients(found, expected, atol=1e-9, rtol=1e-7)


def masked_reference_with_grad(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for block in model.blocks:
        block.attn.fused_attn = False
    with MaskedSoftmax(x.shape[-2] // 4, x.shape[-1] // 4, model.num_prefix_tokens, heads=HEADS):
        return model(x)


def test_activation_checkpointing_that_cannot_tell_grids_apart_raises():
    model = patch_model(dynamic_vit(torch.float32), CustomPattern(random_tiles))
    model.set_grad_checkpointing()
    out = sum(model(torch.randn(1, 3, *size)).sum() for size in SIZES[:2])
    with pytest.raises(RuntimeError, match=r"different grids of equally many tokens, got .*20×40.* and .*40×20"):
        out.backward()


def checkpointed(frozen: bool = False) -> tuple[nn.Module, list[torch.Tensor]]:
    """A model and two images whose grids have equally many patches."""
    model = patch_model(dynamic_vit(torch.float32), CustomPattern(random_tiles))
    model.set_grad_checkpointing()
    model.patch_embed.requires_grad_(not frozen)
    return model, [torch.randn(1, 3, *size) for size in SIZES[:2]]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("late_first", [False, True])
def test_activation_checkpointing_never_takes_the_grid_of_another_step(frozen, late_first):
    model, (x, y) = checkpointed(frozen)
    early = model(x).sum()
    late = model(y).sum()
    for loss in (late, early) if late_first else (early, late):
        with pytest.raises(RuntimeError, match="different grids of equally many tokens"):
            loss.backward()


def test_activation_checkpointing_with_another_grid_in_every_step():
    model, images = checkpointed()
    plain = copy.deepcopy(model)
    plain.set_grad_checkpointing(False)
    for x in (*images, *images):
        loss = model(x).sum()
        loss.backward()
        plain(x).sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


@pytest.mark.parametrize("in_cycle", [False, True])
@pytest.mark.parametrize("mode", ["gradients", "no_grad", "inference_mode"])
def test_activation_checkpointing_after_an_evaluation_on_another_grid(mode, in_cycle):
    model, (x, y) = checkpointed()
    model.eval()
    with {"gradients": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]():
        kept = [model(y)]
    if in_cycle:
        kept.append(kept)
    del kept
    loss = model.train()(x).sum()
    with torch.no_grad():
        model(y)
    loss.backward()
    assert all(block.attn.qkv.weight.grad is not None for block in model.blocks)


def test_activation_checkpointing_behind_a_patch_embedding_without_gradients():
    model, (x, y) = checkpointed()

    def run(image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            patches = model.patch_embed(image)
        return torch.utils.checkpoint.checkpoint(model.blocks, model._pos_embed(patches), use_reentrant=False).sum()

    model.set_grad_checkpointing(False)
    run(x).backward()
    loss = run(x)
    run(y)
    with pytest.raises(RuntimeError, match="different grids of equally many tokens"):
        loss.backward()


def test_a_scale_that_was_changed_changes_nothing_but_the_logits():
    model = dynamic_vit()
    reported = str(patch_report(patch_model(copy.deepcopy(model))))
    for block in model.blocks:
        block.attn.scale = 0.05
        block.attn.fused_attn = False  # timm's fused attention passes over the scale
    x = torch.randn(1, 3, 68, 160, dtype=torch.float64)
    expected = model(x)
    patch_model(model)
    assert str(patch_report(model)) == reported
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_224"])
def test_dropped_tokens_get_dense_attention_and_one_warning(name, caplog):
    model = create(name, {"patch_size": 4, "img_size": (68, 160), "patch_drop_rate": 0.37}).train()
    x = torch.randn(1, 3, 68, 160, dtype=torch.float64)
    torch.manual_seed(5)
    expected = model(x)
    patch_model(model, LocalWindow(density=0.2))
    torch.manual_seed(5)
    with caplog.at_level(logging.WARNING, "sparse_attn_modules"):
        torch.testing.assert_close(model(x), expected)
    assert len([record for record in caplog.records if "do not fit" in record.message]) <= 1
    with torch.no_grad():
        sparse = model.eval()(x)
    assert not torch.allclose(sparse, patch_model(model)(x))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_warning_of_dropped_tokens_however_many(checkpointing, caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    model = patch_model(create("vit_tiny_patch16_224", {"patch_size": 4, "img_size": (72, 164)}), "local")
    tokens = model.patch_embed(torch.randn(1, 3, 72, 164, dtype=torch.float64))
    with caplog.at_level(logging.WARNING, "sparse_attn_modules"):
        for number in (605, 600):
            kept = tokens[:, :number]  # no class token either
            out = checkpoint(model.blocks, kept, use_reentrant=False) if checkpointing else model.blocks(kept)
            out.sum().backward(retain_graph=True)
    assert [record.message for record in caplog.records] == [
        "ViTSparseAttention: attention is dense where the tokens do not fit the grid of patches"
    ]


def test_attn_mask_reaches_the_layers():
    model = create("vit_tiny_patch16_224", {"img_size": (48, 80)})
    x = torch.randn(2, 3, 48, 80, dtype=torch.float64)
    mask = torch.rand(16, 16) < 0.7
    mask |= torch.eye(16, dtype=torch.bool)
    expected = model.forward_features(x, attn_mask=mask), model.forward_features(x, is_causal=True)
    patch_model(model)
    torch.testing.assert_close(model.forward_features(x, attn_mask=mask), expected[0])
    torch.testing.assert_close(model.forward_features(x, is_causal=True), expected[1])


def test_a_pattern_that_fits_one_grid_alone_raises_on_another():
    fixed = random_tiles_of_one_grid(torch.rand(HEADS, 9, 9) < 0.5)
    model = patch_model(dynamic_vit(torch.float32, img_size=(80, 160)), CustomPattern(fixed))
    model(torch.randn(1, 3, 80, 160))
    with pytest.raises(ValueError, match=r"CustomPattern: image blocks .* for 1 \+ 40×20 tokens .* got .*\[2, 9, 9\]"):
        model(torch.randn(1, 3, 160, 80))


def random_tiles_of_one_grid(tiles: torch.Tensor):
    return lambda query_grid, key_grid, num_heads: tiles


def test_few_tiles_stay_dense_and_the_report_says_why():
    model = create("vit_tiny_patch16_224", {"img_size": (48, 80)})
    x = torch.randn(1, 3, 48, 80, dtype=torch.float64)
    expected = model(x)
    patch_model(model, LocalWindow(radius=0))
    torch.testing.assert_close(model(x), expected)
    assert [layer.density for layer in patch_report(model).layers] == [1.0, 1.0]
    assert all("nothing to gain: 3×5 patches are 1 tile" in layer.note for layer in patch_report(model).layers)


LEFT_ALONE = {
    "vit_relpos_small_patch16_224": ("blocks.0.attn", "it adds a bias for every pair of tokens"),
    "beit_base_patch16_224": ("blocks.0.attn", "it adds a bias from a table"),
    "vit_tiny_patch16_224, parallel": ("blocks.0", "the block has no attention layer of its own"),
    "vit_tiny_patch16_224, differential": ("blocks.0.attn", "it subtracts two softmaxes"),
    "swin_tiny_patch4_window7_224": ("layers.0.blocks.0.attn", "its windows are smaller than a block"),
    "pit_ti_224": ("transformers.0.blocks.0.attn", "no model around it says how its tokens lie on a grid"),
    "naflexvit_base_patch16_gap": ("blocks.0.attn", "no model around it says how its tokens lie on a grid"),
    "xcit_nano_12_p16_224": ("cls_attn_blocks.0.attn", "its forward pass is not reproduced here"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_unknown_variants_are_left_alone_with_the_reason(case):
    name, _, variant = case.partition(", ")
    arguments = {}
    if variant == "parallel":
        arguments = {"block_fn": timm.models.vision_transformer.ParallelScalingBlock}
    elif variant == "differential":
        arguments = {"attn_layer": "diff"}
    model = timm.create_model(name, pretrained=False, **arguments)
    layer, reason = LEFT_ALONE[case]
    before = list(model.modules())
    with pytest.raises(ValueError, match="must have an attention layer that can be replaced") as error:
        patch_model(model)
    assert f"\n  {layer} (" in str(error.value)
    assert reason in str(error.value)
    assert patch_model(model, strict=False) is model
    assert all(ours is theirs for ours, theirs in zip(model.modules(), before))
    assert reason in {row.name: row.reason for row in patch_report(model).left_alone}[layer]


def test_a_model_that_lays_out_its_tokens_itself_is_left_alone():
    class Reversed(timm.models.VisionTransformer):
        def _pos_embed(self, x):
            return super()._pos_embed(x).flip(1)

    with pytest.raises(ValueError, match="Reversed lays out its tokens in a way of its own"):
        patch_model(Reversed(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2))


def test_a_subclass_that_keeps_the_layout_is_patched():
    class Named(timm.models.VisionTransformer):
        def forward(self, x):
            return {"logits": super().forward(x)}

    model = Named(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)["logits"]
    torch.testing.assert_close(patch_model(model)(x)["logits"], expected)


def test_attention_pooling_is_left_alone_beside_patched_layers():
    model = patch_model(create("vit_base_patch16_siglip_224", {"img_size": (48, 80)}))
    (left,) = patch_report(model).left_alone
    assert (left.name, left.reason) == ("attn_pool", "it pools the tokens with a latent query")


def test_parallel_things_blocks_are_patched():
    model = create(
        "vit_tiny_patch16_224",
        {"img_size": (48, 80), "block_fn": timm.models.vision_transformer.ParallelThingsBlock},
    )
    x = torch.randn(1, 3, 48, 80, dtype=torch.float64)
    expected = model(x)
    patch_model(model)
    assert len(patch_report(model).layers) == 4
    torch.testing.assert_close(model(x), expected)


def test_hybrid_patch_embedding():
    model = timm.create_model("vit_tiny_r_s16_p8_224", pretrained=False, img_size=(64, 96), depth=2).eval()
    x = torch.randn(1, 3, 64, 96)
    expected = model(x)
    patch_model(model)
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    assert (patch_report(model).layers[0].grid.height, patch_report(model).layers[0].grid.width) == (2, 3)
