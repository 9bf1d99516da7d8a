"""The fused backward kernel, and when it is chosen. It sums dQ, and the gradients of a relative position, in any order:
equal runs differ in the last bits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from sparse_attn_modules import BlockMask, TokenGrid, block_sparse_attention
from sparse_attn_modules.backends import cuda, gathered

_REASON = cuda.why_not_here()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=f"cuda backend: {_REASON}")]

_NAMES = ("query", "key", "value", "rel_h", "rel_w")
_HEAD_DIMS = [(head_dim, False) for head_dim in (32, 64, 80, 96, 128)] + [(64, True), (80, True)]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backward pass that the fused kernel serves runs it, whatever the density."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("the gathered backend was called")

    monkeypatch.setattr(gathered, "backward", refuse)
    monkeypatch.setattr(cuda, "_fuses", cuda._can_fuse)


def _grads(case, grad_out: Tensor, grad_lse: Tensor, attend) -> list[Tensor]:
    out, lse = attend(case)
    loss = (out * grad_out.to(out.dtype)).sum() + (lse.masked_fill(lse.isinf(), 0) * grad_lse.to(lse.dtype)).sum()
    return list(torch.autograd.grad(loss, case.differentiable))


def _attend(case) -> tuple[Tensor, Tensor]:
    return block_sparse_attention(
        case.query, case.key, case.value, case.mask, **case.options, backend="cuda", return_lse=True
    )


def _check(case, oracle) -> None:
    grad_out = torch.randn_like(case.query)
    grad_lse = torch.randn(case.query.shape[:3], device="cuda")
    leaves = case.to(case.query.dtype, requires_grad=True)
    ours, again = (_grads(leaves, grad_out, grad_lse, _attend) for _ in range(2))
    low = _grads(leaves, grad_out, grad_lse, oracle)
    expected = _grads(case.to(torch.float64, requires_grad=True), grad_out.double(), grad_lse, oracle)
    for name, grad, repeated, low_grad, expected_grad in zip(_NAMES, ours, again, low, expected):
        assert torch.isfinite(grad).all(), name
        tolerance = 3 * (low_grad.double() - expected_grad).abs().max() + 1e-5
        error = (grad.double() - expected_grad).abs().max()
        assert error <= tolerance, f"{name}: {error} > {tolerance}"
        if name in ("key", "value"):
            assert torch.equal(grad, repeated), f"{name} differs when repeated"


@pytest.mark.usefixtures("fused", "poisoned_memory")
@pytest.mark.parametrize("first", range(0, 400, 20))
def test_matches_autograd_on_random_geometry(first: int, drawn_cuda_case, oracle) -> None:
    for seed in range(first, first + 20):
        case = drawn_cuda_case(seed)
        if cuda._native_head_dim(case.query.shape[3]) not in cuda._FUSED_RELATIVE_POSITION_HEAD_DIMS:
            case.relative_position = None
        try:
            _check(case, oracle)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.usefixtures("fused", "poisoned_memory")
@pytest.mark.parametrize(("head_dim", "relative"), _HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_blocks_of_keys_per_multiprocessor(
    head_dim: int, relative: bool, dtype: torch.dtype, drawn_cuda_case, oracle
) -> None:
    """Steps run on across the borders between blocks of keys, some of which nobody attends to."""
    case = drawn_cuda_case(0)
    grid = TokenGrid(5 * 8 - 3, 3 * 16 + 2, prefix=2)
    blocks = torch.rand(3, 8, grid.num_blocks, grid.num_blocks, device="cuda") < 0.3
    blocks[:, :, :, 1::5] = False
    case.query, case.key, case.value = (
        torch.randn(3, 8, grid.num_tokens, head_dim, device="cuda", dtype=dtype) for _ in range(3)
    )
    case.mask, case.key_padding_mask, case.relative_position = BlockMask(blocks, grid), None, None
    if relative:
        case.relative_position = tuple(
            torch.randn(3, 8, grid.num_tokens, size, device="cuda", dtype=dtype) for size in (grid.height, grid.width)
        )
    _check(case, oracle)


@pytest.mark.usefixtures("fused", "poisoned_memory")
@pytest.mark.parametrize("key_heads", [16, 8])
@pytest.mark.parametrize("head_dim", [72, 80, 96, 128])
def test_heads_whose_gradients_are_complete_before_the_kernel_ends(
    head_dim: int, key_heads: int, drawn_cuda_case, oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress: list[Tensor] = []
    new_empty = Tensor.new_empty

    def watched(self: Tensor, *shape: int, **options: object) -> Tensor:
        made = new_empty(self, *shape, **options)
        if options.get("dtype") == torch.int32:
            progress.append(made)
        return made

    case = drawn_cuda_case(0)
    grid = TokenGrid(8 * 8 - 3, 2 * 16 - 1, prefix=3)
    blocks = torch.rand(4, 16, grid.num_blocks, grid.num_blocks, device="cuda") < 0.5
    blocks[:, :, :, 1::5] = False
    blocks[1, :4] = False
    case.query, case.key, case.value = (
        torch.randn(4, heads, grid.num_tokens, head_dim, device="cuda", dtype=torch.bfloat16)
        for heads in (16, key_heads, key_heads)
    )
    case.mask, case.key_padding_mask, case.relative_position = BlockMask(blocks, grid), None, None
    monkeypatch.setattr(Tensor, "new_empty", watched)
    _check(case, oracle)
    finished = progress[0][1 + 4 * key_heads :]  # by half block of queries: by the kernel itself, not the one after it
    assert finished.numel() == 4 * 16 * grid.num_blocks * 2
    assert 0 < finished.sum() < finished.numel()


@pytest.mark.usefixtures("fused", "poisoned_memory")
@pytest.mark.parametrize("head_dim", [64, 80])
def test_relative_position_of_more_rows_of_keys_than_arrive_at_once(head_dim: int, drawn_cuda_case, oracle) -> None:
    case = drawn_cuda_case(0)
    grid = TokenGrid(16 * 8 + 3, 9, prefix=130)
    case.query, case.key, case.value = (
        torch.randn(1, 2, grid.num_tokens, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    case.mask, case.key_padding_mask = BlockMask.dense(grid, device="cuda"), None
    case.relative_position = tuple(
        torch.randn(1, 2, grid.num_tokens, size, device="cuda", dtype=torch.bfloat16)
        for size in (grid.height, grid.width)
    )
    _check(case, oracle)


@pytest.mark.usefixtures("fused", "poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [-0.2, 0.0, 1e-3, 3.3, 1e-5])
def test_relative_position_at_any_scale(scale: float, dtype: torch.dtype, drawn_cuda_case, oracle) -> None:
    """The last is out of the fused kernel's range, and left to the pair."""
    case = drawn_cuda_case(0)
    grid = TokenGrid(13, 21, suffix=1)
    case.query, case.key, case.value = (
        torch.randn(1, 2, grid.num_tokens, 64, device="cuda", dtype=dtype) for _ in range(3)
    )
    case.mask, case.key_padding_mask, case.scale = BlockMask.dense(grid, device="cuda"), None, scale
    case.relative_position = tuple(
        torch.randn(1, 2, grid.num_tokens, size, device="cuda", dtype=dtype) for size in (13, 21)
    )
    _check(case, oracle)


@pytest.mark.usefixtures("fused", "poisoned_memory")
@pytest.mark.parametrize("head_dim", [64, 80])
def test_nothing_attended_gives_zeros_with_a_relative_position(head_dim: int) -> None:
    grid = TokenGrid(13, 21, prefix=1)
    mask = BlockMask(torch.zeros(1, 1, grid.num_blocks, grid.num_blocks, dtype=torch.bool, device="cuda"), grid)
    leaves = [
        torch.randn(2, 3, grid.num_tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for width in (head_dim, head_dim, head_dim, 13, 21)
    ]
    out = block_sparse_attention(*leaves[:3], mask, relative_position=tuple(leaves[3:]), backend="cuda")
    for grad in torch.autograd.grad(out, leaves, torch.randn_like(out)):
        assert not grad.any()


@pytest.mark.usefixtures("fused", "poisoned_memory")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_that_do_not_exist_never_overflow(head_dim: int) -> None:
    """Where all logits are far below zero, the weight of a key of zeros would be infinite."""
    grid = TokenGrid.sequence(200)
    query = torch.full((1, 1, 200, head_dim), 5.0, device="cuda", dtype=torch.bfloat16)
    leaves = [query.requires_grad_(), (-query).detach().requires_grad_(), torch.randn_like(query).requires_grad_()]
    out = block_sparse_attention(*leaves, BlockMask.dense(grid, device="cuda"), backend="cuda")
    for grad in torch.autograd.grad(out, leaves, torch.randn_like(out)):
        assert torch.isfinite(grad).all()


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(("head_dim", "relative"), [(64, False), (80, False), (128, False), (64, True), (80, True)])
def test_a_thousand_runs_agree(head_dim: int, relative: bool) -> None:
    grid = TokenGrid(40, 40, prefix=1)
    mask = BlockMask(torch.rand(1, 4, grid.num_blocks, grid.num_blocks, device="cuda") < 0.5, grid)
    leaves = [
        torch.randn(2, 4, grid.num_tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for width in [head_dim] * 3 + [40, 40] * relative
    ]
    grad_out = torch.randn_like(leaves[0])
    out = block_sparse_attention(
        *leaves[:3], mask, relative_position=tuple(leaves[3:]) if relative else None, backend="cuda"
    )
    first = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    deviations = torch.zeros((), dtype=torch.int64, device="cuda")
    in_any_order = [0, *range(3, len(leaves))]
    furthest = torch.zeros(len(leaves), device="cuda")
    for _ in range(1000):
        grads = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
        deviations += (grads[1] != first[1]).sum() + (grads[2] != first[2]).sum()
        for i in in_any_order:
            furthest[i] = torch.maximum(furthest[i], (grads[i] - first[i]).abs().max().float())
    assert int(deviations) == 0
    # One rounding of the largest gradient.
    assert all(furthest[i] <= first[i].abs().max().float() * 2**-7 for i in in_any_order)


@pytest.mark.parametrize("relative", [False, True])
def test_chosen_by_key_blocks_and_determinism(relative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[bool] = []
    fuses = cuda._fuses
    monkeypatch.setattr(cuda, "_fuses", lambda inputs: chosen.append(fuses(inputs)) or chosen[-1])
    grid = TokenGrid(64, 64)
    leaves = [
        torch.randn(1, 2, grid.num_tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(5 if relative else 3)
    ]

    def step(mask: BlockMask) -> bool:
        relative_position = tuple(leaves[3:]) if relative else None
        out = block_sparse_attention(*leaves[:3], mask, relative_position=relative_position, backend="cuda")
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        torch.cuda.synchronize()
        return chosen[-1]

    def with_key_blocks(count: int) -> BlockMask:
        places = torch.rand(1, 1, grid.num_blocks, grid.num_blocks, device="cuda").argsort(-1)
        return BlockMask(places < count, grid)

    dense, few, enough = BlockMask.dense(grid, device="cuda"), with_key_blocks(3), with_key_blocks(10)
    assert step(dense)
    for mask in (few, enough):
        step(mask)  # finds out how many there are
    assert step(enough)
    assert not step(few)
    torch.use_deterministic_algorithms(True)
    try:
        assert not step(dense)
    finally:
        torch.use_deterministic_algorithms(False)


def test_in_a_thread_that_has_not_used_the_device() -> None:
    """Nothing but the operator may make the device's context current there: memory comes from the allocator's cache."""
    grid = TokenGrid.sequence(256)
    mask = BlockMask.dense(grid, device="cuda")
    tensors = [torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    expected = block_sparse_attention(*tensors, mask, backend="cuda").clone()
    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(block_sparse_attention, *tensors, mask, backend="cuda").result()
    assert torch.equal(out, expected)
