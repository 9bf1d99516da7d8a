"""DensitySchedule: the density of a model's attention as a function of the training step.

A schedule is a list of milestones, each a step and the density from there on: a slope becomes a stair of a few
densities. So the masks of all stages are made beforehand, and a stage is entered by handing them to the layers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

from torch import nn

from ..block_mask import BlockMask
from ..modules import SparseAttention
from ..patterns import Dense, Pattern
from ..patterns.traced import LISTS
from ..token_grid import TokenGrid
from .adapters import Replaceable
from .selection import DenseOnFewTiles
from .walk import attention_slots

_Geometry = tuple[TokenGrid, TokenGrid]


class DensitySchedule:
    """Sets the density of a patched model's attention, step by step; used like a learning-rate schedule.

    Every layer whose pattern is not ``Dense()`` follows the schedule; dense layers stay dense. Make it after the model
    has been patched and moved to its device; that sets the density of step 0. Call :meth:`step` after each step or
    epoch, whichever the milestones count.

    No step is compiled again when the density changes, unless the pattern is dynamic: masks of the image sizes that are
    known (that of the model, and those of images seen) are made beforehand and enter compiled code as tensors. Where
    some stages are dense and others are not, the dense ones run through the sparse code path for that reason. A CUDA
    graph that was captured by hand holds the masks that it was captured with: capture it again when :meth:`step`
    returns True.

    A copy of the model, such as one of averaged weights, keeps its density; give ``nn.ModuleList([model, copy])`` to
    schedule both.

    Args:
        model: a model with block-sparse attention, as :func:`patch_model` leaves it; or any module around it.
        milestones: step → density in (0, 1] from this step on. Must hold step 0.
        pattern: what makes a pattern from a density: ``function(density)``, or a pattern with a ``density``, which is
            replaced. Each layer's own pattern if None, which must have a density then.

    Raises:
        ValueError: if the model has no layer to schedule, a layer's pattern has no density and none was given, or an
            argument is out of range.
        TypeError: if an argument is not as described.
    """

    def __init__(
        self,
        model: nn.Module,
        milestones: Mapping[int, float],
        *,
        pattern: Pattern | Callable[[float], Pattern] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"DensitySchedule: model must be a torch.nn.Module, got {type(model).__name__}")
        self._model = model
        self._milestones = _checked(milestones)
        stages = list(dict.fromkeys(density for _, density in self._milestones))
        self._patterns = {
            layer: {density: _wrapped_as(layer, make(density)) for density in stages}
            for layer, make in _scheduled(model, pattern).items()
        }
        self._masks: dict[Any, BlockMask] = {}
        self._step = 0
        self._density = self._density_at(0)
        self._enter_stage(self._density)

    @classmethod
    def linear(
        cls,
        model: nn.Module,
        start: float,
        end: float,
        num_steps: int,
        *,
        stages: int = 5,
        pattern: Pattern | Callable[[float], Pattern] | None = None,
    ) -> DensitySchedule:
        """From ``start`` to ``end`` in a straight line over ``num_steps`` steps, in ``stages`` different densities."""
        return cls(model, _stairs(start, end, num_steps, stages, lambda way: way), pattern=pattern)

    @classmethod
    def cosine(
        cls,
        model: nn.Module,
        start: float,
        end: float,
        num_steps: int,
        *,
        stages: int = 5,
        pattern: Pattern | Callable[[float], Pattern] | None = None,
    ) -> DensitySchedule:
        """Like :meth:`linear` along half a cosine: slowly at both ends."""
        return cls(
            model, _stairs(start, end, num_steps, stages, lambda way: math.acos(1 - 2 * way) / math.pi), pattern=pattern
        )

    @property
    def density(self) -> float:
        """The density that is asked for at the current step."""
        return self._density

    @property
    def current_step(self) -> int:
        """The number of steps made."""
        return self._step

    @property
    def milestones(self) -> dict[int, float]:
        """Step → density from this step on."""
        return dict(self._milestones)

    def step(self, to: int | None = None) -> bool:
        """Goes on to the next step, or to a given one.

        Returns:
            Whether the density has changed.

        Raises:
            RuntimeError: if a layer is no longer part of the model, say because it was unpatched.
        """
        target = self._step + 1 if to is None else to
        if not _is_integer(target) or target < 0:
            raise ValueError(f"DensitySchedule.step: to must be an integer ≥ 0, got {to!r}")
        density = self._density_at(target)
        has_changed = density != self._density
        if has_changed:
            self._enter_stage(density)
        self._density, self._step = density, int(target)
        return has_changed

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to resume the schedule."""
        return {"step": self._step, "milestones": dict(self._milestones)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken, and sets the density of that step.

        Raises:
            ValueError: if the state is that of a schedule with other milestones, which a call of :meth:`step` can
                resume on purpose.
        """
        if not isinstance(state, Mapping) or set(state) != {"step", "milestones"}:
            raise ValueError(f"DensitySchedule.load_state_dict: state must hold step and milestones, got {state!r}")
        step, milestones = state["step"], state["milestones"]
        if not _is_integer(step) or step < 0:
            raise ValueError(f"DensitySchedule.load_state_dict: state must hold a step ≥ 0, got {step!r}")
        # JSON makes strings of the steps.
        is_same = isinstance(milestones, Mapping) and {str(key): value for key, value in milestones.items()} == {
            str(key): value for key, value in self._milestones
        }
        if not is_same:
            raise ValueError(
                f"DensitySchedule.load_state_dict: state must be of the milestones {dict(self._milestones)}, "
                f"got {milestones!r}"
            )
        self.step(to=step)

    def __repr__(self) -> str:
        return (
            f"DensitySchedule(step {self._step}, density {self._density:.3g}, milestones {dict(self._milestones)}, "
            f"{len(self._patterns)} layers)"
        )

    def _density_at(self, step: int) -> float:
        return self._milestones[bisect_right(self._milestones, step, key=lambda milestone: milestone[0]) - 1][1]

    def _enter_stage(self, density: float) -> None:
        """Hands each layer its pattern and masks, once all are made: an error leaves every layer as it was."""
        present = set(self._model.modules())
        missing = [layer for layer in self._patterns if layer not in present]
        if missing:
            raise RuntimeError(
                f"DensitySchedule: layers must stay part of the model, got {len(missing)} of {len(self._patterns)} "
                "that do not; after patching or unpatching make a new schedule"
            )
        geometries = _geometries(self._model)
        masks = {}
        for layer in self._patterns:
            known = dict.fromkeys(
                [*geometries.get(layer, ()), *((mask.query_grid, mask.key_grid) for mask in layer.kept_masks)]
            )
            masks[layer] = [mask for geometry in known for mask in self._masks_of(layer, geometry, density)]
        for layer, patterns in self._patterns.items():
            layer.pattern = patterns[density]
            layer.keep_masks(masks[layer])

    def _masks_of(self, layer: SparseAttention, geometry: _Geometry, density: float) -> list[BlockMask]:
        """The mask of a stage, once all stages have one; none if the layer does not tell its heads."""
        num_heads = getattr(layer, "num_heads", None)
        parameter = next(layer.parameters(), None)
        if not isinstance(num_heads, int) or parameter is None or parameter.device.type == "meta":
            return []
        patterns = self._patterns[layer]
        if any(pattern.is_dynamic_on(*geometry) for pattern in patterns.values()):
            return []
        keys = {density: (pattern, geometry, num_heads, parameter.device) for density, pattern in patterns.items()}
        missing = {
            key: key[0].mask(geometry[0], num_heads, key_grid=geometry[1], device=parameter.device)
            for key in keys.values()
            if key not in self._masks
        }
        # Compiled code takes another path for a mask that is declared dense: so all stages are, or none.
        is_dense = all(mask.is_dense for mask in missing.values())
        for key, mask in missing.items():
            lists = {name: getattr(mask, name).contiguous() for name in LISTS}
            self._masks[key] = BlockMask.from_lists(mask.blocks.contiguous(), lists, *geometry, is_dense)
        return [self._masks[keys[density]]]


def _checked(milestones: Any) -> list[tuple[int, float]]:
    """The milestones in the order of their steps, without those that change nothing."""
    if not isinstance(milestones, Mapping):
        raise TypeError(f"DensitySchedule: milestones must be a mapping of steps, got {type(milestones).__name__}")
    for step, density in milestones.items():
        if not _is_integer(step) or step < 0:
            raise ValueError(f"DensitySchedule: milestones must be at steps ≥ 0, got {step!r}")
        if not isinstance(density, Real) or isinstance(density, bool) or not 0 < float(density) <= 1:
            raise ValueError(f"DensitySchedule: milestones must have densities in (0, 1], got {density!r}")
    if 0 not in milestones:
        raise ValueError(f"DensitySchedule: milestones must hold step 0, got steps {sorted(milestones)}")
    ordered = sorted((int(step), float(density)) for step, density in milestones.items())
    return [ordered[0], *(new for old, new in pairwise(ordered) if new[1] != old[1])]


def _is_integer(number: Any) -> bool:
    """Python's own, or NumPy's."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def _stairs(
    start: float, end: float, num_steps: int, stages: int, inverse: Callable[[float], float]
) -> dict[int, float]:
    """Milestones of a slope: each of the densities holds while it is the nearest to the slope.

    Args:
        inverse: the fraction of the steps after which a fraction of the way from start to end is made.
    """
    for name, value, least in (("num_steps", num_steps, 1), ("stages", stages, 2)):
        if not _is_integer(value) or value < least:
            raise ValueError(f"DensitySchedule: {name} must be an integer ≥ {least}, got {value!r}")
    _checked({0: start, 1: end})
    rise = 1 / (stages - 1)
    return {0: start} | {
        max(1, math.ceil(inverse((stage - 0.5) * rise) * num_steps)): start + (end - start) * stage * rise
        for stage in range(1, stages)
    }


def _scheduled(
    model: nn.Module, pattern: Pattern | Callable[[float], Pattern] | None
) -> dict[SparseAttention, Callable[[float], Pattern]]:
    """What makes the pattern of each layer that follows the schedule."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseAttention)}
    if not layers:
        raise ValueError("DensitySchedule: model must have block-sparse attention, got none; call patch_model first")
    sparse = {name: layer for name, layer in layers.items() if not isinstance(layer.pattern, Dense)}
    if not sparse:
        raise ValueError(
            f"DensitySchedule: model must have a layer with a pattern other than Dense(), which stays dense, got "
            f"{len(layers)} dense ones; a schedule that starts dense starts from a pattern of density 1"
        )
    if pattern is not None and not isinstance(pattern, Pattern):
        if not callable(pattern):
            raise TypeError(
                f"DensitySchedule: pattern must be a Pattern, a function of the density or None, "
                f"got {type(pattern).__name__}"
            )
        make = pattern
        return {layer: lambda density: _made_by(make, density) for layer in sparse.values()}
    makers: dict[SparseAttention, Callable[[float], Pattern]] = {}
    for name, layer in sparse.items():
        own = DenseOnFewTiles.within(layer.pattern) if pattern is None else pattern
        if getattr(own, "density", None) is None or all(field.name != "density" for field in fields(own)):
            where = f"that of {name}: {own}" if pattern is None else own
            raise ValueError(
                f"DensitySchedule: pattern must be given as a function of the density for patterns that do not have "
                f"one, got {where}"
            )
        makers[layer] = _with_density_of(own)
    return makers


def _with_density_of(pattern: Any) -> Callable[[float], Pattern]:
    return lambda density: replace(pattern, density=density)


def _made_by(make: Callable[[float], Pattern], density: float) -> Pattern:
    made = make(density)
    if not isinstance(made, Pattern):
        raise TypeError(f"DensitySchedule: pattern must return a Pattern, got {type(made).__name__}")
    return made


def _wrapped_as(layer: SparseAttention, pattern: Pattern) -> Pattern:
    """Layers that patch_model made stay dense where skipping cannot pay."""
    return DenseOnFewTiles.around(pattern) if isinstance(layer.pattern, DenseOnFewTiles) else pattern


def _geometries(model: nn.Module) -> dict[nn.Module, list[_Geometry]]:
    """What is known of the grids that the layers work on, before or besides those that they have met."""
    found: dict[nn.Module, list[_Geometry]] = {}
    for slot in attention_slots(model):
        geometry = slot.verdict.geometry() if isinstance(slot.verdict, Replaceable) else None
        if geometry is not None:
            found.setdefault(slot.current, []).append((geometry[0], geometry[0]))
    for layer in model.modules():
        grid = getattr(layer, "grid", None)
        if isinstance(layer, SparseAttention) and isinstance(grid, TokenGrid):
            key_grid = getattr(layer, "key_grid", None)
            found.setdefault(layer, []).append((grid, key_grid if isinstance(key_grid, TokenGrid) else grid))
    return found
