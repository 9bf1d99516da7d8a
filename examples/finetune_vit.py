"""Fine-tune a vision transformer at high resolution, with dense and with block-sparse attention side by side.

    python examples/finetune_vit.py             # on a GPU: 512 × 512 pixels, 4096 tokens, about a minute
    python examples/finetune_vit.py --small     # on two cores of a CPU: 1024 tokens, two minutes
    python examples/finetune_vit.py --resume    # goes on from the last checkpoint of an interrupted run

Nothing is downloaded, so a small ViT is first trained at low resolution, where attention is cheap. Its weights are then
fine-tuned at full resolution by every variant: unpatched, and patched with each of ``--densities``. All take turns on
the same batches. At the end the checkpoints of the patched models are put into unpatched ones and evaluated densely.
Curves and checkpoint go to ``--folder``; ``--out`` also writes a record to benchmarks/results and the curves to
examples/results.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from digits_on_photographs import DigitsOnPhotographs
from resident_memory import ResidentMemory
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from training_curves import Curve, draw

from sparse_attn_modules import DensitySchedule, LocalWindow, patch_model, patch_report, unpatch_model

ROOT = Path(__file__).resolve().parent.parent
OUTPUT, RESULTS = ROOT / "examples" / "output", ROOT / "examples" / "results"
WARM_UP = 0.1  # share of the steps in which the learning rate rises
VALIDATION = 0x5EED  # seed of the images that accuracy is measured on


@dataclass(frozen=True)
class Stage:
    """One of the two trainings: at low resolution, and at full resolution."""

    size: int  # pixels
    copies: int  # digits per image
    batch: int
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Setting:
    """Sizes that suit a machine."""

    model: dict[str, int]  # arguments of timm.create_model
    digit_sizes: tuple[float, float]  # pixels
    low: Stage
    full: Stage
    checks: int  # evaluations while fine-tuning
    validation_batches: int

    @property
    def tokens(self) -> int:
        return (self.full.size // self.model["patch_size"]) ** 2


GPU = Setting(
    model={"patch_size": 8, "embed_dim": 192, "depth": 8, "num_heads": 3},
    digit_sizes=(24, 44),
    low=Stage(size=64, copies=1, batch=512, steps=1000, learning_rate=1e-3),
    full=Stage(size=512, copies=12, batch=32, steps=240, learning_rate=5e-4),
    checks=8,
    validation_batches=128,
)
CPU = Setting(
    model={"patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 2},
    digit_sizes=(20, 28),
    low=Stage(size=32, copies=1, batch=64, steps=600, learning_rate=2e-3),
    full=Stage(size=128, copies=6, batch=8, steps=60, learning_rate=5e-4),
    checks=4,
    validation_batches=16,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="sizes for a CPU; the default where there is no GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5])
    parser.add_argument("--schedule", action="store_true", help="thin out from density 1 over the first half")
    parser.add_argument("--low-steps", type=int, help="training steps at low resolution")
    parser.add_argument("--steps", type=int, help="training steps at full resolution")
    parser.add_argument("--batch", type=int, help="images per step at full resolution")
    parser.add_argument("--validation-batches", type=int)
    parser.add_argument("--compile", action="store_true", help="compile the training steps at full resolution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=OUTPUT, help="of checkpoint and curves")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    parser.add_argument("--stop-after", type=int, help="interrupt the fine-tuning after so many steps")
    parser.add_argument("--out", action="store_true", help="write the record and the curves that are published")
    arguments = parser.parse_args()
    setting = CPU if arguments.small or arguments.device == "cpu" else GPU
    low, full = setting.low, setting.full
    low = replace(low, steps=low.steps if arguments.low_steps is None else arguments.low_steps)
    full = replace(full, steps=arguments.steps or full.steps, batch=arguments.batch or full.batch)
    batches = arguments.validation_batches or setting.validation_batches
    setting = replace(setting, low=low, full=full, validation_batches=batches)
    torch.manual_seed(arguments.seed)
    finished = FineTuning(setting, arguments).run()
    if finished is None:
        return
    rows, curves = finished
    arguments.folder.mkdir(parents=True, exist_ok=True)
    draw(curves, arguments.folder / "finetune_vit.png")
    print(f"curves: {arguments.folder / 'finetune_vit.png'}")
    if arguments.out:
        publish(rows, curves, arguments.device)


def create(setting: Setting, size: int) -> nn.Module:
    """A ViT with random weights."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        img_size=size,
        num_classes=DigitsOnPhotographs.num_classes,
        global_pool="avg",
        **setting.model,
    )


@dataclass
class Run:
    """A model in training, with all that a checkpoint must hold."""

    name: str
    model: nn.Module
    stage: Stage
    schedule: DensitySchedule | None = None
    compiled: bool = False
    curve: Curve = field(default_factory=Curve)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = create_optimizer_v2(self.model, "adamw", lr=self.stage.learning_rate, weight_decay=0.05)
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self._forward = torch.compile(self.model) if self.compiled else self.model

    def _rate(self, step: int) -> float:
        part = (step + 1) / self.stage.steps
        return min(part / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * min(part, 1)))

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One training step."""
        self.model.train()
        start = _now(images.device)
        loss = self.gradients(images, labels)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rates.step()
        if self.schedule is not None:
            self.schedule.step()
        self.seconds.append(_now(images.device) - start)
        self.curve.loss.append(float(loss))

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss, with its gradients in the parameters."""
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = F.cross_entropy(self._forward(images), labels)
        loss.backward()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "curve": vars(self.curve),
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["rates"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.curve, self.seconds = Curve(**state["curve"]), list(state["seconds"])


class FineTuning:
    """Training at low resolution, fine-tuning of all variants in turns, evaluation."""

    def __init__(self, setting: Setting, arguments: argparse.Namespace) -> None:
        self.setting, self.arguments = setting, arguments
        self.device = torch.device(arguments.device)
        self.checkpoint: Path = arguments.folder / "finetune_vit.pt"
        self.images = self._images(setting.full)

    def _images(self, stage: Stage) -> DigitsOnPhotographs:
        return DigitsOnPhotographs(
            stage.size, self.setting.digit_sizes, stage.copies, self.device, seed=self.arguments.seed
        )

    def run(self) -> tuple[list[dict[str, Any]], dict[str, Curve]] | None:
        """A row and a curve per variant; None if interrupted."""
        full = self.setting.full
        print(f"{self.setting.tokens} tokens of {full.size} × {full.size} pixels, batch {full.batch}, {self.device}")
        state = torch.load(self.checkpoint, map_location=self.device) if self.arguments.resume else None
        weights = self.train_at_low_resolution() if state is None else state["weights"]
        runs = self.variants(weights)
        first = 0
        if state is not None:
            first = state["step"]
            for run in runs:
                run.load_state_dict(state["runs"][run.name])
            print(f"resumed after {first} steps from {self.checkpoint}")
        else:
            self.evaluate_all(runs, 0)
        every = max(1, full.steps // self.setting.checks)
        for step in range(first, full.steps):
            batch = self.images.batch("training", step, full.batch)
            for run in runs[step % len(runs) :] + runs[: step % len(runs)]:
                run.step(*batch)
            is_interrupted = step + 1 == self.arguments.stop_after
            if (step + 1) % every == 0 or step + 1 == full.steps:
                self.evaluate_all(runs, step + 1)
            if (step + 1) % every == 0 or step + 1 == full.steps or is_interrupted:
                self.save(runs, weights, step + 1)
            if is_interrupted:
                print(f"interrupted after {step + 1} steps; --resume goes on from {self.checkpoint}")
                return None
        return [self.row(run) for run in runs], {run.name: run.curve for run in runs}

    def train_at_low_resolution(self) -> dict[str, Tensor]:
        """Weights of a dense model, for patches of the same size in smaller images."""
        stage = self.setting.low
        images = self._images(stage)
        run = Run("low resolution", create(self.setting, stage.size).to(self.device), stage)
        start = time.perf_counter()
        for step in range(stage.steps):
            run.step(*images.batch("training", step, stage.batch))
        accuracy = self.accuracy(run.model, images, stage.batch)
        spent = time.perf_counter() - start
        print(
            f"trained at {stage.size} × {stage.size} pixels for {stage.steps} steps of {stage.batch} images in "
            f"{spent:.0f} s: accuracy {accuracy:.1%}"
        )
        run.model.set_input_size(img_size=self.setting.full.size)  # resamples the position embedding
        return run.model.state_dict()

    def variants(self, weights: dict[str, Tensor]) -> list[Run]:
        """The unpatched model and the patched ones, all with the same weights."""
        full = self.setting.full
        runs = []
        for density in (None, *self.arguments.densities):
            model = create(self.setting, full.size)
            model.load_state_dict(weights)
            model.to(self.device)
            schedule = None
            if density is not None:
                patch_model(model, LocalWindow(density=density))
                if self.arguments.schedule:
                    schedule = DensitySchedule.cosine(model, 1.0, density, max(1, full.steps // 2))
            name = "dense" if density is None else f"density {density:g}"
            runs.append(Run(name, model, full, schedule, self.arguments.compile))
        return runs

    def evaluate_all(self, runs: list[Run], step: int) -> None:
        """Notes the accuracy of all variants on a quarter of the validation images, and says how they stand."""
        for run in runs:
            run.curve.steps.append(step)
            run.curve.accuracy.append(self.accuracy(run.model, self.images, self.setting.full.batch, 0.25))
            loss = f"loss {statistics.fmean(run.curve.loss[-20:]):.3f}" if run.curve.loss else ""
            print(f"step {step:4d}  {run.name:<14} {loss:<12} accuracy {run.curve.accuracy[-1]:6.1%}")

    @torch.no_grad()
    def accuracy(self, model: nn.Module, images: DigitsOnPhotographs, batch: int, share: float = 1.0) -> float:
        """Fraction of validation images whose digit is recognised."""
        model.eval()
        right = []
        for index in range(max(1, round(share * self.setting.validation_batches))):
            x, labels = images.batch("validation", VALIDATION + index, batch)
            with torch.autocast(self.device.type, torch.bfloat16):
                right.append(model(x).argmax(-1) == labels)
        return float(torch.cat(right).float().mean())

    def save(self, runs: list[Run], weights: dict[str, Tensor], step: int) -> None:
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {"step": step, "weights": weights, "runs": {run.name: run.state_dict() for run in runs}}
        torch.save(state, self.checkpoint)

    def row(self, run: Run) -> dict[str, Any]:
        """What is published of a variant."""
        is_patched = run.name != "dense"
        density = patch_report(run.model).layers[0].density if is_patched else 1.0
        seconds = run.seconds[len(run.seconds) // 4 :]  # without those that warm up
        row = {
            "variant": run.name,
            "tokens": self.setting.tokens,
            "batch": self.setting.full.batch,
            "steps": self.setting.full.steps,
            "block density": density,
            "ms per step": 1e3 * statistics.median(seconds),
            "peak MiB": self.peak_mib(run),
            "final loss": statistics.fmean(run.curve.loss[-20:]),
            "accuracy": self.accuracy(run.model, self.images, self.setting.full.batch),
        }
        trained = torch.load(self.checkpoint, map_location=self.device)["runs"][run.name]["model"]
        model = unpatch_model(run.model)
        model.load_state_dict(trained)
        row["accuracy, evaluated densely"] = self.accuracy(model, self.images, self.setting.full.batch)
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
        return row

    def peak_mib(self, run: Run) -> float:
        """Memory that a forward and backward pass take on top of weights, gradients and optimizer."""
        batch = self.images.batch("training", 0, self.setting.full.batch)
        run.model.train()
        run.gradients(*batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            run.gradients(*batch)
            peak = (torch.cuda.max_memory_allocated(self.device) - before) / 2**20
        else:
            with ResidentMemory() as memory:
                run.gradients(*batch)
            peak = memory.peak_mib
        run.optimizer.zero_grad()
        return peak


def publish(rows: list[dict[str, Any]], curves: dict[str, Curve], device: str) -> None:
    """The record of the run beside those of the benchmarks, and its curves."""
    sys.path.append(str(ROOT / "benchmarks"))
    from records import environment, result_path, table, write

    path = result_path("finetune_vit", device)
    write(path, environment(device, curves={name: vars(curve) for name, curve in curves.items()}), rows)
    RESULTS.mkdir(parents=True, exist_ok=True)
    draw(curves, RESULTS / f"{path.stem}.png")
    print(table(rows))
    print(f"written to {path} and {RESULTS / path.stem}.png")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
