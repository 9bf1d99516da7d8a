"""The ways to choose blocks that are held against each other: one entry each, from its name to how a model gets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from raster_strips import patch_with_strips
from sparse_attn_modules.patching import AttentionMass, measure_attention_mass
from torch import Tensor, nn

from sparse_attn_modules import (
    Butterfly,
    DilatedLocal,
    DynamicTopK,
    DynamicTopP,
    GlobalLocal,
    Hybrid,
    LocalWindow,
    MultiScale,
    Pattern,
    Random,
    RegionFocused,
    Streaming,
    Strided,
    patch_model,
)

TILES, STRIPS, CALIBRATED, DYNAMIC = "tiles", "strips", "calibrated", "dynamic"  # kinds
_CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))


@dataclass
class Given:
    """What a selector may look at before it is measured.

    Args:
        model: the model as it was trained.
        images: batches of images that are not measured on.
    """

    model: nn.Module
    images: Sequence[Tensor]

    @cached_property
    def mass(self) -> AttentionMass:
        """Where the model's attention lies on the images."""
        return measure_attention_mass(self.model, self.images, progress=False)


@dataclass(frozen=True)
class Selector:
    """A way to choose blocks.

    Args:
        name: as the record has it.
        kind: one of the kinds above.
        patch: ``patch(model, target, given)`` patches a model.
        targets: what is aimed at, if not the density: a fraction of the mass, or None where there is nothing to choose.
    """

    name: str
    kind: str
    patch: Callable[[nn.Module, float, Given], nn.Module]
    targets: Sequence[float | None] | None = None


def _pattern(
    name: str, kind: str, make: Callable[[float], Pattern], targets: Sequence[float | None] | None = None
) -> Selector:
    return Selector(name, kind, lambda model, target, given: patch_model(model, make(target)), targets)


def _strips(name: str, make: Callable[[float], Pattern]) -> Selector:
    return Selector(f"{name}, strips", STRIPS, lambda model, target, given: patch_with_strips(model, make(target)))


def _calibrated(model: nn.Module, density: float, given: Given) -> nn.Module:
    return patch_model(model, given.mass.choose(density=density))


def _local(density: float) -> Pattern:
    return LocalWindow(density=density)


def _global_local(density: float) -> Pattern:
    return GlobalLocal(density, global_tiles=2)


def _strided(density: float) -> Pattern:
    return Strided(density=density)


def _multi_scale(density: float) -> Pattern:
    """Heads that look half as far, as far, and one and a half times as far."""
    return MultiScale(densities=(density / 2, density, 1.5 * density))


def _hybrid(density: float) -> Pattern:
    """One head of three looks anywhere, with twice the density, the others nearby."""
    wide = min(1.0, 2 * density)
    return Hybrid(Random(wide), LocalWindow(density=(3 * density - wide) / 2), heads=1)


def _streaming(density: float) -> Pattern:
    return Streaming(density=density)


def _corners(density: float) -> Pattern:
    return RegionFocused(_CORNERS, density)


SELECTORS = {
    selector.name: selector
    for selector in (
        _pattern("local", TILES, _local),
        _pattern("global + local", TILES, _global_local),
        _pattern("strided", TILES, _strided),
        _pattern("random", TILES, Random),
        _pattern("dilated", TILES, DilatedLocal),
        _pattern("multi-scale", TILES, _multi_scale),
        _pattern("random head, local heads", TILES, _hybrid),
        _pattern("streaming", TILES, _streaming),
        _pattern("butterfly", TILES, lambda target: Butterfly(), (None,)),
        _pattern("told where the cards lie", TILES, _corners),
        _strips("local", _local),
        _strips("global + local", _global_local),
        _strips("strided", _strided),
        _strips("random", Random),
        _strips("dilated", DilatedLocal),
        _strips("streaming", _streaming),
        _strips("dynamic top-k", DynamicTopK),
        Selector("calibrated", CALIBRATED, _calibrated),
        _pattern("dynamic top-k", DYNAMIC, DynamicTopK),
        _pattern("dynamic top-p", DYNAMIC, DynamicTopP, (0.95, 0.9, 0.8)),
    )
}
