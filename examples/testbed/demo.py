"""What a trained model still knows when its blocks are skipped: digits that it marks rightly, time, and a picture."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_attn_modules import Dense, DynamicTopK, LocalWindow, Pattern, patch_model, patch_report, unpatch_model

from .measures import Measures
from .model import Answers, load
from .scenes import MARKED, MEAN, OTHER, STD, Batch, Scenes, Setting

VARIANTS: dict[str, Pattern | None] = {
    "original": None,
    "exact": Dense(),
    "local, density 0.5": LocalWindow(density=0.5),
    "local, density 0.25": LocalWindow(density=0.25),
    "dynamic, density 0.25": DynamicTopK(density=0.25),
    "dynamic, density 0.125": DynamicTopK(density=0.125),
}
_SHOWN = ("original", "local, density 0.25", "dynamic, density 0.25")
_TINTS = {OTHER: (0.35, 0.35, 0.35), MARKED: (1.0, 1.0, 1.0)}


def show(output: Path, device: torch.device, scenes: int = 3) -> None:
    """Prints a table of the variants on a few scenes, and draws what some decide about the first."""
    model = load(device)
    made = Scenes(Setting(), device)
    batches = [made.batch("validation", number, 1) for number in range(scenes)]
    print(
        f"\nTestbed's ViT (timm), 512 × 512 pixels, 4096 tokens, {device.type}, trained weights; "
        f"{sum(int(batch.judged.sum()) for batch in batches)} digits in {scenes} scenes"
    )
    print(f"{'':<24}{'ms':>8}{'speed-up':>10}{'FLOPs saved':>13}{'digits right':>14}{'patches as original':>21}")
    found: dict[str, tuple[float, Measures]] = {}
    answer(model, batches[0])  # a first run is slower
    for title, pattern in VARIANTS.items():
        saved = 0.0
        if pattern is not None:
            patch_model(model, pattern)
        timed = [answer(model, batch) for batch in batches]
        measures = Measures()
        for batch, (_, answers) in zip(batches, timed):
            measures.add(answers, batch)
        milliseconds = 1e3 * statistics.median(seconds for seconds, _ in timed)
        found[title] = milliseconds, measures
        if pattern is not None:
            report = patch_report(model)
            saved = 1 - report.flops_after / report.flops_before
            unpatch_model(model)
        first, original = found["original"]
        print(
            f"{title:<24}{milliseconds:>8.0f}{first / milliseconds:>9.2f}×{saved:>13.0%}{measures.accuracy:>13.1f}%"
            f"{measures.agreement(original):>20.1f}%"
        )
    draw(batches[0], {title: found[title][1].decisions[0][0] for title in _SHOWN}, output / "testbed-decisions.png")


@torch.inference_mode()
def answer(model: nn.Module, batch: Batch) -> tuple[float, Answers]:
    """Seconds that a scene takes, and the answers."""
    start = time.perf_counter()
    logits = model(batch.images)
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    return time.perf_counter() - start, Answers.of(logits)


def draw(batch: Batch, decisions: dict[str, Tensor], path: Path) -> None:
    """The first scene, its labels, and decisions ``[N]`` about it: marked patches white, other digits grey."""
    from matplotlib.figure import Figure

    image = (batch.images[0] * STD + MEAN).clamp(0, 1).permute(1, 2, 0).cpu()
    pictures = {"scene": image}
    for title, labels in {"as it should be": batch.labels()[0], **decisions}.items():
        side = round(len(labels) ** 0.5)
        tints = torch.zeros(3, 3)
        for label, tint in _TINTS.items():
            tints[label] = torch.tensor(tint)
        pictures[title] = tints[labels.cpu().long()].view(side, side, 3)
    figure = Figure(figsize=(3.2 * len(pictures), 3.5), layout="constrained")
    for axes, (title, picture) in zip(figure.subplots(1, len(pictures)), pictures.items()):
        axes.imshow(picture.numpy())
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=110)
