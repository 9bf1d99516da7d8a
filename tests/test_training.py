"""Training patched models as people train: checkpointing, scaled autocast, compiled steps, timm's conventions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_attn_modules import (
    LocalWindow,
    Random,
    SAMAttentionSparse,
    SparseMultiheadAttention,
    TokenGrid,
    ViTSparseAttention,
    patch_model,
    unpatch_model,
)

timm = pytest.importorskip("timm")

IMAGE = (2, 3, 64, 128)
SMALL = {"img_size": IMAGE[2:], "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "samvit": ("samvit_base_patch16", {"window_size": 7, "global_attn_indexes": (1,)}),
}
SPARSE = LocalWindow(density=0.3)
GRID = TokenGrid(6, 7, prefix=1, tile=(2, 4))


def create(family: str = "vit", **arguments) -> nn.Module:
    name, more = FAMILIES[family]
    model = timm.create_model(name, **{**SMALL, **more, **arguments})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def batch(size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, *IMAGE[1:]), torch.randint(5, (size,))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


LAYERS = {
    "vit": lambda backend: (
        ViTSparseAttention(8, 2, qk_norm=True, pattern=Random(0.4), grid=GRID, backend=backend),
        (GRID.num_tokens, 8),
    ),
    "sam": lambda backend: (
        SAMAttentionSparse(8, 2, input_size=(9, 18), pattern=Random(0.4), backend=backend),
        (9, 18, 8),
    ),
    "multihead": lambda backend: (
        SparseMultiheadAttention(8, 2, batch_first=True, pattern=Random(0.4), grid=GRID, backend=backend),
        (GRID.num_tokens, 8),
    ),
}


@pytest.mark.parametrize("backend", ["reference", "gathered"])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradcheck_through_a_layer_and_its_parameters(kind, backend):
    layer, shape = LAYERS[kind](backend)
    layer.double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    names = list(dict(layer.named_parameters()))
    x = torch.randn(1, *shape, dtype=torch.float64, requires_grad=True)

    def call(x, *parameters):
        arguments = (x,) if kind != "multihead" else (x, x, x, None, False)
        out = torch.func.functional_call(layer, dict(zip(names, parameters)), arguments)
        return out[0] if kind == "multihead" else out

    parameters = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)


def test_gradcheck_through_a_patched_model():
    model = patch_model(create().double(), SPARSE)
    x = torch.randn(1, *IMAGE[1:], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,), fast_mode=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_draws_the_same_dropout(family):
    model = patch_model(
        create(family, proj_drop_rate=0.2, **({} if family == "samvit" else {"attn_drop_rate": 0.3})), SPARSE
    )
    x, labels = batch()
    found = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(11)
        F.cross_entropy(model(x), labels).backward()
        found.append({name: gradient.clone() for name, gradient in gradients(model).items()})
    assert len(found[0]) > 20
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)
    torch.manual_seed(12)
    model.zero_grad()
    F.cross_entropy(model(x), labels).backward()
    assert not torch.allclose(gradients(model)["patch_embed.proj.weight"], found[0]["patch_embed.proj.weight"])


def test_autocast_with_a_gradient_scaler():
    model = patch_model(create(), SPARSE)
    exact = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, labels = batch()
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(x), labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    F.cross_entropy(exact(x), labels).backward()
    for (name, gradient), expected in zip(gradients(model).items(), gradients(exact).values()):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() <= 0.05 * expected.norm() + 1e-4, name
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model.state_dict()["head.weight"], before["head.weight"])


def test_gradients_that_overflow_are_seen_by_the_scaler():
    model = patch_model(create(), SPARSE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    x, labels = batch()
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(x), labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    assert scaler.get_scale() == 2.0**59


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_training_step(backend):
    """Forward, loss and gradients in one graph, the optimizer in another; both compiled once."""
    torch.compiler.reset()
    model = patch_model(create(depth=1), SPARSE)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def loss_of(x, labels):
        return F.cross_entropy(model(x), labels)

    optimizers = [torch.optim.AdamW(trained.parameters(), lr=1e-3, foreach=True) for trained in (model, eager)]
    update = torch.compile(optimizers[0].step, backend="aot_eager")
    for _ in range(3):
        x, labels = batch()
        loss = loss_of(x, labels)
        loss.backward()
        expected = F.cross_entropy(eager(x), labels)
        expected.backward()
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gradients(model), gradients(eager), atol=1e-4, rtol=1e-2)
        # The same gradients for both, lest AdamW blow up the rounding of those that are almost zero.
        for parameter, other in zip(model.parameters(), eager.parameters()):
            other.grad = None if parameter.grad is None else parameter.grad.clone()
        update()
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    torch.testing.assert_close(model.state_dict(), eager.state_dict(), atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_compiled_activation_checkpointing():
    torch.compiler.reset()
    model = patch_model(create(), SPARSE)
    model.set_grad_checkpointing()
    x, labels = batch()
    F.cross_entropy(model(x), labels).backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    F.cross_entropy(compiled(x), labels).backward()
    torch.testing.assert_close(gradients(model), expected, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


def test_an_optimizer_made_before_patching_goes_on():
    model = create()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    patch_model(model, SPARSE)
    patch_model(reference, SPARSE)
    other = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    for trained, stepped in ((model, optimizer), (reference, other)):
        torch.manual_seed(1)
        for _ in range(2):
            x, labels = batch()
            F.cross_entropy(trained(x), labels).backward()
            stepped.step()
            stepped.zero_grad()
    torch.testing.assert_close(model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_groups_with_layer_decay_stay(family):
    from timm.optim import create_optimizer_v2, param_groups_layer_decay

    model = create(family)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def groups() -> list[tuple]:
        found = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
        return [
            (group["lr_scale"], group["weight_decay"], [names[id(parameter)] for parameter in group["params"]])
            for group in found
        ]

    before = groups()
    assert len({scale for scale, *_ in before}) == 4  # the embedding, two blocks, the head
    patch_model(model, SPARSE)
    assert groups() == before
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    assert [group["lr_scale"] for group in optimizer.param_groups] == [scale for scale, *_ in before]


def test_weights_are_averaged_as_in_timm():
    from timm.utils import ModelEmaV3

    model = patch_model(create(), SPARSE)
    average = ModelEmaV3(model, decay=0.6)
    assert sum(isinstance(module, ViTSparseAttention) for module in average.module.modules()) == 2
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        x, labels = batch()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)
        expected = {name: 0.6 * value + 0.4 * model.state_dict()[name] for name, value in expected.items()}
    torch.testing.assert_close(average.module.state_dict(), expected)
    fresh = create()
    fresh.load_state_dict(average.module.state_dict())
    torch.testing.assert_close(average(x), patch_model(fresh, SPARSE)(x))
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    unpatch_model(average.module)
    torch.testing.assert_close(average(x), unpatch_model(fresh)(x))
    assert sum(isinstance(module, ViTSparseAttention) for module in model.modules()) == 2
    torch.testing.assert_close(model.state_dict(), trained, atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_of_timm_go_between_dense_and_patched(family, tmp_path):
    from timm.models import load_checkpoint
    from timm.utils import CheckpointSaver, ModelEmaV3

    x, labels = batch()
    dense = create(family)
    torch.save({"state_dict": dense.state_dict()}, tmp_path / "dense.pth.tar")
    model = patch_model(create(family), SPARSE)
    load_checkpoint(model, str(tmp_path / "dense.pth.tar"))
    torch.testing.assert_close(model.state_dict(), dense.state_dict(), atol=0, rtol=0)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = ModelEmaV3(model, decay=0.5)
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()
    average.update(model)
    saver = CheckpointSaver(
        model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(epoch=0, metric=1.0)
    (path,) = tmp_path.glob("checkpoint-0*")
    for use_ema, trained in ((False, model), (True, average.module)):
        load_checkpoint(dense, str(path), use_ema=use_ema)
        torch.testing.assert_close(dense.state_dict(), trained.state_dict(), atol=0, rtol=0)
    last = list(model.state_dict())[-1]
    assert not torch.equal(model.state_dict()[last], average.module.state_dict()[last])
    dense.eval()
    average.eval()
    torch.testing.assert_close(dense(x), unpatch_model(average.module)(x), atol=1e-5, rtol=1e-4)


def test_trains_in_the_loop_of_timm():
    """Layer decay, gradient clipping, averaging and activation checkpointing together: it learns what it is shown."""
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3, NativeScaler

    torch.manual_seed(0)
    model = patch_model(timm.create_model(FAMILIES["vit"][0], **SMALL, drop_path_rate=0.1), SPARSE)
    model.set_grad_checkpointing()
    model.train()
    optimizer = create_optimizer_v2(model, "adamw", lr=5e-3, weight_decay=0.05, layer_decay=0.8)
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    average, scaler = ModelEmaV3(model, decay=0.8), NativeScaler(device="cpu")
    x, labels = batch(4)
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        optimizer.zero_grad()
        average.update(model)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        assert F.cross_entropy(average.module.eval()(x), labels) < 0.8 * losses[0]
