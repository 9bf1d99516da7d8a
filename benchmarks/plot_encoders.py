"""Draws the record of ``encoders.py``: images per second of each encoder, by how attention is computed.

python benchmarks/plot_encoders.py    # results/encoders-<device>.json -> results/encoders-<device>.svg
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from encoder_models import ENCODERS
from encoders import title
from encoders_summary import in_fastest_mode
from records import RESULTS, Row, caption, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "as shipped": "#b0b0b0",
    "as shipped, cuDNN attention": "#909090",
    "SDPA, bias written out": "#6f8fb0",
    "ours, exact": "#2f7f4f",
    "ours, density 0.25": "#6fbf7f",
    "no attention": "#e8e0c8",
}


def main() -> None:
    for path in sorted(RESULTS.glob("encoders-*.json")):
        meta, rows = read(path)
        draw(rows, caption(meta), path.with_suffix(".svg"))
        print(f"drawn {path.with_suffix('.svg')}")


def draw(rows: list[Row], note: str, path: Path) -> None:
    """A group of bars for each case, over the model as shipped, in the fastest mode that the case was measured in.

    Raises:
        ValueError: if no case was measured as shipped.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [
        {title(row): row for row in members}
        for members in in_fastest_mode(rows).values()
        if any(title(row) == "as shipped" for row in members)
    ]
    if not cases:
        raise ValueError(f"plot_encoders: record must have rows as shipped with times, got none in {len(rows)} rows")
    families = [[case for case in cases if _is_sam(case) is is_sam] for is_sam in (True, False)]
    families = [family for family in families if family]
    figure, panels = pyplot.subplots(
        len(families), figsize=(2.4 + 1.3 * max(map(len, families)), 0.6 + 3.2 * len(families)), squeeze=False
    )
    figure.set_layout_engine("constrained")
    for axes, family in zip(panels[:, 0], families):
        _draw_family(axes, family)
    drawn = {name: bars for axes in panels[:, 0] for bars, name in zip(*axes.get_legend_handles_labels())}
    in_order = [name for name in COLOURS if name in drawn]
    figure.legend(
        [drawn[name] for name in in_order], in_order, loc="outside upper left", ncols=3, fontsize=7, frameon=False
    )
    figure.supylabel("images per second, over as shipped", fontsize=8)
    figure.supxlabel(note, x=0.99, ha="right", fontsize=6, color="#707070")  # the layout makes room for it
    figure.savefig(path)
    pyplot.close(figure)


def _is_sam(case: dict[str, Row]) -> bool:
    return ENCODERS[case["as shipped"]["model"]].is_sam


def _draw_family(axes: Axes, cases: list[dict[str, Row]]) -> None:
    names = [name for name in COLOURS if any(name in case for case in cases)]
    width = 0.85 / len(names)
    for place, name in enumerate(names):
        known = [(i, case["as shipped"]["ms"] / case[name]["ms"]) for i, case in enumerate(cases) if name in case]
        where = [i + (place - (len(names) - 1) / 2) * width for i, _ in known]
        bars = axes.bar(where, [speedup for _, speedup in known], width, label=name, color=COLOURS[name])
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    labels = [
        f"{row['title']}\n{row['image_size']}², batch {row['batch']}\n{row['mode']}"
        for row in (case["as shipped"] for case in cases)
    ]
    axes.set_xticks(range(len(cases)), labels, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
