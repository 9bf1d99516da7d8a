"""calibrate: measures on a user's images where a model's attention lies, and keeps the blocks that hold most of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import why_skipping_cannot_pay
from ..patterns import CalibratedPattern
from ..token_grid import TokenGrid
from .adapters import Replaceable
from .attention_mass import AttentionMass, LayerMass, check_target
from .calibrated_layers import canonical_name, sample_weights
from .observing import AttentionCall, observing_attention, replaceable_slots
from .patch import nothing_to_patch
from .selection import Include, Selection
from .walk import attention_slots

_CHUNK = 1 << 24  # attention weights at a time: 64 MiB in float32

Forward = Callable[[Any, Any], Any]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    density: float | None = None,
    min_mass: float | None = None,
    include: Include = None,
    forward: Forward | None = None,
    max_images: int | None = None,
    progress: bool = True,
) -> CalibratedPattern:
    """Chooses which blocks each head of each layer computes, by where its attention lies on given images.

    The model runs on the images, and the attention weight of every block of every head is summed up, a few query
    blocks at a time: memory grows with the number of tokens, not with its square. Then blocks are kept by weight, over
    all layers and heads at once: by one overall ``density`` so that the weight left behind is least, or as few as leave
    every head ``min_mass`` of it. Blocks of extra tokens (class, register) and the heaviest block of each row are kept
    in any case. Layers where skipping cannot pay (windows, small grids) stay dense.

    A few dozen images like those of the application are enough. The model may be patched already or not; afterwards it
    is as it was. :func:`measure_attention_mass` measures once to choose often.

    Args:
        model: a model that :func:`patch_model` can patch, on any device. Runs in evaluation mode, without gradients.
        batches: any iterable of the model's inputs, all of one image size: tensors, or tuples and lists whose first
            entry is taken, as loaders of (images, labels) yield them. Tensors are moved to the model's device.
        density: fraction of block pairs to compute, as patterns count it, over all calibrated layers.
        min_mass: fraction of the attention weight, averaged over query tokens and images, that every head of every
            layer keeps.
        include: which layers are calibrated, as for :func:`patch_model`; the others stay dense.
        forward: ``forward(model, batch)`` runs the model on what ``batches`` yields, for other kinds of input.
        max_images: stop once so many images have been seen.
        progress: show a bar, if tqdm is installed and the output is a terminal.

    Returns:
        The pattern, for ``patch_model(model, pattern)``.

    Raises:
        ValueError: if nothing in the model can be patched or skips blocks, there are no images, their sizes differ, or
            an argument is out of range.
        TypeError: if an argument is not as described.
    """
    check_target("calibrate", density, min_mass)
    mass = measure_attention_mass(
        model, batches, include=include, forward=forward, max_images=max_images, progress=progress
    )
    return mass.choose(density=density, min_mass=min_mass)


def measure_attention_mass(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    include: Include = None,
    forward: Forward | None = None,
    max_images: int | None = None,
    progress: bool = True,
) -> AttentionMass:
    """The first half of :func:`calibrate`, with the same arguments: its result chooses blocks for many densities."""
    _check(model, batches, forward, max_images)
    selection = Selection(None, include, op="calibrate")
    recorder = _Recorder()
    slots = replaceable_slots(model)
    if not slots:
        raise ValueError(nothing_to_patch(attention_slots(model), "calibrate"))
    selection.check_names(slot.name for slot in slots)
    for slot in slots:
        if selection.pattern_for(slot.name, slot.original) is not None:
            recorder.selected.add(id(slot.original))
    run = _run if forward is None else forward
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    images = 0
    with observing_attention(model, recorder.observe):
        for batch in _shown(batches, progress):
            recorder.batch_size = 0
            run(model, _moved(batch, device))
            images += recorder.batch_size or _batch_size(batch)
            if max_images is not None and images >= max_images:
                break
    if images == 0:
        raise ValueError("calibrate: batches must yield at least one image, got none")

    layers: dict[int, LayerMass] = {}
    for slot in slots:
        assert isinstance(slot.verdict, Replaceable)
        key, name = id(slot.original), canonical_name(slot.name)
        if key in layers:
            layers[key] = replace(layers[key], names=(*layers[key].names, name))
            continue
        verdict = slot.verdict
        grid, mass, note = recorder.result(key, verdict.geometry())
        weights = sample_weights(slot.original)
        layers[key] = LayerMass((name,), verdict.num_heads, verdict.head_dim, grid, mass, weights, note)
    result = AttentionMass(tuple(layers.values()), images)
    if not result.measured:
        reasons = "; ".join(dict.fromkeys(layer.note for layer in result.layers))
        raise ValueError(f"calibrate: model must have a layer in which skipping blocks can pay, got none: {reasons}")
    return result


class _Recorder:
    """Sums up the mass of every layer that can skip blocks.

    A layer may be called several times for an image, and a batch may come in parts: what counts is the sum over all
    query tokens seen.
    """

    def __init__(self) -> None:
        self.selected: set[int] = set()
        self.batch_size = 0
        self._grids: dict[int, TokenGrid] = {}
        self._sums: dict[int, Tensor] = {}
        self._rows: dict[int, int] = {}
        self._notes: dict[int, str] = {}

    def observe(self, layer: nn.Module, call: AttentionCall) -> None:
        key = id(layer)
        before = self._grids.setdefault(key, call.query_grid)
        note = self._note(key, call)
        if note:
            self._notes[key] = note
            return
        if before != call.query_grid:
            raise ValueError(f"calibrate: batches must be of images of one size, got {before} and {call.query_grid}")
        self.batch_size = max(self.batch_size, call.query.shape[0])
        total = block_mass(call)
        self._sums[key] = self._sums[key] + total if key in self._sums else total
        self._rows[key] = self._rows.get(key, 0) + call.query.shape[0] * call.query_grid.num_tokens

    def result(self, key: int, geometry: tuple[TokenGrid, int] | None) -> tuple[TokenGrid | None, Tensor | None, str]:
        """Grid, mass ``[heads, query blocks, key blocks]``, and why there is none.

        Args:
            geometry: what is known of the layer's grid, should no call of it have been seen.
        """
        grid = self._grids.get(key, None if geometry is None else geometry[0])
        if key in self._sums and key not in self._notes:
            return grid, (self._sums[key] / self._rows[key]).cpu(), ""
        note = self._notes.get(key)
        if note is None:
            # Windows may be computed without a call that could be seen.
            note = (grid and why_skipping_cannot_pay(grid)) or "attention by blocks was not used"
        return grid, None, note

    def _note(self, key: int, call: AttentionCall) -> str:
        if key not in self.selected:
            return "it was not selected"
        if call.key_grid != call.query_grid:
            return "its keys lie on another grid than its queries"
        return why_skipping_cannot_pay(call.query_grid) or ""


def block_mass(call: AttentionCall) -> Tensor:
    """The attention weight on each block, summed over query tokens and images: float64 ``[heads, Q, K]``."""
    return block_mass_of_images(call).sum(0)


def block_mass_of_images(call: AttentionCall) -> Tensor:
    """The attention weight on each block, summed over query tokens: float64 ``[B, heads, Q, K]``."""
    device = call.query.device
    query_blocks, key_blocks = call.query_grid.block_tokens(device), call.key_grid.block_tokens(device)
    num_images, heads = call.query.shape[:2]
    keys = key_blocks.flatten()  # [key blocks × block size], absent ones −1
    total = torch.zeros(num_images, heads, len(query_blocks), len(key_blocks), dtype=torch.float64, device=device)
    step = max(_CHUNK // (heads * query_blocks.shape[1] * len(keys)), 1)
    for image in range(num_images):
        for start in range(0, len(query_blocks), step):
            rows = query_blocks[start : start + step]
            weights = call.weights(image, rows.clamp(min=0).flatten(), keys)
            # [heads, blocks × block size, key blocks × block size] -> [heads, blocks, block size, key blocks]
            weights = weights.unflatten(-1, key_blocks.shape).sum(-1).unflatten(1, rows.shape)
            weights = weights.masked_fill((rows < 0)[None, ..., None], 0)
            total[image, :, start : start + step] = weights.sum(2, dtype=torch.float64)
    return total


def _check(model: Any, batches: Any, forward: Any, max_images: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"calibrate: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"calibrate: batches must be an iterable of the model's inputs, such as [images], "
            f"got {type(batches).__name__}"
        )
    if forward is not None and not callable(forward):
        raise TypeError(f"calibrate: forward must be a function of (model, batch), got {type(forward).__name__}")
    if max_images is not None and (isinstance(max_images, bool) or not isinstance(max_images, int) or max_images < 1):
        raise ValueError(f"calibrate: max_images must be an integer ≥ 1, got {max_images!r}")


def images_of(batch: Any) -> Any:
    """A batch of images, or what should be one: loaders put labels behind it."""
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def _run(model: nn.Module, batch: Any) -> Any:
    images = images_of(batch)
    if not isinstance(images, Tensor):
        raise TypeError(
            f"calibrate: batches must yield tensors, or tuples that begin with one, where no forward is given, "
            f"got {type(images).__name__}"
        )
    return model(images)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, (tuple, list)):
        moved = [_moved(part, device) for part in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    if isinstance(batch, dict):
        return {name: _moved(part, device) for name, part in batch.items()}
    return batch


def _batch_size(batch: Any) -> int:
    """The number of images where no layer told it."""
    first = images_of(batch)
    return first.shape[0] if isinstance(first, Tensor) and first.dim() else 1


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress or not sys.stderr.isatty():
        return batches
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    return tqdm(batches, desc="calibrate", unit="batch")
