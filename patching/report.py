"""patch_report: what was patched, what it saves, and what was left alone for which reason."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import nn

from ..modules import SAMWindowBlock, SparseAttention, why_skipping_cannot_pay
from ..patterns import Dense, DynamicPattern, Pattern
from ..token_grid import TokenGrid
from .adapters import LeftAlone, Replaceable
from .selection import DenseOnFewTiles
from .walk import Slot, attention_slots, original_of


@dataclass(frozen=True)
class PatchedLayer:
    """An attention layer that was replaced. FLOPs are those of query · key and weights · value, for one image.

    Args:
        name: dotted path from the model.
        kind: what it was.
        grid: what it works on: the last image, or before the first one that for which the model is made; None if that
            is not known, as are then density and FLOPs.
        windows: number of such grids per image.
        num_heads: number of query heads.
        pattern: the pattern it was given.
        density: fraction of block pairs computed; None also where that depends on the image.
        flops_before, flops_after: FLOPs of all token pairs, and of those that are computed.
        note: why nothing is skipped, where that was asked for; whether blocks are chosen at run time; whether windows
            are read in place; else empty.
    """

    name: str
    kind: str
    grid: TokenGrid | None
    windows: int
    num_heads: int
    pattern: Pattern
    density: float | None
    flops_before: int | None
    flops_after: int | None
    note: str


@dataclass(frozen=True)
class UnpatchedLayer:
    """An attention layer that was left alone, and the reason."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch_report` returns; prints as a table."""

    layers: tuple[PatchedLayer, ...]
    left_alone: tuple[UnpatchedLayer, ...]

    @property
    def flops_before(self) -> int:
        """Attention FLOPs per image of the replaced layers, if all token pairs were computed."""
        return sum(layer.flops_before or 0 for layer in self.layers)

    @property
    def flops_after(self) -> int:
        """Attention FLOPs per image of the replaced layers; where they depend on the image, at most."""
        return sum(
            (layer.flops_before if layer.flops_after is None else layer.flops_after) or 0 for layer in self.layers
        )

    def __str__(self) -> str:
        lines = []
        if self.layers:
            header = ("layer", "kind", "grid", "heads", "pattern", "density", "attention FLOPs", "")
            rows = [header, *(_cells(layer) for layer in self.layers)]
            if self.flops_before:
                saved = 1 - self.flops_after / self.flops_before
                total = f"{_flops(self.flops_before)} → {_flops(self.flops_after)}"
                rows.append(("total", "", "", "", "", "", total, f"{saved:.1%} saved"))
            lines += _aligned(rows)
        else:
            lines.append("no attention layer is patched")
        if self.left_alone:
            lines.append("left alone:")
            lines += _aligned([(f"  {layer.name}", layer.kind, layer.reason) for layer in self.left_alone])
        return "\n".join(lines)

    __repr__ = __str__


def patch_report(model: nn.Module) -> PatchReport:
    """For each attention layer of a model: grid, heads, pattern, density and FLOPs, or why it was left alone.

    Grids are those of the last image in this thread, or before the first image those for which the model is made.
    """
    layers, left_alone = [], []
    for slot in attention_slots(model):
        if isinstance(slot.current, SparseAttention) and original_of(slot.current) is not None:
            layers.append(_patched(slot, slot.current))
        else:
            reason = slot.verdict.reason if isinstance(slot.verdict, LeftAlone) else "not selected for patching"
            left_alone.append(UnpatchedLayer(slot.name, slot.verdict.kind, reason))
    return PatchReport(tuple(layers), tuple(left_alone))


def _patched(slot: Slot, layer: SparseAttention) -> PatchedLayer:
    pattern, verdict = DenseOnFewTiles.within(layer.pattern), slot.verdict
    if not isinstance(verdict, Replaceable):
        # Patched as part of another model: whatever else the verdict says, the replacement is there.
        num_heads: int = slot.original.num_heads  # type: ignore[assignment]
        note = "the grid is not known from this part of the model"
        return PatchedLayer(slot.name, verdict.kind, None, 1, num_heads, pattern, None, None, None, note)
    heads = verdict.num_heads
    geometry = verdict.geometry()
    if geometry is None:
        return PatchedLayer(slot.name, verdict.kind, None, 1, heads, pattern, None, None, None, "no image seen yet")
    grid, windows = geometry
    flops = 4 * heads * verdict.head_dim * grid.num_tokens**2 * windows
    notes = ["windows read in place"] if isinstance(slot.parent, SAMWindowBlock) else []
    if isinstance(pattern, Dense):
        return PatchedLayer(slot.name, verdict.kind, grid, windows, heads, pattern, 1.0, flops, flops, "".join(notes))
    if layer.pattern.is_dynamic_on(grid, grid):
        density = pattern.rule(grid, grid).density(grid, grid) if isinstance(pattern, DynamicPattern) else None
        after = None if density is None else round(flops * density)
        note = "dynamic" if density is not None else "dynamic: the density depends on the image"
        return PatchedLayer(slot.name, verdict.kind, grid, windows, heads, pattern, density, flops, after, note)
    mask = layer.pattern.mask(grid, heads)
    reason = why_skipping_cannot_pay(grid) if isinstance(layer.pattern, DenseOnFewTiles) else None
    if reason is None and mask.is_dense:
        reason = "the pattern covers every block of this grid"
    note = "; ".join([f"nothing to gain: {reason}", *notes] if reason else notes)
    after = round(flops * mask.token_density)
    return PatchedLayer(slot.name, verdict.kind, grid, windows, heads, pattern, mask.density, flops, after, note)


def _cells(layer: PatchedLayer) -> tuple[str, ...]:
    grid, density, flops = "?", "?", "?"
    if layer.grid is not None:
        prefix = f"{layer.grid.prefix} + " if layer.grid.prefix else ""
        windows = f"{layer.windows} × " if layer.windows > 1 else ""
        grid = f"{windows}{prefix}{layer.grid.height}×{layer.grid.width}"
    if layer.density is not None and layer.flops_before is not None and layer.flops_after is not None:
        density = f"{layer.density:.3f}"
        flops = f"{_flops(layer.flops_before)} → {_flops(layer.flops_after)}"
    return layer.name, layer.kind, grid, str(layer.num_heads), _short(layer.pattern), density, flops, layer.note


def _short(pattern: Pattern) -> str:
    """The pattern with what differs from its defaults."""
    given = (
        f"{field.name}={_short(value) if isinstance(value, Pattern) else value}"
        for field in fields(pattern)
        if field.init and field.repr and (value := getattr(pattern, field.name)) != field.default
    )
    return f"{type(pattern).__name__}({', '.join(given)})"


def _flops(count: int) -> str:
    power = min(len(str(count)) - 1, 14) // 3
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
