"""What fewer blocks cost and gain: attention mass kept, likeness of the output, FLOPs, time, at several densities."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..patterns import CalibratedPattern, LocalWindow, Pattern
from .attention_mass import AttentionMass
from .observing import attending_by
from .patch import patch_model, unpatch_model
from .report import patch_report


@dataclass(frozen=True)
class TradeRow:
    """One choice of blocks, measured on images that it was not made from where there are such.

    Args:
        density: fraction of block pairs computed in the calibrated layers.
        mass: attention mass kept, the mean over these layers and their heads.
        least_mass: that of the head that keeps least.
        local_mass: what a local window of the same density keeps in its place.
        cosine: mean cosine between the model's output and that with dense attention.
        estimated_speedup: FLOPs of the whole model with dense attention over those with these blocks.
        measured_speedup: time of the model as it came over that with these blocks; None if it was not measured.
    """

    density: float
    mass: float
    least_mass: float
    local_mass: float
    cosine: float
    estimated_speedup: float
    measured_speedup: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The row by the names of its columns."""
        return asdict(self)


def trade(
    model: nn.Module, images: Tensor, patterns: Sequence[CalibratedPattern], mass: AttentionMass, rounds: int
) -> list[TradeRow]:
    """A row for each of the patterns.

    Args:
        model: a model that is not patched; it is not patched afterwards either.
        images: what outputs are compared on, ``[B, 3, height, width]``; the first one is what is timed.
        patterns: what calibration chose.
        mass: attention mass measured on these images.
        rounds: timed runs of each variant, taken in turns; 0 for none.
    """
    dense = outputs(model, images)
    cosines, shares = [], []
    other = other_flops(model, images[:1])
    for pattern in patterns:
        patch_model(model, pattern)
        cosines.append(_cosine(outputs(model, images), dense))
        report = patch_report(model)
        shares.append((other + report.flops_before) / (other + report.flops_after))
        unpatch_model(model)
    speedups = _speedups(model, images[:1], patterns, rounds) if rounds else [None] * len(patterns)
    rows = []
    for pattern, cosine, estimated, measured in zip(patterns, cosines, shares, speedups):
        kept = _heads(mass, pattern)
        local = _heads(mass, LocalWindow(density=pattern.density))
        rows.append(TradeRow(pattern.density, _mean(kept), min(kept), _mean(local), cosine, estimated, measured))
    return rows


def table(rows: Sequence[TradeRow]) -> str:
    """The rows as text."""
    header = ("density", "mass kept", "least head", "local window", "output cosine", "FLOPs", "measured")
    lines: list[tuple[str, ...]] = [header]
    for row in rows:
        measured = "–" if row.measured_speedup is None else f"{row.measured_speedup:.2f}×"
        numbers = (row.mass, row.least_mass, row.local_mass, row.cosine)
        estimated = f"{row.estimated_speedup:.2f}×"
        lines.append((f"{row.density:.3f}", *(f"{number:.4f}" for number in numbers), estimated, measured))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """What a model makes of images, one at a time: float32 ``[B, …]`` on the CPU."""
    found = []
    for image in images.split(1):
        with torch.no_grad():
            found.append(first_tensor(model(image)).float().cpu())
    return torch.cat(found)


def first_tensor(output: Any) -> Tensor:
    """The first tensor in what a model returned.

    Raises:
        TypeError: if there is none.
    """
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    for part in parts:
        if isinstance(part, Tensor):
            return part
    raise TypeError(f"choose: model must return a tensor, or several, got {type(output).__name__}")


def other_flops(model: nn.Module, image: Tensor) -> int:
    """FLOPs of all that is not attention between tokens, as far as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    def skip(layer: nn.Module, original: nn.Module) -> Callable[..., Tensor]:
        return lambda query, key, value, *grids, **options: torch.zeros_like(query)

    with attending_by(model, skip), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops()


def _heads(mass: AttentionMass, pattern: Pattern) -> list[float]:
    return [head for heads in mass.kept_by(pattern).values() for head in heads]


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _cosine(ours: Tensor, theirs: Tensor) -> float:
    return float(F.cosine_similarity(ours.flatten(1).double(), theirs.flatten(1).double()).mean())


def _speedups(
    model: nn.Module, image: Tensor, patterns: Sequence[CalibratedPattern], rounds: int
) -> list[float | None]:
    """Time of the model as it came over that with each pattern: medians of runs taken in turns."""
    times: dict[int, list[float]] = {index: [] for index in range(-1, len(patterns))}
    for _ in range(rounds):
        for index, seconds in times.items():
            if index >= 0:
                patch_model(model, patterns[index])
            _seconds(model, image)  # masks are built, and memory is taken, before the clock runs
            seconds.append(_seconds(model, image))
            unpatch_model(model)
    original = statistics.median(times[-1])
    return [original / statistics.median(times[index]) for index in range(len(patterns))]


def _seconds(model: nn.Module, image: Tensor) -> float:
    on_gpu = image.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        model(image)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start
