"""Checks that two processes make together; run by test_distributed_training.py through torchrun.

Each check compares with what one process computes on the whole batch. What a check raises is written to
``<folder>/<check>-<rank>.txt``, nothing if it passes.
"""

import copy
import sys
import tempfile
import traceback
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from sparse_attn_modules import DensitySchedule, LocalWindow, ViTSparseAttention, patch_model, unpatch_model

SIZE = (64, 128)  # 32 × 64 patches of 2 × 2 pixels: 16 tiles
SMALL = {"img_size": SIZE, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
SPARSE = LocalWindow(density=0.3)
STEPS, BATCH = 3, 4


def model(name: str = "vit_tiny_patch16_224") -> nn.Module:
    torch.manual_seed(3)
    made = timm.create_model(name, **SMALL)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(BATCH, 3, *SIZE, generator=generator), torch.randint(5, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def mine(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a batch."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def train(trained: nn.Module, part=lambda tensor: tensor) -> None:
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05, momentum=0.9)
    for x, y in batches():
        F.cross_entropy(trained(part(x)), part(y)).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_trained_alike(found: dict[str, torch.Tensor], name: str = "vit_tiny_patch16_224") -> None:
    untrained = model(name)
    expected = patch_model(copy.deepcopy(untrained), SPARSE)
    train(expected)
    before = untrained.state_dict()
    assert set(found) == set(before)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found[key], value, atol=2e-5, rtol=2e-3, msg=lambda text, key=key: f"{key}: {text}")
    assert sum(float((found[key] - before[key]).norm()) for key in before) > 0.1


def check_ddp(patch_first: bool = True) -> None:
    trained = model()
    if patch_first:
        patch_model(trained, SPARSE)
    wrapped = nn.parallel.DistributedDataParallel(trained)
    if not patch_first:
        patch_model(wrapped, SPARSE)
    train(wrapped, mine)
    assert_trained_alike(trained.state_dict())
    unpatch_model(wrapped)
    assert not any(isinstance(module, ViTSparseAttention) for module in wrapped.modules())
    assert_trained_alike(trained.state_dict())


def check_ddp_patched_afterwards() -> None:
    check_ddp(patch_first=False)


def check_ddp_with_activation_checkpointing() -> None:
    trained = patch_model(model(), SPARSE)
    trained.set_grad_checkpointing()
    train(nn.parallel.DistributedDataParallel(trained), mine)
    assert_trained_alike(trained.state_dict())


def check_ddp_compiled() -> None:
    trained = patch_model(model(), SPARSE)
    train(torch.compile(nn.parallel.DistributedDataParallel(trained), backend="aot_eager"), mine)
    assert_trained_alike(trained.state_dict())


def sharded(trained: nn.Module, **options) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in trained.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(trained, mesh=mesh, **options)


def check_fsdp(name: str = "vit_tiny_patch16_224") -> None:
    trained = sharded(patch_model(model(name), SPARSE))
    train(trained, mine)
    whole = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:  # full state dicts are gathered there
        assert_trained_alike(whole, name)
        stock = model(name)
        stock.load_state_dict(whole)
        patched = patch_model(model(name), SPARSE)
        patched.load_state_dict(whole)
        x = batches()[0][0]
        torch.testing.assert_close(patch_model(stock, SPARSE)(x), patched(x))


def check_fsdp_of_layers_with_parameters_of_their_own() -> None:
    check_fsdp("eva02_tiny_patch14_224")


def check_fsdp_of_a_model_patched_afterwards() -> None:
    trained = patch_model(sharded(model()), SPARSE)
    assert sum(isinstance(module, ViTSparseAttention) for module in trained.modules()) == 2
    train(trained, mine)
    whole = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        assert_trained_alike(whole)


def check_fsdp_loads_a_dense_checkpoint_and_is_unpatched() -> None:
    other = model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    trained = sharded(patch_model(model(), SPARSE))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(trained, other.state_dict() if dist.get_rank() == 0 else {}, options=options)
    x = batches()[0][0]
    with torch.no_grad():
        torch.testing.assert_close(unpatch_model(trained)(x), other(x), atol=1e-4, rtol=1e-4)


def check_fsdp_in_mixed_precision_with_activation_checkpointing() -> None:
    trained = patch_model(model(), SPARSE)
    trained.set_grad_checkpointing()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded(trained, mp_policy=policy)
    x, y = batches()[0]
    F.cross_entropy(trained(mine(x)), mine(y)).backward()
    exact, rounded = patch_model(model(), SPARSE), patch_model(model(), SPARSE).bfloat16()
    F.cross_entropy(exact(x), y).backward()
    F.cross_entropy(rounded(x.bfloat16()).float(), y).backward()
    for (key, parameter), other, low in zip(trained.named_parameters(), exact.parameters(), rounded.parameters()):
        gradient = parameter.grad.full_tensor()
        assert gradient.dtype == torch.float32
        error, unavoidable = (float((grad - other.grad).norm()) for grad in (gradient, low.grad.float()))
        assert error <= 2 * unavoidable + 1e-3 * float(other.grad.norm()), (key, error, unavoidable)


def check_accelerate() -> None:
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == dist.get_world_size()
    trained = patch_model(model(), SPARSE)
    schedule = DensitySchedule(trained, {0: 0.3, STEPS: 0.6})
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05, momentum=0.9)
    # Accelerate deals batches out in turn, so each process's share of a whole batch is a batch of the loader.
    images, labels = (torch.cat(column) for column in zip(*batches()))
    loader = DataLoader(TensorDataset(images, labels), batch_size=BATCH // dist.get_world_size())
    wrapped, optimizer, loader = accelerator.prepare(trained, optimizer, loader)
    accelerator.register_for_checkpointing(schedule)
    for x, y in loader:
        accelerator.backward(F.cross_entropy(wrapped(x), y))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert_trained_alike(accelerator.unwrap_model(wrapped).state_dict())
    folder = [tempfile.mkdtemp()]
    broadcast_object_list(folder)
    accelerator.save_state(folder[0])
    assert schedule.density == 0.6
    schedule.step(to=0)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.zero_()
    accelerator.load_state(folder[0])
    assert (schedule.current_step, schedule.density) == (STEPS, 0.6)
    assert_trained_alike(unpatch_model(accelerator.unwrap_model(wrapped)).state_dict())


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, check in CHECKS.items():
        try:
            check()
            text = ""
        except Exception:
            text = traceback.format_exc()
        (folder / f"{name}-{dist.get_rank()}.txt").write_text(text)
        # A process that failed in the middle of a check would leave the other waiting in a collective.
        failed = torch.tensor(float(bool(text)))
        dist.all_reduce(failed)
        if failed:
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
