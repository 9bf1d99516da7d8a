"""The patched image encoder of segment_anything against the original, alone, inside Sam and through SamPredictor."""

import copy
import warnings

import numpy as np
import pytest
import torch
from sparse_attn_modules.patching import patch_model, patch_report, unpatch_model
from torch import nn
from torch.overrides import TorchFunctionMode

from sparse_attn_modules.modules import SAMAttentionSparse
from sparse_attn_modules.patterns import CustomPattern, LocalWindow

pytest.importorskip("segment_anything")
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

HEADS, WINDOW = 2, 5


def encoder(image_size: int = 44, **arguments) -> nn.Module:
    """Patches of 4 × 4 pixels; the second block is global, the windows of the first overhang the grid."""
    model = ImageEncoderViT(
        img_size=image_size,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=HEADS,
        out_chans=16,
        use_rel_pos=True,
        window_size=WINDOW,
        global_attn_indexes=(1,),
        **arguments,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def sam(image_size: int = 64) -> Sam:
    grid = image_size // 4
    model = Sam(
        encoder(image_size),
        PromptEncoder(16, (grid, grid), (image_size, image_size), mask_in_chans=4),
        MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=1, embedding_dim=16, mlp_dim=32, num_heads=2),
            transformer_dim=16,
        ),
    )
    return model.eval()


def gradients(out: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad((out * weights).sum(), parameters)))


def assert_same(model: nn.Module, out: torch.Tensor, original: nn.Module, expected: torch.Tensor) -> None:
    torch.testing.assert_close(out, expected)
    found = gradients(out, model)
    for name, gradient in gradients(expected, original).items():
        torch.testing.assert_close(found[name], gradient, msg=name, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("image_size", [44, 56])
def test_dense_reproduces_the_original(image_size):
    original = encoder(image_size).double()
    model = patch_model(copy.deepcopy(original))
    assert [type(block.attn) for block in model.blocks] == [SAMAttentionSparse] * 2
    x = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    assert_same(model, model(x), original, original(x))


def random_tiles(query_grid, key_grid, num_heads):
    generator = torch.Generator().manual_seed(query_grid.num_tokens)
    tiles = torch.rand(num_heads, query_grid.num_tiles, key_grid.num_tiles, generator=generator) < 0.3
    return tiles | torch.eye(query_grid.num_tiles, dtype=torch.bool)


class MaskedSoftmax(TorchFunctionMode):
    """Makes the softmax over a whole side × side grid leave out what ``random_tiles`` leaves out."""

    def __init__(self, side: int) -> None:
        super().__init__()
        across, down = -(-side // 16), -(-side // 8)

        class Grid:
            num_tokens = side * side
            num_tiles = across * down

        tile = torch.tensor([y // 8 * across + x // 16 for y in range(side) for x in range(side)])
        self.allowed = random_tiles(Grid, Grid, HEADS)[:, tile[:, None], tile[None]]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.softmax and args[0].shape[-2:] == self.allowed.shape[-2:]:
            by_head = args[0].view(-1, *self.allowed.shape)  # [B · heads, N, N] -> [B, heads, N, N]
            args = (by_head.masked_fill(~self.allowed, -torch.inf).view_as(args[0]), *args[1:])
        return function(*args, **(kwargs or {}))


def test_sparse_equals_the_original_under_the_token_mask():
    original = encoder(132).double()  # 33 × 33 patches
    model = patch_model(copy.deepcopy(original), CustomPattern(random_tiles))
    x = torch.randn(1, 3, 132, 132, dtype=torch.float64)
    with MaskedSoftmax(33):
        expected = original(x)
    assert not torch.allclose(expected, original(x))
    assert_same(model, model(x), original, expected)


def test_windows_stay_dense_and_the_report_says_why():
    model = patch_model(encoder(132), LocalWindow(density=0.3))
    windowed, whole = patch_report(model).layers
    assert (windowed.density, windowed.windows, windowed.grid.height) == (1.0, 49, WINDOW)
    assert "nothing to gain: 5×5 patches are 1 tile" in windowed.note
    assert (whole.grid.height, whole.grid.width, whole.windows, whole.note) == (33, 33, 1, "")
    assert whole.density < 0.4


def test_sam_and_its_encoder_are_patched_alike():
    whole, part = sam(132), None
    part = copy.deepcopy(whole)
    patch_model(whole, CustomPattern(random_tiles))
    patch_model(part.image_encoder, CustomPattern(random_tiles))
    image = torch.rand(1, 3, 132, 132)
    torch.testing.assert_close(whole.image_encoder(image), part.image_encoder(image))
    names = [row.name for row in patch_report(whole).layers]
    assert names == ["image_encoder.blocks.0.attn", "image_encoder.blocks.1.attn"]
    left = {row.name: row.reason for row in patch_report(whole).left_alone}
    assert len(left) == 4
    assert set(left.values()) == {"one of its sides is a handful of prompt tokens"}
    unpatch_model(whole.image_encoder)
    assert not patch_report(whole).layers


@pytest.mark.parametrize("part", ["model", "encoder"])
def test_through_the_predictor(part):
    model = sam()
    image = np.random.default_rng().integers(0, 256, (50, 61, 3), dtype=np.uint8)
    point = np.array([[20.0, 30.0]])

    def predict() -> list[np.ndarray]:
        predictor = SamPredictor(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            predictor.set_image(image)
        return list(predictor.predict(point, np.array([1]), return_logits=True))

    expected = predict()
    patch_model(model if part == "model" else model.image_encoder)
    for found, reference in zip(predict(), expected):
        np.testing.assert_allclose(found, reference, atol=1e-3, rtol=1e-3)


def test_a_window_layer_by_itself_knows_its_grid():
    model = patch_model(encoder().blocks)
    windowed, whole = patch_report(model).layers
    assert (windowed.grid.height, windowed.windows) == (WINDOW, 1)
    assert (whole.grid, whole.note) == (None, "no image seen yet")


def test_a_subclass_is_left_alone():
    from segment_anything.modeling.image_encoder import Attention

    class Special(Attention):
        pass

    model = encoder()
    model.blocks[0].attn = Special(32, HEADS, use_rel_pos=True, input_size=(WINDOW, WINDOW))
    (left,) = patch_report(patch_model(model)).left_alone
    assert (left.kind, left.reason) == ("SAM Special", "it is a subclass of segment_anything's Attention")


@pytest.mark.parametrize("patch_first", [True, False])
def test_lora_on_every_projection_that_is_called_so(patch_first):
    """``proj`` names the convolution of the patch embedding too, whose stride an adapter does not tell."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=False)
    model, x = encoder(), torch.randn(1, 3, 44, 44)
    if patch_first:
        patch_model(model)
    wrapped = peft.get_peft_model(model, config)
    if not patch_first:
        expected = wrapped(x).detach()
        patch_model(wrapped)
    found = wrapped(x).detach()
    if patch_first:
        expected = unpatch_model(wrapped)(x).detach()
        patch_model(wrapped)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    merged = unpatch_model(wrapped.merge_and_unload())
    torch.testing.assert_close(merged(x), expected, atol=1e-4, rtol=1e-4)
