"""What choosing blocks at run time costs, beside the attention it serves.

    python benchmarks/selection.py --out benchmarks/results/selection-h200.json

All times are of CUDA graphs, taken in turns, on inputs that rotate through more memory than the cache holds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention import inputs
from records import Column, Row, environment, table, write
from timing import Call, host_microseconds
from torch import Tensor

from sparse_attn_modules import BlockMask, DynamicTopK, DynamicTopP, TokenGrid, block_sparse_attention
from sparse_attn_modules.patterns import DynamicPattern

# batch, heads, side of the image in patches, head_dim
SIZES = [(8, 12, 64, 64), (1, 12, 64, 64), (4, 16, 64, 80), (4, 16, 64, 128), (1, 12, 128, 64), (4, 16, 128, 64)]
DENSITY = 0.25
COLUMNS = [
    Column("batch × heads × tokens × head_dim", lambda row: f"{row['B']} × {row['H']} × {row['N']} × {row['D']}"),
    Column("dense attention, µs", "dense_us", ".1f"),
    Column("choosing a quarter, µs", "top_k_us", ".1f"),
    Column("of dense", lambda row: f"{row['top_k_us'] / row['dense_us']:.1%}"),
    Column("top-p, µs", "top_p_us", ".1f"),
    Column("reading once, µs", "floor_us", ".1f"),
    Column("both, µs", "both_us", ".1f"),
    Column("speed-up", lambda row: f"{row['dense_us'] / row['both_us']:.2f}×"),
    Column("host, µs", "host_us", ".0f"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    rows = [measure(*size, arguments.rounds, bandwidth) for size in SIZES]
    meta = environment("cuda", rounds=arguments.rounds, bandwidth=round(bandwidth / 1e12, 2))
    print(f"{meta['device']}, torch {meta['torch']}, bfloat16, copies at {meta['bandwidth']} TB/s")
    print(table(rows, COLUMNS))
    if arguments.out is not None:
        write(arguments.out, meta, rows)


def measure(batch: int, heads: int, side: int, head_dim: int, rounds: int, bandwidth: float) -> Row:
    """A row: microseconds of dense attention, of choosing, and of both choosing and attending."""
    grid = TokenGrid(side, side)
    sets = inputs(batch, heads, grid.num_tokens, head_dim)
    dense = BlockMask.dense(grid, device="cuda")
    top_k, top_p = DynamicTopK(density=DENSITY), DynamicTopP(mass=0.5)

    def choose(pattern: DynamicPattern, i: int) -> BlockMask:
        query, key, _ = sets[i % len(sets)]
        return pattern.select(query, key, grid)

    def attend(i: int, mask: BlockMask) -> Tensor:
        return block_sparse_attention(*sets[i % len(sets)], mask)

    calls: dict[str, Call] = {
        "dense_us": partial(attend, mask=dense),
        "top_k_us": partial(choose, top_k),
        "top_p_us": partial(choose, top_p),
        "both_us": lambda i: attend(i, choose(top_k, i)),
    }
    found = graphs_in_turns(calls, len(sets), rounds)
    read = 2 * batch * heads * grid.num_tokens * head_dim * 2
    return {
        **{"B": batch, "H": heads, "N": grid.num_tokens, "D": head_dim, "density": DENSITY},
        **found,
        "floor_us": read / bandwidth * 1e6,
        "host_us": host_microseconds(calls["top_k_us"]),
    }


def graphs_in_turns(calls: dict[str, Call], count: int, rounds: int) -> dict[str, float]:
    """Median microseconds of each call, from graphs of a call for every set of inputs."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    kept: list[Any] = []
    for name, call in calls.items():
        call(0)
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            kept.append([call(i) for i in range(count)])
    per_turn = max(1, 24 // count)
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()
            start.record()
            for _ in range(per_turn):
                graph.replay()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) / per_turn / count * 1e3)
    return {name: statistics.median(of_call) for name, of_call in times.items()}


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy: Callable[[], Any] = partial(target.copy_, source)
    copy()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(5):
        copy()
    stop.record()
    stop.synchronize()
    return 2 * source.nbytes * 5 / (start.elapsed_time(stop) * 1e-3)


if __name__ == "__main__":
    main()
