"""How much of what a model can do is left when blocks are skipped, by how they are chosen.

    python benchmarks/fidelity.py --device cuda --out    # --densities, --selectors, --tune, --steps, --batches

The model is that of examples/testbed, which tells for each digit of a scene whether it is what a far card asks for.
Accuracy is the percentage of digits that it judges rightly, 50 by chance; agreement the percentage of patches that it
decides as without skipping; mass the fraction of attention weight on the blocks that are computed, of the queries and
keys that it has without skipping. All see the same scenes. ``--tune`` also fine-tunes models while blocks are skipped;
``dense`` among these is a fine-tuning without skipping, to compare with.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from block_selectors import SELECTORS, Given
from fidelity_summary import COLUMNS
from kept_mass import AttentionSample
from records import Row, environment, result_path, table, write
from torch import nn

from sparse_attn_modules import Dense, patch_model, unpatch_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.append(str(EXAMPLES))

from testbed.measures import Measures, measure  # noqa: E402
from testbed.model import Answers, load  # noqa: E402
from testbed.scenes import Scenes, Setting  # noqa: E402
from testbed.train import loss_of  # noqa: E402

VALIDATION = 1000  # number of the first batch that is measured on: none that a training was watched by
CALIBRATION = 1 << 20  # and of the first that is calibrated on, from the scenes of training; and tuned on, after it
DENSE = "dense"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--selectors", nargs="*", choices=SELECTORS, default=list(SELECTORS))
    parser.add_argument("--tune", nargs="*", choices=[DENSE, *SELECTORS], default=[], help="fine-tune with these, too")
    parser.add_argument("--tune-density", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=120, help="of fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of fine-tuning")
    parser.add_argument("--batch", type=int, default=32, help="scenes per batch")
    parser.add_argument("--batches", type=int, default=32, help="batches that are measured on")
    parser.add_argument("--calibration", type=int, default=32, help="scenes that are calibrated on")
    parser.add_argument("--mass", type=int, default=8, help="scenes that the mass is measured on")
    parser.add_argument("--out", nargs="?", type=Path, const=True, help="write the record, to its place or a file")
    arguments = parser.parse_args()
    bench = Fidelity(arguments)
    try:
        bench.run()
    finally:
        print(table(bench.rows, COLUMNS))


class Fidelity:
    """The model, the scenes, and the rows so far.

    Args:
        arguments: those of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else None  # of autocast
        self.model = load(self.device)
        self.scenes = Scenes(Setting(), self.device)
        numbers = range(VALIDATION, VALIDATION + arguments.batches)
        self.batches = [self.scenes.batch("validation", number, arguments.batch) for number in numbers]
        images = self.scenes.batch("training", CALIBRATION, arguments.calibration).images
        self.given = Given(load(self.device), images.split(8))
        self.rows: list[Row] = []
        self.failures: list[str] = []

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def sample(self, model: nn.Module) -> AttentionSample:
        """The attention that the mass is measured on."""
        images = torch.cat([batch.images for batch in self.batches])[: self.arguments.mass]
        with self.autocast():
            return AttentionSample.of(model, images.split(1))

    def run(self) -> None:
        """Measures everything that was asked for."""
        arguments = self.arguments
        self.dense = measure(self.model, self.batches, self.dtype)
        sample = self.sample(self.model)
        self.add(DENSE, DENSE, 1.0, False, self.dense, 1.0, 1.0)
        for name in arguments.selectors:
            targets = SELECTORS[name].targets
            for target in arguments.densities if targets is None else targets:
                with self.going_on(f"{name} {target}"):
                    self.skip(name, target, sample)
        for name in arguments.tune:
            with self.going_on(f"{name}, fine-tuned"):
                self.skip_and_tune(name)
        if self.failures:
            raise SystemExit("failed: " + "; ".join(self.failures))

    @contextmanager
    def going_on(self, title: str) -> Iterator[None]:
        """One row that fails does not cost the others; all are named in the end."""
        try:
            yield
        except Exception:
            traceback.print_exc()
            self.failures.append(title)
            unpatch_model(self.model)

    def skip(self, name: str, target: float, sample: AttentionSample) -> None:
        """The row of a selector without training."""
        with self.autocast():
            SELECTORS[name].patch(self.model, target, self.given)
        measures = measure(self.model, self.batches, self.dtype)
        self.add(name, SELECTORS[name].kind, target, False, measures, *sample.kept_by(self.model))
        unpatch_model(self.model)

    def skip_and_tune(self, name: str) -> None:
        """The row of a selector, or of dense attention, after a fine-tuning."""
        model = copy.deepcopy(self.model)
        kind, target = DENSE, 1.0
        if name == DENSE:
            patch_model(model, Dense())
        else:
            kind, target = SELECTORS[name].kind, self.arguments.tune_density
            with self.autocast():
                SELECTORS[name].patch(model, target, self.given)
        self.tune(model)
        measures = measure(model, self.batches, self.dtype)
        self.add(name, kind, target, True, measures, *self.sample(model).kept_by(model))

    def tune(self, model: nn.Module) -> None:
        """Trains a patched model on scenes that no other training has seen."""
        steps, rate = self.arguments.steps, self.arguments.learning_rate
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
            batch = self.scenes.batch("training", CALIBRATION + 1 + step, self.arguments.batch)
            with self.autocast():
                logits = model(batch.images)
            loss_of(Answers.of(logits), batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()

    def add(
        self,
        selector: str,
        kind: str,
        target: float | None,
        tuned: bool,
        measures: Measures,
        density: float,
        mass: float,
    ) -> None:
        """Adds a row, prints it, and writes the record, so that what is measured is kept."""
        row = {
            "selector": selector,
            "kind": kind,
            "target": target,
            "density": density,
            "tuned": tuned,
            "accuracy": measures.accuracy,
            "dense_accuracy": self.dense.accuracy,
            "agreement": measures.agreement(self.dense),
            "mass": mass,
            "iou": measures.iou,
            "digits": measures.digits,
        }
        self.rows.append(row)
        print(table([row], COLUMNS).splitlines()[-1], flush=True)
        out = self.arguments.out
        if out:
            keys = ("steps", "learning_rate", "batch", "batches", "calibration", "mass")
            meta = environment(self.device, **{key: vars(self.arguments)[key] for key in keys})
            write(result_path("fidelity", self.device) if out is True else out, meta, self.rows)


if __name__ == "__main__":
    main()
