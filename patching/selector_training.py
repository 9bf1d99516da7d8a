"""train_selectors: teaches the selectors of a patched model where the attention of its layers lies.

The model itself stays as it is. Its layers attend densely to the given images, which tells how much each query block
pays to each key block; a selector's scores, as a distribution over key blocks, are drawn to that by the
Kullback-Leibler divergence. This is self-distillation as in SeerAttention (arXiv:2410.13276), without a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import SparseAttention
from ..modules.block_selector import BlockSelector
from ..patterns.choosing import block_mass
from .calibration import block_mass_of_images, images_of
from .observing import AttentionCall, observing_attention
from .walk import attention_slots

_LEAST = 1e-9  # mass of which a logarithm is taken


def train_selectors(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int = 1,
    learning_rate: float = 2e-3,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> list[float]:
    """Trains the selectors that :class:`LearnedTopK` gave to the layers of a model, and nothing else of it.

    A few dozen images like those of the application are enough, and they need no labels. The selectors do not depend on
    the density: train once, then patch with any.

    Args:
        model: a model patched with :class:`LearnedTopK`, on any device. It runs in evaluation mode and without
            gradients of its own; afterwards it is as it was, but for its selectors.
        batches: the model's inputs: tensors, or tuples and lists whose first entry is taken. All are kept in memory.
        epochs: how often they are gone through.
        learning_rate: of Adam, falling to zero in a straight line.
        forward: ``forward(model, batch)`` runs the model on what ``batches`` yields, for other kinds of input.

    Returns:
        The loss of each step: the divergence in nats, averaged over layers, heads and query blocks.

    Raises:
        ValueError: if no layer of the model has a selector, there are no batches, or a number is out of range.
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"train_selectors: epochs must be an integer ≥ 1, got {epochs!r}")
    if not learning_rate > 0:
        raise ValueError(f"train_selectors: learning_rate must be positive, got {learning_rate!r}")
    selectors = {
        id(slot.original): slot.current.selector
        for slot in attention_slots(model)
        if isinstance(slot.current, SparseAttention) and slot.current.selector is not None
    }
    if not selectors:
        raise ValueError("train_selectors: model must have layers with a selector; patch it with LearnedTopK first")
    inputs = list(batches) * epochs
    if not inputs:
        raise ValueError("train_selectors: batches must hold at least one batch, got none")

    weights = [selector.weight for selector in dict.fromkeys(selectors.values())]
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(inputs))
    device = weights[0].device
    losses: list[float] = []
    found: list[Tensor] = []

    def observe(layer: nn.Module, call: AttentionCall) -> None:
        selector = selectors.get(id(layer))
        if selector is None:
            return
        with torch.enable_grad():
            loss = divergence(selector, call) / len(selectors)
            loss.backward()  # at once, so that one layer's features are in memory at a time
        found.append(loss.detach())

    try:
        for weight in weights:
            weight.requires_grad_(True)
        with observing_attention(model, observe):
            for batch in inputs:
                found.clear()
                optimizer.zero_grad()
                _run(model, batch, device, forward)
                optimizer.step()
                schedule.step()
                losses.append(float(torch.stack(found).sum()))
    finally:
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(False)
    return losses


def divergence(selector: BlockSelector, call: AttentionCall) -> Tensor:
    """How far a selector's scores are from where the attention of a call lies, differentiable by its parameters."""
    queries, keys = selector(
        call.query,
        call.key,
        call.query_grid,
        call.key_grid,
        call.scale,
        call.relative_position,
        call.key_padding_mask,
    )
    estimate = block_mass(queries, keys, call.query_grid, call.key_grid).clamp(min=_LEAST)
    mass = attended_mass(call).to(estimate.dtype)
    logs = mass.clamp(min=_LEAST).log() - estimate.log()
    return (mass * logs).sum(-1)[:, :, call.query_grid.tile_blocks].mean()


@torch.no_grad()
def attended_mass(call: AttentionCall) -> Tensor:
    """What each query block really pays to each key block: ``[B, heads, Q, K]``, in float32 at least."""
    sizes = call.query_grid.block_sizes(call.query.device)
    mass = block_mass_of_images(call) / sizes[:, None]
    return mass.to(torch.promote_types(call.query.dtype, torch.float32))


def _run(model: nn.Module, batch: Any, device: torch.device, forward: Callable[[nn.Module, Any], Any] | None) -> None:
    if forward is not None:
        forward(model, batch)
        return
    images = images_of(batch)
    if not isinstance(images, Tensor):
        raise TypeError(f"train_selectors: batches must hold tensors, got {type(images).__name__}; give forward")
    model(images.to(device))
