"""Tensors of one GPU while another is current, both at once from threads, and training over NCCL."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from sparse_attn_modules import BlockMask, LocalWindow, TokenGrid, block_sparse_attention, patch_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

GRID = TokenGrid(40, 40, prefix=1)
HEADS = 4


def _inputs(head_dim: int, relative_position: bool) -> list[Tensor]:
    torch.manual_seed(head_dim)
    tensors = [torch.randn(2, HEADS, GRID.num_tokens, head_dim) for _ in range(3)]
    if relative_position:
        tensors += [torch.randn(2, HEADS, GRID.num_tokens, side) for side in (GRID.height, GRID.width)]
    return [tensor.to(torch.bfloat16) for tensor in tensors]


def _forward_and_backward(inputs: list[Tensor], mask: BlockMask, device: str, dropout_p: float) -> list[Tensor]:
    """Output and gradients, on the CPU."""
    query, key, value, *rel = (tensor.to(device).requires_grad_() for tensor in inputs)
    torch.cuda.manual_seed_all(3)
    out = block_sparse_attention(
        *(query, key, value, mask.to(device)),
        relative_position=(rel[0], rel[1]) if rel else None,
        dropout_p=dropout_p,
        backend="cuda",
    )
    grads = torch.autograd.grad(out.float().square().sum(), [query, key, value, *rel])
    assert all(tensor.device == torch.device(device) for tensor in (out, *grads))
    return [tensor.cpu() for tensor in (out, *grads)]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(("relative_position", "dropout_p"), [(False, 0.0), (True, 0.0), (False, 0.3)])
@pytest.mark.usefixtures("deterministic")
def test_runs_on_the_device_of_its_tensors(head_dim: int, relative_position: bool, dropout_p: float) -> None:
    inputs = _inputs(head_dim, relative_position)
    mask = LocalWindow(density=0.4).mask(GRID, HEADS)
    expected = _forward_and_backward(inputs, mask, "cuda:0", dropout_p)
    for current in (0, 1):
        with torch.cuda.device(current):
            found = _forward_and_backward(inputs, mask, "cuda:1", dropout_p)
            assert torch.cuda.current_device() == current
        assert all(torch.equal(*pair) for pair in zip(found, expected))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_fused_backward_on_the_second_device(head_dim: int) -> None:
    inputs = _inputs(head_dim, relative_position=False)
    mask = BlockMask.dense(GRID)
    expected = _forward_and_backward(inputs, mask, "cuda:0", 0.0)
    found = _forward_and_backward(inputs, mask, "cuda:1", 0.0)
    for one, other in zip(found, expected):  # the order of additions differs from run to run
        assert (one - other).abs().max() <= 2**-6 * other.abs().max()


@pytest.mark.usefixtures("deterministic")
def test_a_thread_for_each_device() -> None:
    inputs = _inputs(64, relative_position=True)
    mask = LocalWindow(density=0.4).mask(GRID, HEADS)
    expected = _forward_and_backward(inputs, mask, "cuda:0", 0.0)

    def repeat(device: str) -> bool:
        runs = [_forward_and_backward(inputs, mask, device, 0.0) for _ in range(20)]
        return all(torch.equal(*pair) for run in runs for pair in zip(run, expected))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, ["cuda:0", "cuda:1"] * 2))


def _model() -> torch.nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=512, depth=3, num_classes=5)


def _step(model: torch.nn.Module, images: Tensor, labels: Tensor) -> None:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()


def _train_a_share(rank: int, images: Tensor, labels: Tensor, port: int, outcome) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NCCL_NVLS_ENABLE="0")
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(
        patch_model(_model().cuda(), LocalWindow(density=0.4), backend="cuda"), device_ids=[rank]
    )
    share = slice(2 * rank, 2 * rank + 2)
    _step(model, images[share].cuda(), labels[share].cuda())
    if rank == 0:
        outcome.update({name: parameter.grad.cpu() for name, parameter in model.module.named_parameters()})
    dist.destroy_process_group()


def test_data_parallel_training_over_nccl() -> None:
    model = patch_model(_model().cuda(), LocalWindow(density=0.4), backend="cuda")
    images, labels = torch.randn(4, 3, 512, 512), torch.tensor([0, 4, 2, 2])
    _step(model, images.cuda(), labels.cuda())
    with torch.multiprocessing.Manager() as manager:
        outcome = manager.dict()
        port = 29500 + os.getpid() % 2000
        torch.multiprocessing.spawn(_train_a_share, args=(images, labels, port, outcome), nprocs=2)
        found = dict(outcome)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        error = (found[name] - parameter.grad.cpu()).norm() / parameter.grad.cpu().norm().clamp(min=1e-12)
        assert error < 0.05, f"{name}: {error}"
