"""The ``gathered`` backend against dense scaled_dot_product_attention, on the CPU.

    python benchmarks/cpu_attention.py          # prints a table
    python benchmarks/cpu_attention.py --out    # and writes results/cpu_attention-cpu.json

All cases of a size take turns in every round, on the same new random tensors, so that whatever else the machine does
falls on all of them. Times are medians over the rounds. Query, key and value are views of a fused projection, as in
the models.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from records import Column, Row, environment, result_path, table, write
from torch import Tensor

from sparse_attn_modules import BlockMask, TokenGrid, block_sparse_attention
from sparse_attn_modules.patterns import Dense, LocalWindow

HEADS, HEAD_DIM = 12, 64
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="square numbers of patches")
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="default: as torch chooses")
    parser.add_argument("--out", nargs="?", type=Path, const=result_path("cpu_attention"), help="write the record")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    for tokens in arguments.tokens:
        rows += measure(tokens, arguments.densities, arguments.rounds)
    meta = environment("cpu", rounds=arguments.rounds)
    print(f"{meta['device']}, torch {meta['torch']}, {meta['threads']} threads; {HEADS} heads of {HEAD_DIM}, float32")
    print(table(rows, COLUMNS))
    if arguments.out is not None:
        write(arguments.out, meta, rows)
        print(f"written to {arguments.out}")


def measure(tokens: int, densities: list[float], rounds: int) -> list[Row]:
    """A row for dense attention and for each density."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"cpu_attention: tokens must be square numbers, got {tokens}")
    grid = TokenGrid(side, side)
    masks = {density: _mask(density, grid) for density in densities}
    cases: dict[float | None, Attention] = {None: F.scaled_dot_product_attention}
    cases |= {density: _sparse(mask) for density, mask in masks.items()}
    order = list(cases)
    times: dict[float | None, list[tuple[float, float, float]]] = {case: [] for case in cases}
    for turn in range(-1, rounds):
        qkv, grad_out = torch.randn(1, tokens, 3, HEADS, HEAD_DIM), torch.randn(1, HEADS, tokens, HEAD_DIM)
        for case in order:
            if sys.stderr.isatty():
                print(f"\r{tokens} tokens, round {max(turn + 1, 0)} of {rounds} ", end="", file=sys.stderr)
            measured = time_once(cases[case], qkv, grad_out)
            if turn >= 0:  # the first round only warms up
                times[case].append(measured)
        order.append(order.pop(0))  # so that no case always follows the same one
    if sys.stderr.isatty():
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)

    rows = []
    dense_flops = 4 * HEADS * tokens**2 * HEAD_DIM
    for case, attention in cases.items():
        forward, backward, both = (statistics.median(column) for column in zip(*times[case]))
        qkv, grad_out = torch.randn(1, tokens, 3, HEADS, HEAD_DIM), torch.randn(1, HEADS, tokens, HEAD_DIM)
        mask = None if case is None else masks[case]
        flops = dense_flops * (1.0 if mask is None else mask.token_density)
        rows.append(
            {
                "implementation": "sdpa" if case is None else "ours",
                "backend": "sdpa" if case is None else "gathered",
                "B": 1,
                "H": HEADS,
                "N": tokens,
                "D": HEAD_DIM,
                "dtype": "float32",
                "pattern": "dense" if case is None or case == 1 else "local",
                "density": 1.0 if mask is None else mask.density,
                "relative_position": False,
                "fwd_ms": forward * 1e3,
                "bwd_ms": backward * 1e3,
                "fwd_bwd_ms": both * 1e3,
                "fwd_tflops": flops / forward / 1e12,
                "bwd_tflops": 2.5 * flops / backward / 1e12,
                "fwd_peak_mib": peak_mib(partial(_forward, attention, qkv)),
                "peak_mib": peak_mib(partial(time_once, attention, qkv, grad_out)),
            }
        )
    dense = rows[0]
    for row in rows:
        row["fwd_speedup"] = dense["fwd_ms"] / row["fwd_ms"]
        row["fwd_bwd_speedup"] = dense["fwd_bwd_ms"] / row["fwd_bwd_ms"]
    return rows


def time_once(attention: Attention, qkv: Tensor, grad_out: Tensor) -> tuple[float, float, float]:
    """Seconds of a forward without gradients, of a backward, and of a forward and backward together."""
    start = time.perf_counter()
    _forward(attention, qkv)
    forward = time.perf_counter() - start
    leaf = qkv.detach().requires_grad_()
    query, key, value = _views(leaf)
    start = time.perf_counter()
    out = attention(query, key, value)
    middle = time.perf_counter()
    torch.autograd.grad(out, (query, key, value), grad_out)
    end = time.perf_counter()
    return forward, end - middle, end - start


def peak_mib(call: Callable[[], object]) -> float:
    """The most memory, in MiB, that tensors allocated during a call take at one time."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report every start and stop of itself
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 2**20


def _forward(attention: Attention, qkv: Tensor) -> None:
    with torch.no_grad():
        attention(*_views(qkv))


def _views(qkv: Tensor) -> tuple[Tensor, ...]:
    """``[B, N, 3, H, D]`` -> three views ``[B, H, N, D]``."""
    return tuple(part.transpose(1, 2) for part in qkv.unbind(2))


def _mask(density: float, grid: TokenGrid) -> BlockMask:
    return (Dense() if density == 1 else LocalWindow(density=density)).mask(grid, HEADS)


def _sparse(mask: BlockMask) -> Attention:
    return lambda query, key, value: block_sparse_attention(query, key, value, mask, backend="gathered")


COLUMNS = [
    Column("tokens", "N"),
    Column("attention", lambda row: "dense SDPA" if row["implementation"] == "sdpa" else row["backend"]),
    Column("density", "density", ".3f"),
    Column("forward ms", "fwd_ms", ".1f"),
    Column("speed-up", lambda row: f"{row['fwd_speedup']:.2f}×"),
    Column("forward + backward ms", "fwd_bwd_ms", ".1f"),
    Column("speed-up", lambda row: f"{row['fwd_bwd_speedup']:.2f}×"),
    Column("peak MiB, forward", "fwd_peak_mib", ".0f"),
    Column("peak MiB, both", "peak_mib", ".0f"),
]

if __name__ == "__main__":
    main()
