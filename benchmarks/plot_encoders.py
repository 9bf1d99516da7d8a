"""Draws the record of ``encoders.py``: images per second of each encoder, by how attention is computed.

python benchmarks/plot_encoders.py    # results/encoders-<device>.json -> results/encoders-<device>.svg
"""

from __future__ import annotations

from pathlib import Path

from encoders import title
from records import RESULTS, Row, caption, read

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
    """A group of bars for each case and mode, over the model as shipped in the same mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        case = cases.setdefault(f"{row['title']}\n{row['image_size']}², batch {row['batch']}\n{row['mode']}", {})
        if title(row) in COLOURS:
            case[title(row)] = row["images_per_s"]
    cases = {name: case for name, case in cases.items() if "as shipped" in case}
    figure, axes = pyplot.subplots(figsize=(2.4 + 1.7 * len(cases), 4.2), layout="constrained")
    width = 0.85 / len(COLOURS)
    for place, (name, colour) in enumerate(COLOURS.items()):
        known = [
            (i, case[name] / case["as shipped"])
            for i, case in enumerate(cases.values())
            if {name, "as shipped"} <= case.keys()
        ]
        if known:
            where = [i + (place - (len(COLOURS) - 1) / 2) * width for i, _ in known]
            bars = axes.bar(where, [speedup for _, speedup in known], width, label=name, color=colour)
            axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    axes.set_xticks(range(len(cases)), list(cases), fontsize=8)
    axes.set_ylabel("images per second, over as shipped")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=min(3, 1 + len(cases)), fontsize=7, frameon=False)
    figure.supxlabel(note, x=0.99, ha="right", fontsize=6, color="#707070")  # the layout makes room for it
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
