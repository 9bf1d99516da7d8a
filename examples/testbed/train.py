"""Trains the testbed's model on a GPU, in three minutes on an H200.

    python examples/testbed/train.py            # writes weights, log and curves to examples/output/testbed
    python examples/testbed/train.py --out      # to examples/testbed, where they are committed
    python examples/testbed/train.py --small    # a model and scenes for a CPU, which learn little: to try it out
    python examples/testbed/train.py --resume   # goes on from the last checkpoint of an interrupted run

The first part of the steps is on small scenes, where attention is cheap. They take their position embedding from a
random window of the large one, so that distances in patches mean the same there and later.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

EXAMPLES = Path(__file__).resolve().parent.parent
sys.path += [str(EXAMPLES), str(EXAMPLES.parent / "benchmarks")]

from records import environment, write  # noqa: E402
from training_curves import Curve, draw  # noqa: E402

from sparse_attn_modules import Dense, patch_model, unpatch_model  # noqa: E402
from testbed.measures import extents, measure  # noqa: E402
from testbed.model import DEPTH, HEADS, WEIGHTS, WIDTH, Answers, create, position_embedding, save  # noqa: E402
from testbed.scenes import Batch, Scenes, Setting  # noqa: E402

WARM_UP = 300  # steps in which the learning rate rises
WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Stage:
    """Scenes of one size."""

    setting: Setting
    batch: int
    steps: int


@dataclass(frozen=True)
class Plan:
    """Sizes that suit a machine."""

    model: dict[str, int]  # arguments of create
    low: Stage
    full: Stage
    learning_rate: float
    checks: int  # evaluations
    validation_batches: int  # of the full stage's size

    @property
    def steps(self) -> int:
        return self.low.steps + self.full.steps


GPU = Plan(
    model={"width": WIDTH, "depth": DEPTH, "heads": HEADS},
    low=Stage(Setting(size=192, digits=4, digit_sizes=(12, 80)), batch=128, steps=3368),
    full=Stage(Setting(), batch=32, steps=1266),
    learning_rate=1e-3,
    checks=14,
    validation_batches=16,
)
CPU = Plan(
    model={"width": 64, "depth": 2, "heads": 1},
    low=Stage(Setting(size=96, card=24, digits=2, digit_sizes=(16, 40)), batch=16, steps=60),
    full=Stage(Setting(size=128, card=24, digits=3, digit_sizes=(16, 60)), batch=16, steps=40),
    learning_rate=1e-3,
    checks=4,
    validation_batches=2,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="sizes for a CPU; the default where there is no GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--low-steps", type=int, help="training steps on small scenes")
    parser.add_argument("--steps", type=int, help="training steps on full scenes")
    parser.add_argument("--batch", type=int, help="scenes per step, of both sizes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=EXAMPLES / "output" / "testbed", help="of all that is written")
    parser.add_argument("--out", action="store_true", help="write weights, log and curves where they are committed")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    parser.add_argument("--stop-after", type=int, help="interrupt the training after so many steps")
    arguments = parser.parse_args()
    plan = CPU if arguments.small or arguments.device == "cpu" else GPU
    plan = Plan(
        plan.model,
        *(
            Stage(stage.setting, arguments.batch or stage.batch, stage.steps if steps is None else steps)
            for stage, steps in ((plan.low, arguments.low_steps), (plan.full, arguments.steps))
        ),
        plan.learning_rate,
        plan.checks,
        plan.validation_batches,
    )
    arguments.folder.mkdir(parents=True, exist_ok=True)
    training = Training(plan, torch.device(arguments.device), arguments.seed, arguments.folder / "checkpoint.pt")
    if arguments.resume:
        training.load()
    if training.run(arguments.stop_after):
        training.publish(WEIGHTS.parent if arguments.out else arguments.folder)


class Training:
    """The model, and all that training it needs.

    Args:
        plan: sizes.
        device: where everything lies.
        seed: of weights and scenes.
        checkpoint: file that an interrupted run goes on from.
    """

    def __init__(self, plan: Plan, device: torch.device, seed: int, checkpoint: Path) -> None:
        self.plan, self.device, self.seed, self.checkpoint = plan, device, seed, checkpoint
        torch.manual_seed(seed)
        self.model = create(plan.low.setting.size, **plan.model).to(device)
        self.model.pos_embed.requires_grad_(False)
        self.model.patch_embed.proj.to(memory_format=torch.channels_last)
        patch_model(self.model, Dense())
        self.optimizer = create_optimizer_v2(
            self.model, "adamw", lr=plan.learning_rate, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98), fused=True
        )
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.scenes = {stage: Scenes(stage.setting, device, seed) for stage in (plan.low, plan.full)}
        side, width = plan.full.setting.side, self.model.embed_dim
        self.positions = position_embedding(side, side, width).view(side, side, width).to(device)
        self.step = 0
        self.seconds = 0.0
        self.losses: list[Tensor] = []
        self.rows: list[dict[str, Any]] = []

    def _rate(self, step: int) -> float:
        rising = min(1.0, (step + 1) / min(WARM_UP, max(1, self.plan.steps // 10)))
        return rising * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / self.plan.steps)))

    def run(self, stop_after: int | None) -> bool:
        """Trains on; False if interrupted."""
        plan = self.plan
        every = max(1, plan.steps // plan.checks)
        start = time.perf_counter() - self.seconds
        while self.step < plan.steps:
            stage = plan.low if self.step < plan.low.steps else plan.full
            self._fit_size(stage)
            self._train(self.scenes[stage].batch("training", self.step, stage.batch))
            self.step += 1
            is_interrupted = self.step == stop_after
            is_check = self.step % every == 0 or self.step == plan.steps
            if is_check:
                self.seconds = time.perf_counter() - start
                self._check(stage)
            if is_check or is_interrupted:
                self.seconds = time.perf_counter() - start
                self.save()
            if is_interrupted:
                print(f"interrupted after {self.step} steps; --resume goes on from {self.checkpoint}")
                return False
        return True

    def _fit_size(self, stage: Stage) -> None:
        """Makes the model one for scenes of the stage's size."""
        side = stage.setting.side
        if self.model.patch_embed.grid_size != (side, side):
            self.model.set_input_size(img_size=stage.setting.size)
            self.model.pos_embed.requires_grad_(False)
        generator = torch.Generator().manual_seed(self.step)
        top, left = torch.randint(len(self.positions) - side + 1, (2,), generator=generator).tolist()
        with torch.no_grad():
            window = self.positions[top : top + side, left : left + side]
            self.model.pos_embed.copy_(window.reshape(self.model.pos_embed.shape))

    def _train(self, batch: Batch) -> None:
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(batch.images.contiguous(memory_format=torch.channels_last))
        loss = loss_of(Answers.of(logits), batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rates.step()
        self.losses.append(loss.detach())  # read later, so that the device never waits

    def _check(self, stage: Stage) -> None:
        """Measures the model on scenes of the present size that are not trained on, and says how it stands."""
        self.model.eval()
        batches = self.plan.validation_batches
        measures = measure(
            self.model, (self.scenes[stage].batch("validation", index, stage.batch) for index in range(batches))
        )
        self.rows.append(
            {
                "step": self.step,
                "size": stage.setting.size,
                "seconds": round(self.seconds, 1),
                "loss": float(torch.stack(self.losses[-50:]).mean()),
                "accuracy": measures.accuracy,
                "recognition": measures.recognition,
                "lookup": measures.lookup,
                "iou": measures.iou,
                "count_accuracy": measures.count_accuracy,
                "digits": measures.digits,
            }
        )
        shown = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self.rows[-1].items()
        )
        print("  ".join(shown), flush=True)

    def save(self) -> None:
        """Writes the checkpoint."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "losses": [float(loss) for loss in self.losses],
            "rows": self.rows,
            "model": {name: value for name, value in self.model.state_dict().items() if name != "pos_embed"},
            "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(),
        }
        torch.save(state, self.checkpoint)

    def load(self) -> None:
        """Goes back to the checkpoint."""
        state = torch.load(self.checkpoint, map_location=self.device)
        self.model.load_state_dict(state["model"], strict=False)  # the position embedding follows from the step
        self.optimizer.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["rates"])
        self.step, self.seconds, self.rows = state["step"], state["seconds"], state["rows"]
        self.losses = [torch.tensor(loss, device=self.device) for loss in state["losses"]]
        print(f"resumed after {self.step} steps from {self.checkpoint}")

    def publish(self, folder: Path) -> None:
        """Writes the weights, the log and the curves."""
        self._fit_size(self.plan.full)
        save(unpatch_model(self.model), folder / WEIGHTS.name)
        losses = [round(float(loss), 4) for loss in self.losses]
        meta = environment(self.device, seed=self.seed, low=str(self.plan.low), full=str(self.plan.full), loss=losses)
        write(folder / "training.json", meta, self.rows)
        curve = Curve(losses, [row["step"] for row in self.rows], [row["accuracy"] / 100 for row in self.rows])
        draw({"testbed": curve}, folder / "training.png")
        print(f"written to {folder}: {WEIGHTS.name}, training.json, training.png")


def loss_of(answers: Answers, batch: Batch) -> Tensor:
    """How wrong the answers are. Every digit counts alike, however many patches it has."""
    owner = batch.owner.flatten(1)
    is_owned = owner >= 0
    extent = extents(batch)

    def of_owner(values: Tensor) -> Tensor:
        return values.gather(1, owner.clamp(min=0))

    weight = torch.where(is_owned, 1 / of_owner(extent).clamp(min=1), 0)
    weight = weight / weight.sum()
    elsewhere = (~is_owned) / (~is_owned).sum()

    def entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")

    labels = entropy(answers.labels, batch.labels())
    classes = entropy(answers.classes, of_owner(batch.classes))
    asked = entropy(answers.asked, of_owner(batch.asked))
    colours = entropy(answers.colours, of_owner(batch.colours))
    size = F.smooth_l1_loss(answers.extent[..., 0], of_owner(extent).clamp(min=1).log(), reduction="none")
    return (labels * (weight + elsewhere) + (0.5 * classes + asked + 0.5 * colours + 0.1 * size) * weight).sum()


if __name__ == "__main__":
    main()
