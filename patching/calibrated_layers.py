"""Hands a calibrated pattern to the layers of a model: finds each layer's own by name, and refuses another model's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from ..notices import log_once
from ..patterns import CalibratedLayer, CalibratedPattern, Dense, Pattern
from ..token_grid import TokenGrid
from .adapters import LeftAlone, Replaceable
from .walk import Slot

_OP = "CalibratedPattern"
# What torch puts between a model, or a part of it, and its own names.
_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_WEIGHTS = 64  # sampled per layer
_TOLERANCE = 0.25  # relative difference of the samples: fine-tuning stays below it, another training does not


def canonical_name(name: str) -> str:
    """The dotted path of a module without what torch's wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def hand_out_calibrated(chosen: Mapping[str, Pattern | None], slots: Sequence[Slot]) -> dict[str, Pattern | None]:
    """The patterns chosen for layers, by name, with each layer's own in the place of a calibrated one.

    Raises:
        ValueError: if a calibrated pattern is of another model, with the difference; or if it fits several parts of it.
    """
    own = dict(chosen)
    calibrated = {id(pattern): pattern for pattern in chosen.values() if isinstance(pattern, CalibratedPattern)}
    for pattern in calibrated.values():
        wanted = {name for name, found in chosen.items() if found is pattern}
        patterns = _patterns_by_name(pattern, slots, wanted)
        own.update({name: patterns.get(name) for name in wanted})
    return own


def _patterns_by_name(pattern: CalibratedPattern, slots: Sequence[Slot], wanted: Collection[str]) -> dict[str, Pattern]:
    """The pattern of each wanted layer, by its name; layers of other parts of the model are absent."""
    known = {layer.name: layer for layer in pattern.layers}
    names = {slot.name: canonical_name(slot.name) for slot in slots}
    replaceable = {names[slot.name] for slot in slots if isinstance(slot.verdict, Replaceable)}
    prefix, removed = _place(list(known), set(names.values()), {names[name] for name in wanted})
    patterns: dict[str, Pattern] = {}
    unknown = []
    has_other_weights = False
    for slot in slots:
        name = names[slot.name]
        if slot.name not in wanted or not name.startswith(prefix):
            continue
        own = removed + name[len(prefix) :]
        if own not in known:
            if name in replaceable:
                unknown.append(slot.name)
            continue
        layer = known[own]
        _check(layer, slot)
        has_other_weights |= _has_other_weights(layer, slot.original)
        patterns[slot.name] = Dense() if layer.is_dense else layer
    if unknown:
        raise ValueError(
            f"{_OP}: it must know every attention layer of this model, got one of {len(known)} layers "
            f"without {_some(unknown)}"
        )
    if has_other_weights:
        log_once(
            f"{_OP}: the weights of the model are not those it was calibrated with: the blocks that were chosen may "
            "not be where its attention lies"
        )
    return patterns


def _place(known: list[str], names: set[str], wanted: set[str]) -> tuple[str, str]:
    """(what names of the model have in front of the pattern's, what the pattern's have in front of the model's).

    Raises:
        ValueError: if the model has not all the layers, or has them several times.
    """
    first = known[0]
    prefixes = ["", *sorted(name[: -len(first)] for name in names if name.endswith(f".{first}"))]
    places = [(prefix, "") for prefix in prefixes if all(prefix + name in names for name in known)]
    parts = first.split(".")
    for count in range(1, len(parts)):
        removed = ".".join(parts[:count]) + "."
        if all(name.startswith(removed) and name[len(removed) :] in names for name in known):
            places.append(("", removed))
    if len(places) > 1:
        # Which part is meant may follow from the layers that were selected.
        selected = [
            (prefix, removed)
            for prefix, removed in places
            if any(prefix + name.removeprefix(removed) in wanted for name in known)
        ]
        places = selected or places
    if len(places) == 1 or ("", "") in places:
        return places[0]
    if places:
        where = _some([prefix for prefix, _ in places])
        raise ValueError(
            f"{_OP}: its layers must be found once in the model, got them under {where}; select one part with include"
        )
    missing = [name for name in known if name not in names]
    if len(missing) < len(known):
        got = f"one with {len(missing)} more: {_some(missing)}"
    else:
        got = f"one of {len(known)} layers called {_some(known)}"
    raise ValueError(f"{_OP}: it must be of this model, whose attention layers are {_some(sorted(names))}, got {got}")


def _check(layer: CalibratedLayer, slot: Slot) -> None:
    verdict = slot.verdict
    if isinstance(verdict, LeftAlone):
        raise ValueError(
            f"{_OP}: {slot.name} must be a layer that can be patched, got one that cannot: {verdict.reason}"
        )
    for what, ours, theirs in (
        ("heads", layer.num_heads, verdict.num_heads),
        ("channels per head", layer.head_dim, verdict.head_dim),
    ):
        if ours != theirs:
            raise ValueError(f"{_OP}: {slot.name} must have {ours} {what}, as calibrated, got {theirs}")
    geometry = verdict.geometry()
    if layer.grid is not None and geometry is not None and not _fits(layer.grid, geometry[0], _is_fixed(verdict)):
        raise ValueError(
            f"{_OP}: {slot.name} must work on the grid of calibration, {layer.grid}, got {geometry[0]}; calibrate at "
            "this image size"
        )


def _fits(ours: TokenGrid, theirs: TokenGrid, is_fixed: bool) -> bool:
    if is_fixed:
        return ours == theirs
    # A model that takes images of any size has but its extra tokens and its tiles to be told by.
    return (ours.prefix, ours.suffix, ours.tile) == (theirs.prefix, theirs.suffix, theirs.tile)


def _is_fixed(verdict: Replaceable) -> bool:
    """Whether the model takes images of one size alone."""
    source = verdict.source
    return source is None or bool(getattr(source.patch_embed, "strict_img_size", True))


def sample_weights(layer: nn.Module) -> tuple[float, ...]:
    """A few weights of a layer, evenly spaced over its largest parameter; none if they have no values yet."""
    parameters = [parameter for parameter in layer.parameters() if parameter.is_floating_point()]
    largest = max(parameters, key=lambda parameter: parameter.numel(), default=None)
    if largest is None or largest.device.type == "meta":
        return ()
    flat = largest.detach().flatten()
    index = torch.linspace(0, flat.numel() - 1, min(_WEIGHTS, flat.numel()), device=flat.device, dtype=torch.float64)
    return tuple(round(weight, 6) for weight in flat[index.long()].double().tolist())


def _has_other_weights(layer: CalibratedLayer, module: nn.Module) -> bool:
    ours, theirs = layer.weights, sample_weights(module)
    if not ours or not theirs:
        return False
    difference = sum((a - b) ** 2 for a, b in zip(ours, theirs)) ** 0.5
    return len(ours) != len(theirs) or difference > _TOLERANCE * sum(a * a for a in ours) ** 0.5


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown}, … ({len(names)} in all)"
