"""Pictures of masks: which blocks, which patches of a photograph, how dense each layer, what is kept of attention.

Every function returns a ``matplotlib.figure.Figure`` that belongs to no window and changes no global state; save it
with ``figure.savefig(path)``. Colours are told apart by colour-blind readers too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .block_mask import BlockMask
from .token_grid import TokenGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import LayoutEngine

_BLUE, _VERMILION, _PALE, _GREY = "#0072B2", "#D55E00", "#E9EBEE", "#8A8F98"  # the first two of Okabe and Ito
_MAX_PANELS = 16


def plot_block_mask(mask: BlockMask, *, heads: Sequence[int] | None = None, batch: int = 0) -> Figure:
    """The active blocks of each head: a square per pair of a query block (row) and a key block (column).

    Args:
        mask: the mask.
        heads: the heads to draw; by default all, or the first 16. A mask that is the same for all heads is one panel.
        batch: batch entry, for a mask that has one per entry.

    Raises:
        ValueError: if a head or batch entry does not exist.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    batches, num_heads = mask.blocks.shape[:2]
    heads = range(min(num_heads, _MAX_PANELS)) if heads is None else list(heads)
    _check_index("plot_block_mask", "batch", batch, batches)
    for head in heads:
        _check_index("plot_block_mask", "heads", head, num_heads)
    if not heads:
        raise ValueError("plot_block_mask: heads must not be empty")
    blocks = mask.blocks[batch].cpu()
    columns = min(len(heads), 4)
    rows = -(-len(heads) // columns)
    size = 4.6 if len(heads) == 1 else 2.7
    figure = Figure(figsize=(size * columns + 0.6, size * rows + 1.0), layout=_layout())
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(heads) :]:
        ax.remove()
    for panel, (ax, head) in enumerate(zip(axes.flat, heads)):
        ax.imshow(blocks[head].numpy(), cmap=ListedColormap([_PALE, _BLUE]), vmin=0, vmax=1, interpolation="nearest")
        name = "all heads" if num_heads == 1 else f"head {head}"
        ax.set_title(f"{name} · density {blocks[head].double().mean():.2f}", fontsize=10)
        _clean(ax)
        ax.locator_params(integer=True, nbins=5)
        for grid, line in ((mask.key_grid, ax.axvline), (mask.query_grid, ax.axhline)):
            for edge in _extra_edges(grid):
                line(edge - 0.5, color=_VERMILION, linewidth=1.2)
        if panel % columns == 0:
            ax.set_ylabel("query block")
        if panel + columns >= len(heads):
            ax.set_xlabel("key block")
    title = f"{mask.query_grid}"
    if mask.key_grid != mask.query_grid:
        title += f"  →  keys: {mask.key_grid}"
    if _extra_edges(mask.query_grid) or _extra_edges(mask.key_grid):
        title += "\nbeyond the orange lines: blocks of extra tokens"
    figure.suptitle(title, fontsize=11)
    return figure


def plot_attended_patches(image: Any, mask: BlockMask, query: tuple[int, int], *, batch: int = 0) -> Figure:
    """The patches that one query attends to, over the photograph, shaded by how many heads attend.

    Args:
        image: the photograph that the patches cover: array or tensor ``[height, width]`` or ``[height, width, 3]`` of
            any resolution, uint8 or floats in [0, 1].
        mask: the mask.
        query: (row, column) of the query's patch.
        batch: batch entry, for a mask that has one per entry.

    Raises:
        ValueError: if the image is not as described, or the patch or batch entry does not exist.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    op = "plot_attended_patches"
    photo = _as_rgb(op, image)
    _check_index(op, "batch", batch, mask.blocks.shape[0])
    for name, position, size in zip(("row", "column"), query, (mask.query_grid.height, mask.query_grid.width)):
        _check_index(op, f"query {name}", position, size)
    counts = _attending_heads(mask, query, batch)  # [height, width]
    num_heads = mask.blocks.shape[1]

    grid = mask.key_grid
    extent = (0, grid.width, grid.height, 0)
    height = min(max(4.4 * photo.shape[0] / photo.shape[1], 2.5), 8.0)
    figure = Figure(figsize=(10.4, height + 0.9), layout=_layout())
    left, right = figure.subplots(1, 2)
    left.imshow(photo.numpy(), extent=extent, aspect="auto", interpolation="antialiased")
    left.set_title("query", fontsize=11)
    grey = (photo @ torch.tensor([0.299, 0.587, 0.114])).numpy()
    right.imshow(grey, extent=extent, aspect="auto", cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
    # On a picture without colours of its own: skipped patches in shadow, the rest the lighter the more heads attend.
    colours = colormaps["viridis"].resampled(max(num_heads, 2))
    overlay = torch.zeros(grid.height, grid.width, 4)
    for count in counts.unique().tolist():
        shade = (0.04, 0.04, 0.06, 0.78) if count == 0 else (*colours((count - 0.5) / num_heads)[:3], 0.5)
        overlay[counts == count] = torch.tensor(shade, dtype=torch.float32)
    right.imshow(overlay.numpy(), extent=extent, aspect="auto", interpolation="nearest")
    mean, some = float(counts.double().mean()) / num_heads, float((counts > 0).double().mean())
    seen = f"{mean:.0%} per head, {some:.0%} by any" if num_heads > 1 else f"{mean:.0%} of the image"
    right.set_title(f"attended patches: {seen}", fontsize=11)
    for ax in (left, right):
        row, column = _on_key_grid(query, mask)
        for colour, width in (("white", 3.5), (_VERMILION, 1.8)):
            ax.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=colour, linewidth=width))
        ax.set_xlim(0, grid.width)
        ax.set_ylim(grid.height, 0)
        ax.set_box_aspect(photo.shape[0] / photo.shape[1])
        _clean(ax)
        ax.set_xticks([])
        ax.set_yticks([])
    _draw_tiles(right, grid)
    if num_heads > 1:
        norm = BoundaryNorm((torch.arange(num_heads + 1) + 0.5).tolist(), num_heads)
        step = -(-num_heads // 12)
        bar = figure.colorbar(
            ScalarMappable(norm, colours), ax=right, shrink=0.9, pad=0.02, ticks=range(1, num_heads + 1, step)
        )
        bar.set_label(f"heads that attend, of {num_heads}")
        bar.ax.minorticks_off()
    figure.suptitle(f"patch at row {query[0]}, column {query[1]} of {mask.query_grid}", fontsize=11)
    return figure


def plot_density(layers: Iterable[tuple[str, float | None]]) -> Figure:
    """A bar per layer: the fraction of block pairs that it computes.

    Args:
        layers: (name, density) of each layer in order; None for a density that is not known yet.

    Raises:
        ValueError: if there is no layer, or a density does not lie in [0, 1].
    """
    from matplotlib.figure import Figure

    rows = list(layers)
    if not rows:
        raise ValueError("plot_density: layers must not be empty")
    for name, density in rows:
        if density is not None and not 0 <= density <= 1:
            raise ValueError(f"plot_density: density must lie in [0, 1], got {density} for {name}")
    known = [density for _, density in rows if density is not None]
    figure = Figure(figsize=(7.5, 0.28 * len(rows) + 1.5), layout=_layout())
    ax = figure.subplots()
    colours = [_GREY if density is None or density > 0.9995 else _BLUE for _, density in rows]
    ax.barh(range(len(rows)), [density or 0.0 for _, density in rows], color=colours, height=0.72)
    for position, (_, density) in enumerate(rows):
        label = "not known yet" if density is None else "dense" if density > 0.9995 else f"{density:.3g}"
        ax.text((density or 0.0) + 0.012, position, label, va="center", fontsize=8.5, color="#333333")
    if known:
        mean = sum(known) / len(known)
        ax.axvline(mean, color=_VERMILION, linewidth=1.3, linestyle="--", zorder=0)
        ax.set_title(f"block pairs computed per layer · mean density {mean:.3g}", fontsize=11)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=9)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, 1.12)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.set_xlabel("density")
    _clean(ax)
    return figure


def plot_head_density(layers: Iterable[tuple[str, Sequence[float] | None]]) -> Figure:
    """A square per layer (row) and head (column), the darker the more block pairs it computes.

    Args:
        layers: (name, density of each head) of each layer in order; None for a layer that is dense.

    Raises:
        ValueError: if there is no layer, or a density does not lie in [0, 1].
    """
    from matplotlib.figure import Figure

    rows = list(layers)
    if not rows:
        raise ValueError("plot_head_density: layers must not be empty")
    heads = max([1, *(len(densities) for _, densities in rows if densities is not None)])
    table = torch.full((len(rows), heads), torch.nan)
    for row, (name, densities) in enumerate(rows):
        for head, density in enumerate(densities or ()):
            if not 0 <= density <= 1:
                raise ValueError(f"plot_head_density: density must lie in [0, 1], got {density} for {name}")
            table[row, head] = density
    figure = Figure(figsize=(0.46 * heads + 4.2, 0.34 * len(rows) + 1.6), layout=_layout())
    ax = figure.subplots()
    ax.set_facecolor(_PALE)
    shown = ax.imshow(table.numpy(), cmap="viridis_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for row, (_, densities) in enumerate(rows):
        if densities is None:
            ax.text((heads - 1) / 2, row, "dense", ha="center", va="center", fontsize=8, color=_GREY)
        for head, density in enumerate(densities or ()):
            colour = "white" if density > 0.55 else "#222222"
            ax.text(head, row, f"{density:.2f}".removeprefix("0"), ha="center", va="center", fontsize=7.5, color=colour)
    ax.set_xticks(range(heads))
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.set_xlabel("head")
    known = table[~table.isnan()]
    mean = f" · mean {known.mean():.3g}" if known.numel() else ""
    ax.set_title(f"block pairs computed per head{mean}", fontsize=11)
    figure.colorbar(shown, ax=ax, shrink=0.9, pad=0.02).set_label("density")
    _clean(ax)
    return figure


def plot_trade(points: Iterable[tuple[float, float, float]], *, chosen: float | None = None) -> Figure:
    """Attention mass kept and likeness of the output, over density.

    Args:
        points: (density, mass kept, cosine between the output and that of dense attention), in any order.
        chosen: a density to mark.

    Raises:
        ValueError: if there is no point.
    """
    from matplotlib.figure import Figure

    ordered = sorted(points)
    if not ordered:
        raise ValueError("plot_trade: points must not be empty")
    densities = [density for density, _, _ in ordered]
    figure = Figure(figsize=(9.0, 3.6), layout=_layout())
    for ax, column, label in zip(
        figure.subplots(1, 2), (1, 2), ("attention mass kept", "cosine of the output to dense")
    ):
        values = [point[column] for point in ordered]
        ax.plot([*densities, 1.0], [*values, 1.0], color=_BLUE, marker="o", markersize=5, linewidth=1.8)
        for density, value in zip(densities, values):
            ax.annotate(f"{value:.3f}", (density, value), (6, -12), textcoords="offset points", fontsize=8)
        if chosen is not None:
            ax.axvline(chosen, color=_VERMILION, linewidth=1.2, linestyle="--", zorder=0)
        ax.set_xlabel("density")
        ax.set_title(label, fontsize=11)
        ax.set_xlim(0, 1.03)
        ax.margins(y=0.14)
        ax.grid(color=_PALE)
        _clean(ax)
    return figure


def plot_query_attention(
    image: Any, weights: Tensor, mask: BlockMask, query: tuple[int, int], *, title: str = ""
) -> Figure:
    """Where one query looks, over the photograph: its dense attention, and what a mask leaves of it.

    Args:
        image: the photograph, as for :func:`plot_attended_patches`.
        weights: dense attention weights of the query, ``[heads, keys]``; the mean over heads is drawn.
        mask: the mask, for one head or as many.
        query: (row, column) of the query's patch.
        title: what layer it is, say.

    Raises:
        ValueError: if an argument is not as described, or does not fit the mask.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    op, grid = "plot_query_attention", mask.key_grid
    photo = _as_rgb(op, image)
    heads = mask.blocks.shape[1]
    if weights.dim() != 2 or weights.shape[1] != grid.num_tokens or heads not in (1, weights.shape[0]):
        raise ValueError(
            f"{op}: weights must have shape [{heads if heads > 1 else 'heads'}, {grid.num_tokens}] for {grid}, "
            f"got {list(weights.shape)}"
        )
    for name, position, size in zip(("row", "column"), query, (mask.query_grid.height, mask.query_grid.width)):
        _check_index(op, f"query {name}", position, size)
    token = mask.query_grid.prefix + query[0] * mask.query_grid.width + query[1]
    row = mask.blocks[0, :, int(mask.query_grid.block_of_token()[token])].cpu()  # [heads | 1, key blocks]
    is_kept = row[:, grid.block_of_token()].expand(weights.shape)
    dense = weights.detach().float().cpu()
    kept = dense * is_kept
    share = float(kept.sum() / dense.sum())
    kept = kept / kept.sum(-1, keepdim=True).clamp(min=1e-30)

    extent = (0, grid.width, grid.height, 0)
    height = min(max(3.6 * photo.shape[0] / photo.shape[1], 2.2), 7.0)
    figure = Figure(figsize=(12.0, height + 1.0), layout=_layout())
    left, middle, right = figure.subplots(1, 3)
    left.imshow(photo.numpy(), extent=extent, aspect="auto", interpolation="antialiased")
    left.set_title("query", fontsize=11)
    grey = (photo @ torch.tensor([0.299, 0.587, 0.114])).numpy()
    patches = slice(grid.prefix, grid.prefix + grid.num_patches)
    maps = [part.mean(0)[patches].view(grid.height, grid.width) for part in (dense, kept)]
    # Weights differ by orders of magnitude: the root lets the weak ones be seen.
    top = max(float(part.max()) for part in maps) ** 0.5
    for ax, part, label in zip((middle, right), maps, ("dense", f"kept: {share:.1%} of the weight")):
        ax.imshow(grey, extent=extent, aspect="auto", cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
        ax.imshow(
            part.sqrt().numpy(), extent=extent, aspect="auto", cmap="inferno", vmin=0, vmax=top, alpha=0.72,
            interpolation="nearest",
        )  # fmt: skip
        ax.set_title(label, fontsize=11)
        _draw_tiles(ax, grid)
    for ax in (left, middle, right):
        y, x = _on_key_grid(query, mask)
        for colour, width in (("white", 3.0), (_VERMILION, 1.6)):
            ax.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=colour, linewidth=width))
        ax.set_xlim(0, grid.width)
        ax.set_ylim(grid.height, 0)
        ax.set_box_aspect(photo.shape[0] / photo.shape[1])
        _clean(ax)
        ax.set_xticks([])
        ax.set_yticks([])
    figure.suptitle(f"{title} · " * bool(title) + f"patch at row {query[0]}, column {query[1]}", fontsize=11)
    return figure


def _attending_heads(mask: BlockMask, query: tuple[int, int], batch: int) -> Tensor:
    """Number of heads in which the query attends to each patch: int64 ``[height, width]``."""
    grid = mask.key_grid
    token = mask.query_grid.prefix + query[0] * mask.query_grid.width + query[1]
    query_block = int(mask.query_grid.block_of_token()[token])
    key_blocks = mask.blocks[batch, :, query_block].cpu()  # [heads, key blocks]
    of_patch = grid.block_of_token()[grid.prefix : grid.prefix + grid.num_patches]
    return key_blocks[:, of_patch].sum(0).view(grid.height, grid.width)


def _on_key_grid(query: tuple[int, int], mask: BlockMask) -> tuple[float, float]:
    """Where the query's patch lies on a key grid that covers the same image."""
    queries, keys = mask.query_grid, mask.key_grid
    return query[0] * keys.height / queries.height, query[1] * keys.width / queries.width


def _as_rgb(op: str, image: Any) -> Tensor:
    """float32 ``[height, width, 3]`` in [0, 1]."""
    import numpy as np

    # A copy also takes what torch cannot read in place: flipped arrays, PIL images.
    photo = image.detach().cpu() if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if photo.dim() == 2:
        photo = photo[..., None].expand(-1, -1, 3)
    if photo.dim() != 3 or photo.shape[-1] != 3:
        raise ValueError(f"{op}: image must have shape [height, width] or [height, width, 3], got {list(photo.shape)}")
    if photo.dtype == torch.uint8:
        return photo.float() / 255
    photo = photo.float()
    if not bool(((photo >= 0) & (photo <= 1)).all()):
        raise ValueError(f"{op}: image must be uint8 or lie in [0, 1], got values from {photo.min()} to {photo.max()}")
    return photo


def _extra_edges(grid: TokenGrid) -> list[int]:
    """The block indices at which blocks of extra tokens end or begin."""
    edges = [grid.tile_blocks.start] if grid.num_prefix_blocks else []
    return edges + ([grid.tile_blocks.stop] if grid.num_suffix_blocks else [])


def _draw_tiles(ax: Axes, grid: TokenGrid) -> None:
    for row in range(grid.tile[0], grid.height, grid.tile[0]):
        ax.axhline(row, color="white", linewidth=0.5, alpha=0.45)
    for column in range(grid.tile[1], grid.width, grid.tile[1]):
        ax.axvline(column, color="white", linewidth=0.5, alpha=0.45)


def _layout() -> LayoutEngine:
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)


def _clean(ax: Axes) -> None:
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize=8.5)


def _check_index(op: str, name: str, index: int, size: int) -> None:
    if not 0 <= index < size:
        raise ValueError(f"{op}: {name} must lie in [0, {size}), got {index}")
