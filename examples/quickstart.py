"""Patch real vision transformers and run them on real photographs: what stays exact, what gets faster, what it skips.

    python examples/quickstart.py                # all models, two minutes on two cores
    python examples/quickstart.py --models vit   # one of them; also --device cuda, --size 512, --rounds 5

Prints a table per model and writes pictures to ``examples/output/``. The testbed's model comes trained, so that its
table says what skipping costs. For the others pretrained weights are used where the network gives them; otherwise
weights are random, which the output says: times and exactness do not depend on that, the cosines of sparse outputs do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from photographs import photographs
from pretrained import load_sam, load_timm
from resident_memory import ResidentMemory
from testbed import demo
from torch import Tensor, nn
from tqdm import tqdm

from sparse_attn_modules import Dense, LocalWindow, Pattern, patch_model, patch_report, unpatch_model, viz

OUTPUT = Path(__file__).parent / "output"
DENSITIES = (0.5, 0.25, 0.1)


@dataclass
class Demo:
    """A model to show: how to load it, and how many timed runs do."""

    title: str
    load: Callable[[int], tuple[nn.Module, bool]]
    rounds: int = 3


TESTBED = "testbed"
DEMOS = {
    "vit": Demo("ViT-S/16 (timm)", lambda size: load_timm("vit_small_patch16_224", size)),
    "dinov3": Demo("DINOv3 ViT-S/16 (timm)", lambda size: load_timm("vit_small_patch16_dinov3", size)),
    "sam": Demo("SAM ViT-B image encoder (segment_anything)", load_sam, rounds=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[TESTBED, *DEMOS], default=[TESTBED, *DEMOS])
    parser.add_argument("--size", type=int, default=1024, help="image size in pixels; SAM always takes 1024")
    parser.add_argument("--rounds", type=int, help="timed runs of each variant, taken in turns")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    for name in arguments.models:
        if name == TESTBED:
            demo.show(OUTPUT, device)
            continue
        size = 1024 if name == "sam" else arguments.size
        show(name, DEMOS[name], size, arguments.rounds or DEMOS[name].rounds, device)
    print(f"Pictures are in {OUTPUT.relative_to(Path.cwd()) if OUTPUT.is_relative_to(Path.cwd()) else OUTPUT}")


def show(name: str, demo: Demo, size: int, rounds: int, device: torch.device) -> None:
    model, is_pretrained = demo.load(size)
    model = model.to(device).eval()
    images = photographs(size, device)
    weights = "pretrained weights" if is_pretrained else "random weights (no network)"
    print(f"\n{demo.title}, {size} × {size} pixels, batch 1, {device.type}, {weights}")

    variants: dict[str, Pattern | None] = {"original": None, "exact": Dense()}
    variants |= {f"density {density}": LocalWindow(density=density) for density in DENSITIES}
    results = run(model, variants, images, rounds, device)
    original = results["original"]
    header = f"{'':<14}{'ms':>8}{'speed-up':>10}{'FLOPs saved':>13}{'peak MiB':>10}  agreement with the original"
    print(header)
    for title, result in results.items():
        if title == "original":
            agreement = ""
        elif title == "exact":
            worst = max(relative_error(out, expected) for out, expected in zip(result.outputs, original.outputs))
            agreement = f"relative error {worst:.1e}"
        else:
            worst = min(cosine(out, expected) for out, expected in zip(result.outputs, original.outputs))
            agreement = f"cosine {worst:.3f}"
        speedup = original.milliseconds / result.milliseconds
        print(
            f"{title:<14}{result.milliseconds:>8.0f}{speedup:>9.2f}×{result.flops_saved:>13.0%}"
            f"{result.peak_mib:>10.0f}  {agreement}"
        )

    patch_model(model, LocalWindow(density=0.25))
    with torch.inference_mode():
        model(images[0])
    report = patch_report(model)
    print(f"\n{report}")
    draw(name, report, images[0])
    unpatch_model(model)


@dataclass
class Result:
    """Medians over the rounds, the fraction of attention FLOPs saved, and the outputs for each photograph."""

    milliseconds: float
    peak_mib: float
    flops_saved: float
    outputs: list[Tensor]


def run(
    model: nn.Module, variants: dict[str, Pattern | None], images: list[Tensor], rounds: int, device: torch.device
) -> dict[str, Result]:
    """Runs every variant of the model on a photograph per round, the variants taking turns."""
    seconds: dict[str, list[float]] = {title: [] for title in variants}
    peaks: dict[str, list[float]] = {title: [] for title in variants}
    outputs: dict[str, list[Tensor]] = {title: [] for title in variants}
    saved = dict.fromkeys(variants, 0.0)
    with tqdm(total=rounds * len(variants), unit="run", leave=False, disable=not sys.stderr.isatty()) as progress:
        for turn in range(rounds):
            image = images[turn % len(images)]
            for title, pattern in variants.items():
                progress.set_description(title)
                if pattern is not None:
                    patch_model(model, pattern)
                elapsed, peak, out = measure(model, image, device)
                seconds[title].append(elapsed)
                peaks[title].append(peak)
                outputs[title].append(out)
                if pattern is not None:
                    report = patch_report(model)
                    saved[title] = 1 - report.flops_after / report.flops_before
                    unpatch_model(model)
                progress.update()
    return {
        title: Result(
            1e3 * statistics.median(seconds[title]), statistics.median(peaks[title]), saved[title], outputs[title]
        )
        for title in variants
    }


def measure(model: nn.Module, image: Tensor, device: torch.device) -> tuple[float, float, Tensor]:
    """Seconds, peak memory in MiB beyond what was held before, and output of one run; on CUDA after a warm-up."""
    with torch.inference_mode():
        if device.type == "cuda":
            model(image)
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            start = time.perf_counter()
            out = model(image)
            torch.cuda.synchronize(device)
            elapsed = time.perf_counter() - start
            return elapsed, (torch.cuda.max_memory_allocated(device) - before) / 2**20, out.float().cpu()
        with ResidentMemory() as memory:
            start = time.perf_counter()
            out = model(image)
            elapsed = time.perf_counter() - start
        return elapsed, memory.peak_mib, out


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


def cosine(out: Tensor, expected: Tensor) -> float:
    return float(F.cosine_similarity(out.flatten(), expected.flatten(), dim=0))


def draw(name: str, report: object, image: Tensor) -> None:
    """The mask, what one patch attends to, and the density per layer, as PNG files."""
    sparse = max(report.layers, key=lambda layer: (layer.density < 1, layer.flops_before))
    mask = sparse.pattern.mask(sparse.grid, sparse.num_heads)
    low, high = image.amin(), image.amax()
    photo = ((image[0] - low) / (high - low)).permute(1, 2, 0).cpu()  # [height, width, 3] in [0, 1]
    query = (sparse.grid.height * 2 // 5, sparse.grid.width // 2)
    viz.plot_block_mask(mask).savefig(OUTPUT / f"{name}-block-mask.png", dpi=110)
    viz.plot_attended_patches(photo, mask, query).savefig(OUTPUT / f"{name}-attended-patches.png", dpi=110)
    densities = [(layer.name, layer.density) for layer in report.layers]
    viz.plot_density(densities).savefig(OUTPUT / f"{name}-density.png", dpi=110)


if __name__ == "__main__":
    main()
