"""Training on the GPU: a whole step of ViT-B, and Segment Anything's global attention forward and backward.

    python benchmarks/training.py            # prints two tables
    python benchmarks/training.py --out      # and writes results/training-<device>.json
    python benchmarks/training.py --small    # sizes for trying it out, also without a GPU

A step is forward, loss, backward and AdamW under bfloat16 autocast: timm's model with PyTorch's attention against the
same model patched, at several densities of a local window. Peak memory is what one such model takes: weights, optimizer
state, gradients, activations.

Segment Anything's attention adds a decomposed relative position to the logits, whose gradients are wanted too.
PyTorch's attention takes it as a tensor over all token pairs, written out in eager mode or by the compiler, from
factors that lie heads first, as the original layers make them, or tokens first, as ours do.

All variants take turns, on random inputs that rotate; times are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from records import Column, Row, environment, result_path, table, write
from timing import Call, peak_mib, take_turns
from torch import Tensor, nn

from sparse_attn_modules import (
    BlockMask,
    Dense,
    LocalWindow,
    TokenGrid,
    block_sparse_attention,
    patch_model,
    patch_report,
)

ATTENTION_SHAPES = [(4, 12, 64, 64), (2, 16, 64, 80)]  # batch, heads, side of the grid, head_dim of SAM's B and H
ATTENTION_DENSITIES = (1.0, 0.25)
BATCHES = 4  # that rotate


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    model: str
    arguments: dict[str, object]
    batch: int
    attention: list[tuple[int, int, int, int]]


FULL = Sizes("vit_base_patch16_224", {"img_size": 1024}, 8, ATTENTION_SHAPES)
SMALL = Sizes(
    "vit_tiny_patch16_224",
    {"img_size": 128, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
    2,
    [(1, 2, 32, 16)],
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--parts", nargs="+", choices=["step", "attention"], default=["step", "attention"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=3, help="calls per round")
    parser.add_argument("--out", nargs="?", type=Path, const=True, help="write the record")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    sizes = SMALL if arguments.small else FULL
    rows: list[Row] = []
    if "step" in arguments.parts:
        for mode in arguments.modes:
            rows += training_steps(sizes, arguments.densities, mode, device, arguments.rounds, arguments.calls)
    if "attention" in arguments.parts:
        for shape in sizes.attention:
            rows += attention_calls(shape, arguments.modes, device, arguments.rounds, arguments.calls)
    meta = environment(device, rounds=arguments.rounds, calls=arguments.calls)
    print(f"{meta['device']}, torch {meta['torch']}, bfloat16\n")
    for select, columns in ((steps, STEP_COLUMNS), (attention, ATTENTION_COLUMNS)):
        if select(rows):
            print(table(select(rows), columns) + "\n")
    if arguments.out is not None:
        path = result_path("training", device) if arguments.out is True else arguments.out
        write(path, meta, rows)
        print(f"written to {path}")


def training_steps(
    sizes: Sizes, densities: list[float], mode: str, device: torch.device, rounds: int, calls: int
) -> list[Row]:
    """A row for the unpatched model and for each density."""
    import timm

    size = int(str(sizes.arguments["img_size"]))
    # Models of one class count as recompilations of each other.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 + 2 * len(densities))
    images = torch.randn(BATCHES, sizes.batch, 3, size, size, device=device)
    labels = torch.randint(1000, (BATCHES, sizes.batch), device=device)
    variants: dict[str, Call] = {}
    rows: list[Row] = []
    for density in (None, *densities):
        held = _allocated(device)
        model = timm.create_model(sizes.model, pretrained=False, **sizes.arguments).to(device).train()
        real = 1.0
        if density is not None:
            patch_model(model, Dense() if density == 1 else LocalWindow(density=density))
            real = _density(model)
        name = "timm" if density is None else f"ours, {density:g}"
        variants[name] = _training_step(model, images, labels, compiled=mode == "compiled")
        variants[name](0)  # compiles, and makes the optimizer's state
        rows.append(
            {
                "part": "step",
                "model": sizes.model,
                "image_size": size,
                "batch": sizes.batch,
                "mode": mode,
                "implementation": "timm" if density is None else "ours",
                "density": round(real, 4),
                "held_mib": (_allocated(device) - held) / 2**20,
            }
        )
    turns = _take_turns(variants, rounds, calls, device)
    for row, (name, call) in zip(rows, variants.items()):
        row["step_ms"] = round(statistics.median(turns[name]), 3)
        row["best_ms"] = round(min(turns[name]), 3)
        row["images_per_s"] = round(1e3 * sizes.batch / row["step_ms"], 2)
        held = row.pop("held_mib")
        row["peak_gib"] = round((held + peak_mib(call)) / 1024, 3) if device.type == "cuda" else None
        row["speedup"] = round(rows[0]["step_ms"] / row["step_ms"], 3)
    return rows


def _training_step(model: nn.Module, images: Tensor, labels: Tensor, compiled: bool) -> Call:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward: Callable[[Tensor], Tensor] = model
    if compiled:
        forward = torch.compile(model, dynamic=False)

    def step(i: int) -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = F.cross_entropy(forward(images[i % BATCHES]), labels[i % BATCHES])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _density(model: nn.Module) -> float:
    layers = patch_report(model).layers
    return sum(layer.density or 0.0 for layer in layers) / len(layers)


def attention_calls(
    shape: tuple[int, int, int, int], modes: list[str], device: torch.device, rounds: int, calls: int
) -> list[Row]:
    """A row for PyTorch's attention with the bias written out, compiled too in that mode, and for each density."""
    batch, heads, side, head_dim = shape
    grid = TokenGrid(side, side)

    def leaf(width: int) -> Tensor:
        # A transposed view of tokens before heads, as projections of tokens are.
        tokens_first = torch.randn(batch, grid.num_tokens, heads, width, device=device, dtype=torch.bfloat16)
        return tokens_first.transpose(1, 2).requires_grad_()

    sets = [[leaf(width) for width in (head_dim, head_dim, head_dim, side, side)] for _ in range(BATCHES)]
    heads_first = [
        [*tensors[:3], *(rel.detach().contiguous().requires_grad_() for rel in tensors[3:])] for tensors in sets
    ]
    grads = [torch.randn_like(tensors[0]) for tensors in sets]
    cases: dict[str, tuple[float, Call]] = {}
    peers: dict[str, Callable[..., Tensor]] = {"sdpa_bias": _with_bias_written_out}
    if "compiled" in modes:
        peers["sdpa_bias, compiled"] = torch.compile(_with_bias_written_out, dynamic=False)
    for name, attend in peers.items():
        for layout, tensors in (("heads first", heads_first), ("tokens first", sets)):
            cases[f"{name}, {layout}"] = (1.0, partial(_forward_backward, attend, tensors, grads))
    for density in ATTENTION_DENSITIES:
        pattern = Dense() if density == 1 else LocalWindow(density=density)
        mask = pattern.mask(grid, heads, device=device)
        cases[f"ours, {density:g}"] = (mask.density, partial(_forward_backward, partial(_ours, mask), sets, grads))
    variants = {name: call for name, (_, call) in cases.items()}
    for call in variants.values():
        call(0)
    turns = _take_turns(variants, rounds, calls, device)
    rows: list[Row] = []
    for name, (density, _) in cases.items():
        milliseconds = statistics.median(turns[name])
        rows.append(
            {
                "part": "attention",
                "implementation": "ours" if name.startswith("ours") else name,
                "B": batch,
                "H": heads,
                "N": grid.num_tokens,
                "D": head_dim,
                "dtype": "bfloat16",
                "density": round(density, 4),
                "relative_position": True,
                "fwd_bwd_ms": round(milliseconds, 4),
                "best_ms": round(min(turns[name]), 4),
                "peak_mib": round(peak_mib(variants[name]), 1) if device.type == "cuda" else None,
            }
        )
    fastest = min(row["fwd_bwd_ms"] for row in rows if row["implementation"] != "ours")
    for row in rows:
        row["speedup"] = round(fastest / row["fwd_bwd_ms"], 3)
    return rows


def _forward_backward(
    attend: Callable[..., Tensor], sets: list[list[Tensor]], grads: list[Tensor], i: int
) -> tuple[Tensor, ...]:
    leaves = sets[i % len(sets)]
    return torch.autograd.grad(attend(*leaves), leaves, grads[i % len(sets)])


def _ours(mask: BlockMask, query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    return block_sparse_attention(query, key, value, mask, relative_position=(rel_h, rel_w))


def _with_bias_written_out(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)  # [B, H, N, height, width] -> [B, H, N, N]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def _take_turns(calls: dict[str, Call], rounds: int, per_round: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of a call, once per round and name."""
    if device.type == "cuda":
        return take_turns(calls, rounds, per_round)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for i in range(per_round):
                call(i)
            times[name].append(1e3 * (time.perf_counter() - start) / per_round)
    return times


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def steps(rows: list[Row]) -> list[Row]:
    """The rows of whole training steps."""
    return [row for row in rows if row["part"] == "step"]


def attention(rows: list[Row]) -> list[Row]:
    """The rows of attention alone."""
    return [row for row in rows if row["part"] == "attention"]


STEP_COLUMNS = [
    Column("model", "model"),
    Column("pixels", lambda row: f"{row['image_size']}²"),
    Column("batch", "batch"),
    Column("mode", "mode"),
    Column("attention", lambda row: "PyTorch's" if row["implementation"] == "timm" else "ours"),
    Column("density", "density", ".3f"),
    Column("ms per step", "step_ms", ".1f"),
    Column("images / s", "images_per_s", ".1f"),
    Column("speed-up", lambda row: f"{row['speedup']:.2f}×"),
    Column("peak GiB", "peak_gib", ".1f"),
]
ATTENTION_COLUMNS = [
    Column("batch × heads × tokens × head_dim", lambda row: f"{row['B']} × {row['H']} × {row['N']} × {row['D']}"),
    Column("attention", lambda row: row["implementation"].replace("sdpa_bias", "SDPA, bias written out")),
    Column("density", "density", ".3f"),
    Column("forward + backward, ms", "fwd_bwd_ms", ".3f"),
    Column("over the fastest SDPA here", lambda row: f"{row['speedup']:.2f}×"),
    Column("peak MiB", "peak_mib", ".0f"),
]

if __name__ == "__main__":
    main()
