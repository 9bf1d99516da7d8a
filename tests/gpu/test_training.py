"""Training patched models on a GPU: captured steps, schedules under CUDA graphs, gradients of a whole model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_attn_modules import DensitySchedule, LocalWindow, patch_model

timm = pytest.importorskip("timm")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZE = (136, 264)  # 34 × 66 patches of 4 pixels: 5 × 5 tiles, the last ones partial
SMALL = {"patch_size": 4, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 5}
SPARSE = LocalWindow(density=0.3)


def vit(name: str = "vit_tiny_patch16_224", **arguments) -> nn.Module:
    return timm.create_model(name, img_size=SIZE, **{**SMALL, **arguments}).cuda()


def batch(size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 3, *SIZE, device="cuda"), torch.randint(5, (size,), device="cuda")


def loss_of(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # Graphs must not capture the weights that autocast has cast for the steps before.
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        return F.cross_entropy(model(x), labels)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss_of(model, x, labels).backward()
    optimizer.step()


def assert_alike(found: nn.Module, expected: nn.Module, start: dict[str, torch.Tensor]) -> None:
    """The same way from the same start, but for rounding."""
    for name, value in expected.state_dict().items():
        way = (value - start[name]).norm()
        assert (found.state_dict()[name] - value).norm() <= 0.05 * way + 1e-5, name
    assert any(not torch.equal(value, start[name]) for name, value in found.state_dict().items())


def test_a_training_step_in_a_cuda_graph():
    model = patch_model(vit(), SPARSE)
    eager = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    optimizers = [torch.optim.SGD(trained.parameters(), lr=0.02, momentum=0.9) for trained in (model, eager)]
    data = [batch() for _ in range(6)]
    x, labels = (tensor.clone() for tensor in data[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train(model, optimizers[0], x, labels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(model, optimizers[0], x, labels)
    for _ in range(3):  # a capture runs nothing
        train(eager, optimizers[1], *data[0])
    for new_x, new_labels in data:
        x.copy_(new_x)
        labels.copy_(new_labels)
        graph.replay()
        train(eager, optimizers[1], new_x, new_labels)
    torch.cuda.synchronize()
    assert_alike(model, eager, start)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_run_on_through_a_schedule(mode):
    torch.compiler.reset()
    model = patch_model(vit(), SPARSE)
    eager = copy.deepcopy(model)
    schedules = [DensitySchedule(trained, {0: 1.0, 3: 0.5, 6: 0.15, 9: 0.8}) for trained in (model, eager)]
    compiled = torch.compile(model, mode=mode, dynamic=False)
    seen = set()
    for _ in range(12):
        x, labels = batch()
        for trained in (model, eager):
            trained.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(compiled, x, labels)
        loss.backward()
        expected = loss_of(eager, x, labels)
        expected.backward()
        torch.testing.assert_close(loss, expected, atol=2e-2, rtol=2e-2)
        for parameter, other in zip(model.parameters(), eager.parameters()):
            if other.grad is not None:
                assert (parameter.grad - other.grad).norm() <= 0.1 * other.grad.norm() + 1e-4
        seen.add(schedules[0].density)
        for schedule in schedules:
            schedule.step()
    assert len(seen) == 4
    torch.compiler.reset()


def test_float16_with_a_gradient_scaler():
    model = patch_model(vit(), SPARSE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)  # 1e-3 learns by no means always, whatever the attention
    scaler = torch.amp.GradScaler("cuda")
    x, labels = batch(4)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(x), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "samvit_base_patch16"])
def test_gradients_of_a_patched_model_are_the_slope_of_its_loss(name):
    """Finite differences in float64 on the reference, along the gradient and along random directions."""
    more = {"window_size": 0, "global_attn_indexes": (0, 1)} if name.startswith("samvit") else {}
    model = vit(name, **more)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)  # or attention would be almost uniform, and its gradients almost zero
    exact = patch_model(copy.deepcopy(model).double(), SPARSE, backend="reference")
    patch_model(model, SPARSE)
    x, labels = batch()
    loss_of(model, x, labels).backward()
    gradients = {
        key: parameter.grad.double() for key, parameter in model.named_parameters() if parameter.grad is not None
    }
    parameters = dict(exact.named_parameters())
    length = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()

    def slope(direction: dict[str, torch.Tensor], reach: float = 1e-4) -> float:
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                for key, step in direction.items():
                    parameters[key].add_(step, alpha=sign * reach)
                losses.append(float(F.cross_entropy(exact(x.double()), labels)))
                for key, step in direction.items():
                    parameters[key].add_(step, alpha=-sign * reach)
        return (losses[0] - losses[1]) / (2 * reach)

    def predicted(direction: dict[str, torch.Tensor]) -> float:
        return float(sum((gradients[key] * step).sum() for key, step in direction.items()))

    along = {key: gradient / length for key, gradient in gradients.items()}
    assert predicted(along) == pytest.approx(slope(along), rel=0.02)
    for part in ("attn.qkv", "attn.q_", "attn.proj", "rel_pos", "patch_embed"):
        direction = {
            key: torch.randn_like(gradient) * gradient.norm() / gradient.numel() ** 0.5 + gradient
            for key, gradient in gradients.items()
            if part in key
        }
        if direction:
            assert predicted(direction) == pytest.approx(slope(direction, 1e-4 / float(length)), rel=0.02), part
