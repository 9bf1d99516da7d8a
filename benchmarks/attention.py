"""The ``cuda`` backend's forward pass against the attention kernels people use on the same GPU.

    python benchmarks/attention.py          # prints a table
    python benchmarks/attention.py --out    # and writes results/attention-<device>.json

Peers that are not installed are left out: FlashAttention-4 (``flash-attn-4``) and cuDNN's block-sparse attention
(``nvidia-cudnn-frontend``); FlexAttention, cuDNN and FlashAttention-2 come with PyTorch. All implementations of a case
take turns, on random tensors that rotate through more memory than the L2 cache holds. ``fwd_ms`` is the median over the
rounds, with the card hot from the rounds before; ``best_ms`` is the fastest round. TFLOP/s count active block pairs
only. A peer gets the same block mask over runs of 128 consecutive tokens that ours gets over 8 × 16 tiles.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import cudnn_block_sparse, fa4_dense, flash_attention_4, flex
from records import Column, Row, environment, result_path, table, write
from timing import Call, graph_milliseconds, host_microseconds, peak_mib, take_turns, those_that_run
from torch import Tensor

from sparse_attn_modules import BlockMask, LocalWindow, TokenGrid, block_sparse_attention

SHAPES = [(8, 12, 64, 64), (1, 12, 64, 64), (1, 12, 128, 64), (4, 16, 64, 80), (4, 16, 64, 128)]
RELATIVE_SHAPES = [(4, 12, 64, 64), (2, 16, 64, 80), (100, 12, 14, 64), (50, 16, 14, 80)]
DENSITIES = (1.0, 0.5, 0.25, 0.1)
L2_BYTES = 100 << 20


@dataclass
class Case:
    """One setting: inputs that rotate, a mask, and the calls that take turns on them."""

    batch: int
    heads: int
    side: int
    head_dim: int
    pattern: str
    mask: BlockMask
    relative_position: bool = False
    calls: dict[str, Call] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def flops(self) -> float:
        return 4 * self.batch * self.heads * self.tokens**2 * self.head_dim * self.mask.density

    def facts(self) -> Row:
        """What a row says of the case, whatever is measured."""
        return {
            "B": self.batch,
            "H": self.heads,
            "N": self.tokens,
            "D": self.head_dim,
            "dtype": "bfloat16",
            "pattern": self.pattern,
            "density": round(self.mask.density, 4),
            "relative_position": self.relative_position,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--calls", type=int, default=5, help="calls per round")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 80, 128])
    parser.add_argument("--flex", action="store_true", help="include FlexAttention, which compiles for each shape")
    parser.add_argument(
        "--out", nargs="?", type=Path, const=result_path("attention", _device()), help="write the record"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    with torch.no_grad():
        for shape in SHAPES:
            if shape[3] in arguments.head_dims:
                for case in plain_cases(*shape, with_flex=arguments.flex):
                    rows += measure(case, arguments.rounds, arguments.calls)
        for shape in RELATIVE_SHAPES:
            if shape[3] in arguments.head_dims:
                for case in relative_cases(*shape):
                    rows += measure(case, arguments.rounds, arguments.calls)
    meta = environment(_device(), rounds=arguments.rounds, calls=arguments.calls)
    print(f"{meta['device']}, torch {meta['torch']}, bfloat16")
    print(table(rows, COLUMNS))
    if arguments.out is not None:
        write(arguments.out, meta, rows)
        print(f"written to {arguments.out}")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def inputs(batch: int, heads: int, tokens: int, head_dim: int) -> list[list[Tensor]]:
    """Sets of query, key and value ``[B, H, N, D]``, views of fused projections, together larger than the cache."""
    count = max(2, math.ceil(L2_BYTES / (batch * heads * tokens * head_dim * 6)))
    fused = [torch.randn(batch, tokens, 3, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    return [[qkv[:, :, i].transpose(1, 2) for i in range(3)] for qkv in fused]


def masks(batch: int, heads: int, grid: TokenGrid) -> list[tuple[str, BlockMask]]:
    """Dense; random with equal rows; random with very unequal rows; local."""
    count = grid.num_blocks
    found = [("dense", BlockMask.dense(grid, device="cuda"))]
    for density in DENSITIES[1:]:
        scores = torch.rand(batch, heads, count, count, device="cuda")
        scores.diagonal(dim1=-2, dim2=-1).fill_(2)
        best = scores.topk(max(1, round(density * count)), -1).indices
        blocks = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        found.append(("random", BlockMask(blocks, grid)))
    share = torch.linspace(0.02, 0.48, count, device="cuda")[torch.randperm(count, device="cuda")]
    unequal = torch.rand(batch, heads, count, count, device="cuda") < share[:, None]
    unequal |= torch.eye(count, dtype=torch.bool, device="cuda")
    found.append(("unequal rows", BlockMask(unequal, grid)))
    found.append(("local", LocalWindow(density=0.25).mask(grid, num_heads=heads, device="cuda")))
    return found


def plain_cases(batch: int, heads: int, side: int, head_dim: int, with_flex: bool) -> list[Case]:
    grid = TokenGrid(side, side)
    sets = inputs(batch, heads, grid.num_tokens, head_dim)
    swapped = [[tensor.transpose(1, 2) for tensor in tensors] for tensors in sets]
    contiguous = [[tensor.contiguous() for tensor in tensors] for tensors in sets]
    cases = []
    for pattern, mask in masks(batch, heads, grid):
        case = Case(batch, heads, side, head_dim, pattern, mask)
        case.calls["ours"] = partial(ours, sets, mask)
        blocks = mask.blocks.expand(batch, heads, -1, -1)
        if pattern == "dense":
            case.calls["fa4"] = fa4_dense(swapped)
            case.calls["cudnn"] = partial(sdpa, sets, torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
            case.calls["fa2"] = partial(sdpa, sets, torch.nn.attention.SDPBackend.FLASH_ATTENTION)
        else:
            case.calls["fa4"] = flash_attention_4(swapped, blocks)
        if pattern in ("dense", "random") and head_dim in (64, 96, 128):
            case.calls["cudnn_bsa"] = cudnn_block_sparse(contiguous, blocks)
        if with_flex:
            case.calls["flex"] = flex(contiguous, blocks)
        cases.append(case)
    return cases


def relative_cases(batch: int, heads: int, side: int, head_dim: int) -> list[Case]:
    grid = TokenGrid(side, side)
    sets = inputs(batch, heads, grid.num_tokens, head_dim)
    width = -(-side // 8) * 8
    relative = [
        [
            torch.randn(batch, heads, grid.num_tokens, width, device="cuda", dtype=torch.bfloat16)[..., :side]
            for _ in "hw"
        ]
        for _ in sets
    ]
    found = [("dense", BlockMask.dense(grid, device="cuda"))]
    if grid.num_blocks > 4:
        found.append(("local", LocalWindow(density=0.25).mask(grid, num_heads=heads, device="cuda")))
    cases = []
    for pattern, mask in found:
        case = Case(batch, heads, side, head_dim, pattern, mask, relative_position=True)
        case.calls["ours"] = partial(ours, sets, mask, relative=relative)
        if pattern == "dense":
            case.calls["sdpa_bias"] = partial(_sdpa_with_bias, sets, relative)
        cases.append(case)
    return cases


def ours(sets: list[list[Tensor]], mask: BlockMask, i: int, relative: list[list[Tensor]] | None = None) -> Tensor:
    bias = None if relative is None else tuple(relative[i % len(sets)])
    return block_sparse_attention(*sets[i % len(sets)], mask, relative_position=bias, backend="cuda")


def sdpa(sets: list[list[Tensor]], backend: torch.nn.attention.SDPBackend, i: int) -> Tensor:
    with torch.nn.attention.sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*sets[i % len(sets)])


def _sdpa_with_bias(sets: list[list[Tensor]], relative: list[list[Tensor]], i: int) -> Tensor:
    rel_h, rel_w = relative[i % len(sets)]
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    return F.scaled_dot_product_attention(*sets[i % len(sets)], attn_mask=bias)


def measure(case: Case, rounds: int, calls: int) -> list[Row]:
    """A row per implementation, all timed in turns."""
    runnable = those_that_run(case.calls)
    turns = take_turns(runnable, rounds, calls)
    rows = []
    for name, call in runnable.items():
        times = turns[name]
        milliseconds = statistics.median(times)
        rows.append(
            {
                "implementation": name,
                **case.facts(),
                "fwd_ms": round(milliseconds, 5),
                "best_ms": round(min(times), 5),
                "fwd_tflops": round(case.flops / milliseconds / 1e9, 1),
                "best_tflops": round(case.flops / min(times) / 1e9, 1),
                "host_us": round(host_microseconds(call), 1),
                "graph_ms": graph_milliseconds(call) if name == "ours" else None,
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
    Column("rel. pos.", "relative_position"),
    Column("implementation", "implementation"),
    Column("ms", "fwd_ms", ".3f"),
    Column("TFLOP/s", "fwd_tflops", ".0f"),
    Column("best TFLOP/s", "best_tflops", ".0f"),
    Column("host µs", "host_us", ".0f"),
    Column("in a graph, ms", "graph_ms", ".3f"),
    Column("peak MiB", "peak_mib", ".0f"),
]


if __name__ == "__main__":
    main()
