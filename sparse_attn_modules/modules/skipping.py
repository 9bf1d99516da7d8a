"""Where skipping blocks cannot pay: windows and grids of a few tiles."""

from __future__ import annotations

from ..token_grid import TokenGrid

MIN_TILES = 8


def why_skipping_cannot_pay(query_grid: TokenGrid, key_grid: TokenGrid | None = None) -> str | None:
    """The reason why attention on a geometry had better stay dense, or None if skipping blocks can pay.

    With fewer than ``MIN_TILES`` key tiles a row keeps one or two tiles at the usual densities: little is saved, much
    of the image is lost, and attention on so few tokens is a small part of the model's time in the first place. The
    14 × 14 windows of the Segment Anything encoder are 2 tiles.
    """
    grid = query_grid if key_grid is None else key_grid
    if grid.num_tiles >= MIN_TILES:
        return None
    size = f"{grid.height}×{grid.width} patches are {grid.num_tiles} tile{'s' if grid.num_tiles > 1 else ''} of"
    return f"{size} {grid.tile[0]}×{grid.tile[1]}, and skipping pays from {MIN_TILES} on"
