"""The ``cuda`` backend's backward pass against the attention kernels people train with on the same GPU.

    python benchmarks/attention_backward.py          # prints a table
    python benchmarks/attention_backward.py --out    # and writes results/attention_backward-<device>.json

Shapes, masks, inputs and turns are those of ``attention.py``. A call is the whole backward pass, with every kernel that
prepares or converts for it: gradients of query, key and value from that of the output. TFLOP/s count 2.5 times the
forward pass's operations, on active block pairs only. cuDNN's block-sparse backward pass exists for head_dim 128.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from attention import SHAPES, Case, inputs, masks, ours, sdpa
from peers import cudnn_block_sparse_backward, fa4_dense, flash_attention_4, flex
from records import Column, Row, environment, result_path, table, write
from timing import Call, peak_mib, take_turns, those_that_run
from torch import Tensor

from sparse_attn_modules import TokenGrid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=4, help="calls per round")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 80, 128])
    parser.add_argument("--flex", action="store_true", help="include FlexAttention, which compiles for each shape")
    parser.add_argument(
        "--out", nargs="?", type=Path, const=result_path("attention_backward", "cuda"), help="write the record"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    for shape in SHAPES:
        if shape[3] in arguments.head_dims:
            for case in cases(*shape, with_flex=arguments.flex):
                rows += measure(case, arguments.rounds, arguments.calls)
    meta = environment("cuda", rounds=arguments.rounds, calls=arguments.calls)
    print(f"{meta['device']}, torch {meta['torch']}, bfloat16")
    print(table(rows, COLUMNS))
    if arguments.out is not None:
        write(arguments.out, meta, rows)
        print(f"written to {arguments.out}")


def cases(batch: int, heads: int, side: int, head_dim: int, with_flex: bool) -> list[Case]:
    grid = TokenGrid(side, side)
    sets = inputs(batch, heads, grid.num_tokens, head_dim)
    # Leaves of their own, so that no time goes into the gradient of the fused projection.
    leaves = [[tensor.detach().requires_grad_() for tensor in tensors] for tensors in sets]
    swapped = [[tensor.detach().transpose(1, 2).requires_grad_() for tensor in tensors] for tensors in sets]
    contiguous = [[tensor.detach().contiguous().requires_grad_() for tensor in tensors] for tensors in sets]
    grads = [torch.randn_like(tensors[0]) for tensors in contiguous]
    swapped_grads = [grad.transpose(1, 2).contiguous() for grad in grads]
    ours_grads = [grad.transpose(1, 2) for grad in swapped_grads]
    found = []
    for pattern, mask in masks(batch, heads, grid):
        case = Case(batch, heads, side, head_dim, pattern, mask)
        blocks = mask.blocks.expand(batch, heads, -1, -1)
        attend = partial(ours, leaves, mask)
        case.calls["ours"] = _backward(attend, leaves, ours_grads)
        case.calls["ours, deterministic"] = _deterministic(_backward(attend, leaves, ours_grads))
        if pattern == "dense":
            case.calls["fa4"] = _backward(fa4_dense(swapped), swapped, swapped_grads)
            for name, backend in (
                ("cudnn", torch.nn.attention.SDPBackend.CUDNN_ATTENTION),
                ("fa2", torch.nn.attention.SDPBackend.FLASH_ATTENTION),
            ):
                case.calls[name] = _backward(partial(sdpa, leaves, backend), leaves, ours_grads)
        else:
            case.calls["fa4"] = _backward(flash_attention_4(swapped, blocks), swapped, swapped_grads)
        if pattern in ("dense", "random") and head_dim == 128:
            plain = [[tensor.detach() for tensor in tensors] for tensors in contiguous]
            case.calls["cudnn_bsa"] = cudnn_block_sparse_backward(plain, grads, blocks)
        if with_flex:
            case.calls["flex"] = _backward(flex(contiguous, blocks), contiguous, grads)
        found.append(case)
    return found


def _backward(forward: Callable[[int], Tensor], leaves: list[list[Tensor]], grads: list[Tensor]) -> Call:
    """A call that goes backward through a graph made once."""
    outputs: dict[int, Tensor] = {}

    def call(i: int) -> tuple[Tensor, ...]:
        which = i % len(leaves)
        if which not in outputs:
            outputs[which] = forward(which)
        return torch.autograd.grad(outputs[which], leaves[which], grads[which], retain_graph=True)

    return call


def _deterministic(call: Call) -> Call:
    def deterministic(i: int) -> object:
        with _deterministic_algorithms():
            return call(i)

    return deterministic


@contextmanager
def _deterministic_algorithms():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # that would be timed too
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def measure(case: Case, rounds: int, calls: int) -> list[Row]:
    """A row per implementation, all timed in turns."""
    runnable = those_that_run(case.calls)
    turns = take_turns(runnable, rounds, calls)
    rows = []
    for name, call in runnable.items():
        milliseconds, best = statistics.median(turns[name]), min(turns[name])
        rows.append(
            {
                "implementation": name,
                **case.facts(),
                "bwd_ms": round(milliseconds, 5),
                "best_ms": round(best, 5),
                "bwd_tflops": round(2.5 * case.flops / milliseconds / 1e9, 1),
                "best_tflops": round(2.5 * case.flops / best / 1e9, 1),
                "peak_mib": round(peak_mib(call), 1),
            }
        )
    return rows


COLUMNS = [
    Column("B", "B"),
    Column("H", "H"),
    Column("N", "N"),
    Column("D", "D"),
    Column("pattern", "pattern"),
    Column("density", "density", ".3f"),
    Column("implementation", "implementation"),
    Column("ms", "bwd_ms", ".3f"),
    Column("TFLOP/s", "bwd_tflops", ".0f"),
    Column("best TFLOP/s", "best_tflops", ".0f"),
    Column("peak MiB", "peak_mib", ".0f"),
]


if __name__ == "__main__":
    main()
