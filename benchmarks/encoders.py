"""Whole image encoders: as shipped, with other attention, with ours, and without any.

    python benchmarks/encoders.py                                   # prints a table; hours of compilation in all
    python benchmarks/encoders.py --models sam_b --batch 8 --out    # and writes results/encoders-<device>.json

A record is added to, case by case, as long as device, versions and commit are those of the rows that it holds: so a
record can be made in several runs. All implementations of a case take turns on the same images; times are medians over
the rounds. ``computed`` is the fraction of token pairs that our attention computes. Cosines are between features of
photographs and those of the model as shipped, in float32. Weights are random, so the cosine of a sparse output says
nothing of trained models; that of an exact one does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from encoder_models import ENCODERS, IMPLEMENTATIONS, Encoder, Implementation, load, photographs, sharing_parameters
from records import Column, Row, environment, merge, result_path, table, write
from torch import Tensor, nn

from sparse_attn_modules import patch_report

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from resident_memory import ResidentMemory

MODES = ("eager", "compiled", "graphs")
KEYS = ("model", "image_size", "batch", "dtype", "implementation", "mode", "density")
_COMPILED: dict[str, dict[str, Any]] = {"compiled": {}, "graphs": {"mode": "reduce-overhead"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--sizes", type=int, nargs="+", help="only these image sizes; or others, with --batch")
    parser.add_argument("--batch", type=int, nargs="+", help="only these batch sizes; or others, with --sizes")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16; float32 on CPUs"
    )
    parser.add_argument("--out", nargs="?", type=Path, const=Path(), help="add to the record")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"rounds: must be at least 1, got {arguments.rounds}")
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    torch._dynamo.config.recompile_limit = 256  # all variants of a model run the same code
    path = result_path("encoders", device) if arguments.out == Path() else arguments.out
    meta = environment(device, rounds=arguments.rounds)
    rows: list[Row] = []
    for name in arguments.models:
        for size, batch in cases(ENCODERS[name], arguments.sizes, arguments.batch):
            case = Case(name, size, batch, device, dtype)
            rows += case.measure(arguments.implementations, arguments.modes, arguments.rounds)
            if path is not None and rows:  # none as long as all variants were left out
                write(path, *merge(path, meta, rows, KEYS))
    if not rows:
        sys.exit("encoders: nothing was measured: no case was asked for, or all variants were left out")
    print(f"{meta['device']}, torch {meta['torch']}, {dtype}")
    print(table(rows, COLUMNS))
    if path is not None:
        print(f"written to {path}")


def cases(encoder: Encoder, sizes: list[int] | None, batches: list[int] | None) -> list[tuple[int, int]]:
    """The (image size, batch) pairs of an encoder that were asked for; all combinations if both are given."""
    if sizes is not None and batches is not None:
        return [(size, batch) for size in sizes for batch in batches]
    return [
        (size, batch)
        for size, batch in encoder.cases
        if (sizes is None or size in sizes) and (batches is None or batch in batches)
    ]


@dataclass
class Variant:
    """An implementation in a mode: how to call it, and what calls took."""

    name: str
    mode: str
    implementation: Implementation
    call: Callable[[Tensor], Tensor]
    milliseconds: list[float] = field(default_factory=list)


@dataclass
class Case:
    """A model at an image and batch size."""

    name: str
    size: int
    batch: int
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def measure(self, implementations: list[str], modes: list[str], rounds: int) -> list[Row]:
        """A row for each implementation and mode that can run."""
        torch.compiler.reset()
        encoder = ENCODERS[self.name]
        model = load(encoder, self.size, self.device)
        images = photographs(self.size, self.batch, self.device)
        kinds = min(3, self.batch)
        expected = torch.cat([model(images[i : i + 1]) for i in range(kinds)]).flatten(1)  # float32, as shipped
        model.to(self.dtype)
        images = images.to(self.dtype)
        variants, rows = [], []
        for name in implementations:
            implementation = IMPLEMENTATIONS[name]
            if implementation.for_sam and not encoder.is_sam:
                continue
            changed = implementation.make(sharing_parameters(model))
            for mode in modes:
                variant = Variant(name, mode, implementation, compiled(changed, mode))
                started = time.perf_counter()
                try:
                    out = self.run(variant, images)
                except (RuntimeError, TypeError, ValueError) as error:
                    print(f"{self.name} {name} {mode} left out: {str(error).splitlines()[0][:160]}", file=sys.stderr)
                    continue
                cosine = F.cosine_similarity(out[:kinds].flatten(1).double(), expected.double()).mean()
                del out
                peak = self.peak_gib(variant, images)
                rows.append(self.row(variant, peak, float(cosine), changed))
                variants.append(variant)
                print(f"{self.name} {self.size} {name} {mode}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
        self.time(variants, images, rounds)
        for variant, row in zip(variants, rows):
            row["ms"] = round(statistics.median(variant.milliseconds), 4)
            row["images_per_s"] = round(self.batch / row["ms"] * 1e3, 2)
        return rows

    def run(self, variant: Variant, images: Tensor) -> Tensor:
        if variant.mode == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with variant.implementation.around():
            return variant.call(images)

    def time(self, variants: list[Variant], images: Tensor, rounds: int) -> None:
        """Times all in turns, the first round only to warm up."""
        for turn in range(-1, rounds):
            for variant in variants:
                elapsed = self.time_once(variant, images)
                if turn >= 0:
                    variant.milliseconds.append(elapsed)
            variants = [*variants[1:], *variants[:1]]  # so that none always follows the same one

    def time_once(self, variant: Variant, images: Tensor) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            self.run(variant, images)
            return (time.perf_counter() - start) * 1e3
        self.run(variant, images)  # brings in what the others put out of the caches
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self.run(variant, images)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def peak_gib(self, variant: Variant, images: Tensor) -> float:
        """The most memory held during a call: on a GPU with the weights, else what the process grew by."""
        if self.device.type != "cuda":
            with ResidentMemory() as memory:
                self.run(variant, images)
            return memory.peak_mib / 2**10
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.run(variant, images)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30

    def row(self, variant: Variant, peak: float, cosine: float, model: nn.Module) -> Row:
        report = patch_report(model)
        return {
            "model": self.name,
            "title": ENCODERS[self.name].title,
            "library": "timm" if hasattr(model, "model") else "segment_anything",
            "image_size": self.size,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "implementation": variant.name.partition("_0")[0],
            "mode": variant.mode,
            "density": variant.implementation.density,
            "computed": round(report.flops_after / report.flops_before, 4) if report.flops_before else None,
            "ms": None,
            "images_per_s": None,
            "peak_gib": round(peak, 3),
            "cosine": round(cosine, 6),
        }


def compiled(model: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    if mode == "eager":
        return model
    return torch.compile(model, fullgraph=True, dynamic=False, **_COMPILED[mode])


TITLES = {
    "stock": "as shipped",
    "sdpa_bias": "SDPA, bias written out",
    "cudnn": "as shipped, cuDNN attention",
    "ours": "ours",
    "no_attention": "no attention",
}


def title(row: Row) -> str:
    """How attention is computed, for people."""
    name = TITLES[row["implementation"]]
    if row["implementation"] != "ours":
        return name
    return f"{name}, exact" if row["density"] == 1 else f"{name}, density {row['density']:g}"


def naming_dtypes(rows: list[Row]) -> list[Row]:
    """The rows, with their dtypes in the titles if there are several, by which cases are told apart."""
    if len({row.get("dtype") for row in rows}) < 2:
        return rows
    return [{**row, "title": f"{row['title']}, {row.get('dtype')}"} for row in rows]


COLUMNS = [
    Column("encoder", "title"),
    Column("pixels", lambda row: f"{row['image_size']}²"),
    Column("batch", "batch"),
    Column("attention", title),
    Column("computed", "computed", ".3f"),
    Column("mode", "mode"),
    Column("ms", "ms", ".2f"),
    Column("images/s", "images_per_s", ".1f"),
    Column("peak GiB", "peak_gib", ".2f"),
    Column("cosine", "cosine", ".4f"),
]


if __name__ == "__main__":
    main()
