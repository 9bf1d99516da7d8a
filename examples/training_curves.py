"""Loss and accuracy of several training runs, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_SMOOTHING = 0.9  # weight of the past in the running mean of the loss


@dataclass
class Curve:
    """What is noted of a run: the loss of every step, and the accuracy after some of them."""

    loss: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


def draw(curves: Mapping[str, Curve], path: Path) -> None:
    """Writes a PNG with the loss on the left and the accuracy on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for name, curve in curves.items():
        (line,) = loss.plot(range(1, len(curve.loss) + 1), running_mean(curve.loss), label=name)
        accuracy.plot(curve.steps, [100 * value for value in curve.accuracy], "o-", color=line.get_color(), label=name)
    loss.set(xlabel="step", ylabel="training loss, running mean")
    accuracy.set(xlabel="step", ylabel="validation accuracy, %")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def running_mean(values: list[float]) -> list[float]:
    """Exponential mean of the values so far, without a bias towards the first."""
    means: list[float] = []
    weighted = weight = 0.0
    for value in values:
        weighted = _SMOOTHING * weighted + value
        weight = _SMOOTHING * weight + 1
        means.append(weighted / weight)
    return means
