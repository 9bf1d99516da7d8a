"""DensitySchedule: the right density at every step, masks made once, nothing compiled twice."""

import copy
import io
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_attn_modules import (
    CustomPattern,
    Dense,
    DensitySchedule,
    LocalWindow,
    MultiScale,
    Random,
    TokenGrid,
    ViTSparseAttention,
    patch_model,
    patch_report,
    unpatch_model,
)
from sparse_attn_modules.modules.base import SparseAttention

timm = pytest.importorskip("timm")

IMAGE = (2, 3, 64, 128)
VIT = {"patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}  # 32 × 64 patches, 16 tiles
HALF = LocalWindow(density=0.5)


def vit(pattern=HALF, **arguments) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", img_size=IMAGE[2:], **{**VIT, **arguments})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return patch_model(model, pattern)


def densities(model: nn.Module) -> list[float]:
    return [layer.pattern.density for layer in patch_report(model).layers if not isinstance(layer.pattern, Dense)]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end", "stages"), [(1.0, 0.25, 4), (0.3, 0.9, 2), (1.0, 0.1, 7)])
def test_slopes_take_the_nearest_of_the_densities(shape, start, end, stages):
    num_steps = 53
    schedule = getattr(DensitySchedule, shape)(vit(depth=1), start, end, num_steps, stages=stages)
    allowed = [start + (end - start) * i / (stages - 1) for i in range(stages)]
    seen = []
    for step in range(num_steps + 5):
        part = min(step / num_steps, 1)
        way = part if shape == "linear" else (1 - math.cos(math.pi * part)) / 2
        slope = start + (end - start) * way
        assert schedule.current_step == step
        assert min(abs(schedule.density - density) for density in allowed) < 1e-9
        assert abs(schedule.density - slope) <= min(abs(density - slope) for density in allowed) + 1e-9
        seen.append(schedule.density)
        assert schedule.step() == (schedule.density != seen[-1])
    assert seen[0] == start
    assert seen[-1] == pytest.approx(end)
    assert len(set(seen)) == stages


def test_layers_follow_the_milestones_and_dense_layers_stay_dense():
    model = vit({"blocks.1.*": "dense", "*": LocalWindow(density=0.3)})
    schedule = DensitySchedule(model, {3: 0.5, 0: 1.0, 5: 0.25})
    x = torch.randn(IMAGE)
    for step in range(7):
        density = 1.0 if step < 3 else 0.5 if step < 5 else 0.25
        assert schedule.density == density
        assert [row.pattern for row in patch_report(model).layers] == [
            LocalWindow(density=density),
            Dense(),
            LocalWindow(density=density),
        ]
        expected = patch_model(
            unpatch_model(copy.deepcopy(model)), {"blocks.1.*": "dense", "*": LocalWindow(density=density)}
        )
        torch.testing.assert_close(model(x), expected(x))
        schedule.step()


def test_no_step_is_compiled_again():
    torch.compiler.reset()
    model = vit()
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    schedule = DensitySchedule.cosine(model, 1.0, 0.2, 6, stages=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen = set()
    for _ in range(8):
        x = torch.randn(IMAGE)
        out = compiled(x)
        patch_model(eager, LocalWindow(density=schedule.density)).load_state_dict(model.state_dict())
        torch.testing.assert_close(out, eager(x), atol=1e-4, rtol=1e-4)
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.add(schedule.density)
        schedule.step()
    assert len(seen) == 4
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_no_step_is_compiled_again_for_each_image_size_that_was_seen():
    torch.compiler.reset()
    model = vit(dynamic_img_size=True, depth=1)
    sizes = (IMAGE, (2, 3, 64, 64))
    for size in sizes:
        model(torch.randn(size))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    schedule = DensitySchedule(model, {0: 0.9, 1: 0.5, 2: 0.3, 3: 0.7})
    for _ in range(4):
        for size in sizes:
            x = torch.randn(size)
            torch.testing.assert_close(compiled(x), model(x))
        schedule.step()
    assert counter.frame_count == len(sizes)
    torch.compiler.reset()


def test_windows_stay_dense():
    torch.compiler.reset()
    model = timm.create_model(
        "samvit_base_patch16", img_size=128, patch_size=4, window_size=7, global_attn_indexes=(1,),
        embed_dim=16, depth=2, num_heads=2, num_classes=5,
    )  # fmt: skip
    patch_model(model, "local")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    schedule = DensitySchedule.linear(model, 1.0, 0.25, 2, stages=3)
    for expected in (1.0, 0.625, 0.25):
        x = torch.randn(1, 3, 128, 128)
        torch.testing.assert_close(compiled(x), model(x))
        windows, image = patch_report(model).layers
        assert windows.density == 1.0
        assert image.density == pytest.approx(expected, abs=1 / 8)
        schedule.step()
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_grids_of_a_few_tiles_stay_dense():
    model = vit(depth=1, dynamic_img_size=True)
    x = torch.randn(2, 3, 32, 64)  # 16 × 32 patches, 4 tiles
    DensitySchedule(model, {0: 0.25})
    torch.testing.assert_close(model(x), unpatch_model(copy.deepcopy(model))(x), atol=1e-4, rtol=1e-4)
    assert patch_report(model).layers[0].density == 1.0


def test_masks_are_made_once_and_shared(monkeypatch):
    made = []
    blocks = LocalWindow.blocks
    monkeypatch.setattr(LocalWindow, "blocks", lambda self, *grids: made.append(self.density) or blocks(self, *grids))
    model = vit()
    made.clear()
    schedule = DensitySchedule(model, {0: 0.91, 2: 0.52, 4: 0.91, 6: 0.33})
    assert sorted(made) == [0.33, 0.52, 0.91]
    x = torch.randn(IMAGE)
    for _ in range(8):
        model(x)
        schedule.step()
        masks = {id(mask) for block in model.blocks for mask in block.attn.kept_masks}
        assert len(masks) == 1
    assert len(made) == 3


def test_resumes_from_a_checkpoint():
    model = vit(depth=1)
    schedule = DensitySchedule.linear(model, 1.0, 0.2, 20)
    for _ in range(13):
        schedule.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "schedule": schedule.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file)
    other = vit(depth=1)
    resumed = DensitySchedule.linear(other, 1.0, 0.2, 20)
    assert densities(other) == [1.0]
    other.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["schedule"])
    x = torch.randn(IMAGE)
    for _ in range(9):
        assert (resumed.current_step, resumed.density) == (schedule.current_step, schedule.density)
        assert densities(other) == densities(model) == [schedule.density]
        torch.testing.assert_close(other(x), model(x))
        assert resumed.step() == schedule.step()
    with pytest.raises(ValueError, match="state must be of the milestones {0: 0.5}, got {0: 1.0, "):
        DensitySchedule(other, {0: 0.5}).load_state_dict(checkpoint["schedule"])
    with pytest.raises(ValueError, match="state must hold step and milestones, got {'step': 3}"):
        resumed.load_state_dict({"step": 3})


def test_steps_may_be_jumped_to():
    model = vit(depth=1)
    schedule = DensitySchedule(model, {0: 1.0, 10: 0.5, 20: 0.25})
    assert schedule.step(to=25)
    assert densities(model) == [0.25]
    assert schedule.step(to=12)
    assert not schedule.step()
    assert (densities(model), schedule.current_step) == ([0.5], 13)
    with pytest.raises(ValueError, match="DensitySchedule.step: to must be an integer ≥ 0, got -1"):
        schedule.step(to=-1)


def test_patterns_from_a_function_or_with_another_rule():
    model = vit(LocalWindow(radius=8), depth=1)
    DensitySchedule(model, {0: 0.5}, pattern=lambda density: MultiScale(densities=(density / 2, density)))
    assert patch_report(model).layers[0].pattern == MultiScale(densities=(0.25, 0.5))
    DensitySchedule(model, {0: 0.4}, pattern=Random(density=0.9, seed=3))
    assert patch_report(model).layers[0].pattern == Random(density=0.4, seed=3)


def test_each_layer_keeps_its_own_rule():
    model = vit({"blocks.0.*": Random(density=0.9, seed=1), "*": LocalWindow(density=0.2)})
    schedule = DensitySchedule(model, {0: 1.0, 1: 0.4})
    schedule.step()
    patterns = [layer.pattern for layer in patch_report(model).layers]
    assert patterns == [Random(density=0.4, seed=1), LocalWindow(density=0.4), LocalWindow(density=0.4)]


def test_a_copy_of_the_model_is_scheduled_beside_it():
    model = vit(depth=1)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    schedule = DensitySchedule(nn.ModuleList([model, average.module]), {0: 1.0, 1: 0.4})
    schedule.step()
    assert densities(model) == densities(average.module) == [0.4]
    x = torch.randn(IMAGE)
    torch.testing.assert_close(average.module(x), model(x))


def test_layers_that_nobody_patched():
    grid = TokenGrid(32, 64)
    layer = ViTSparseAttention(16, 2, pattern=LocalWindow(density=0.3), grid=grid)
    schedule = DensitySchedule(nn.Sequential(layer), {0: 0.8, 1: 0.2})
    (mask,) = layer.kept_masks
    assert mask.density == LocalWindow(density=0.8).density_on(grid, 2)
    schedule.step()
    x = torch.randn(1, grid.num_tokens, 16)
    expected = copy.deepcopy(layer)
    expected.pattern = LocalWindow(density=0.2)
    torch.testing.assert_close(layer(x), expected(x))


class Anonymous(SparseAttention):
    """Does not tell its number of heads before it is called."""

    def forward(self, tokens):
        return self.attend(tokens, tokens, tokens, TokenGrid(16, 32, tile=(4, 4)))


def test_masks_of_unknown_geometries_are_made_when_they_are_met():
    layer = Anonymous(LocalWindow(density=0.9))
    schedule = DensitySchedule(layer, {0: 0.5, 1: 0.25})
    tokens = torch.randn(1, 2, 512, 4)
    for _ in range(2):
        layer(tokens)
        assert [mask.density for mask in layer.kept_masks] == [schedule.density]
        schedule.step()


def test_a_model_that_was_unpatched_is_not_scheduled_in_silence():
    model = vit()
    schedule = DensitySchedule(model, {0: 1.0, 2: 0.5})
    unpatch_model(model)
    assert not schedule.step()
    with pytest.raises(RuntimeError, match="layers must stay part of the model, got 3 of 3 that do not"):
        schedule.step()


def test_an_error_leaves_everything_as_it_was():
    model = vit(depth=2)
    schedule = DensitySchedule(model, {0: 0.5, 1: 0.25})
    attention = model.blocks[1].attn
    model.blocks[1].attn = nn.Identity()
    for _ in range(2):  # not only the first time
        with pytest.raises(RuntimeError, match="layers must stay part of the model"):
            schedule.step()
        assert (schedule.current_step, schedule.density) == (0, 0.5)
    model.blocks[1].attn = attention
    assert schedule.step()
    assert densities(model) == [0.25, 0.25]

    def of_the_wrong_size(query_grid, key_grid, num_heads):
        return torch.ones(1, 1, 1, dtype=torch.bool)

    with pytest.raises(ValueError, match="CustomPattern"):
        DensitySchedule(model, {0: 0.5}, pattern=lambda density: CustomPattern(of_the_wrong_size))
    assert densities(model) == [0.25, 0.25]


def test_numbers_of_numpy_and_states_in_json():
    model = vit(depth=1)
    schedule = DensitySchedule(model, {np.int64(0): np.float32(0.5), np.int32(3): 0.25})
    assert schedule.milestones == {0: 0.5, 3: 0.25}
    assert schedule.step(to=np.int64(4))
    state = json.loads(json.dumps(schedule.state_dict()))
    other = DensitySchedule.linear(vit(depth=1), 0.5, 0.25, np.int64(6), stages=np.int64(2))
    assert other.milestones == schedule.milestones
    other.load_state_dict(state)
    assert (other.current_step, other.density) == (4, 0.25)
    for broken, message in (
        ({**state, "milestones": None}, "state must be of the milestones {0: 0.5, 3: 0.25}, got None"),
        ({**state, "milestones": {"0": 0.5}}, "state must be of the milestones .* got {'0': 0.5}"),
        ({**state, "step": "4"}, "state must hold a step ≥ 0, got '4'"),
    ):
        with pytest.raises(ValueError, match=f"DensitySchedule.load_state_dict: {message}"):
            other.load_state_dict(broken)


def test_repr_tells_where_it_stands():
    schedule = DensitySchedule(vit(depth=2), {0: 1.0, 4: 0.5})
    schedule.step(to=5)
    assert repr(schedule) == "DensitySchedule(step 5, density 0.5, milestones {0: 1.0, 4: 0.5}, 2 layers)"
    assert schedule.milestones == {0: 1.0, 4: 0.5}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DensitySchedule("vit", {0: 1.0}), TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: DensitySchedule(nn.Linear(2, 2), {0: 1.0}), ValueError, "must have block-sparse attention, got none"),
        (lambda: DensitySchedule(vit(Dense()), {0: 1.0}), ValueError, "other than Dense.* got 3 dense ones"),
        (lambda: DensitySchedule(vit(), [1.0, 0.5]), TypeError, "milestones must be a mapping of steps, got list"),
        (lambda: DensitySchedule(vit(), {}), ValueError, r"milestones must hold step 0, got steps \[\]"),
        (lambda: DensitySchedule(vit(), {2: 0.5}), ValueError, r"milestones must hold step 0, got steps \[2\]"),
        (lambda: DensitySchedule(vit(), {0: 1.5}), ValueError, r"must have densities in \(0, 1\], got 1.5"),
        (lambda: DensitySchedule(vit(), {0: 0}), ValueError, r"must have densities in \(0, 1\], got 0"),
        (lambda: DensitySchedule(vit(), {0: True}), ValueError, r"must have densities in \(0, 1\], got True"),
        (lambda: DensitySchedule(vit(), {-1: 0.5}), ValueError, "milestones must be at steps ≥ 0, got -1"),
        (lambda: DensitySchedule(vit(), {0.5: 0.5}), ValueError, "milestones must be at steps ≥ 0, got 0.5"),
        (lambda: DensitySchedule.linear(vit(), 1.0, "low", 9), ValueError, r"densities in \(0, 1\], got 'low'"),
        (lambda: DensitySchedule.linear(vit(), 1.0, 0.5, 0), ValueError, "num_steps must be an integer ≥ 1, got 0"),
        (lambda: DensitySchedule.cosine(vit(), 1, 0.5, 9, stages=1), ValueError, "stages must be an integer ≥ 2"),
        (
            lambda: DensitySchedule(vit(LocalWindow(radius=8)), {0: 0.5}),
            ValueError,
            r"pattern must be given as a function .* got that of blocks.0.attn: LocalWindow\(.*radius=8\)",
        ),
        (
            lambda: DensitySchedule(vit(), {0: 0.5}, pattern=LocalWindow(radius=8)),
            ValueError,
            r"pattern must be given as a function .* got LocalWindow\(.*radius=8\)",
        ),
        (lambda: DensitySchedule(vit(), {0: 0.5}, pattern="local"), TypeError, "pattern must be a Pattern, a function"),
        (lambda: DensitySchedule(vit(), {0: 0.5}, pattern=float), TypeError, "must return a Pattern, got float"),
    ],
)  # fmt: skip
def test_errors_before_anything_changes(make, error, message):
    with pytest.raises(error, match=f"DensitySchedule: .*{message}"):
        make()
