"""Draws the record of ``fidelity.py``: accuracy over density, without training and after a short fine-tuning.

python benchmarks/plot_fidelity.py    # results/fidelity-<device>.json -> results/fidelity-<device>.svg
"""

from __future__ import annotations

from pathlib import Path

from block_selectors import CALIBRATED, DYNAMIC, LEARNED, STRIPS, TILES
from records import RESULTS, Row, caption, read

_STYLES = {  # colour, width, line
    TILES: ("#8fb0d0", 1.2, "-"),
    STRIPS: ("#b8b0a8", 1.2, "--"),
    CALIBRATED: ("#c07830", 2.2, "-"),
    DYNAMIC: ("#2f7f4f", 2.2, "-"),
    LEARNED: ("#7050a0", 2.2, "-"),
}
_TITLES = {TILES: "static, tiles", STRIPS: "raster strips"}
_MARKERS = "osD^v"


def main() -> None:
    for path in sorted(RESULTS.glob("fidelity-*.json")):
        meta, rows = read(path)
        draw(rows, caption(meta), path.with_suffix(".svg"))
        print(f"drawn {path.with_suffix('.svg')}")


def draw(rows: list[Row], note: str, path: Path) -> None:
    """A line for each selector; stars for what was fine-tuned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] in _STYLES and not row["tuned"]:
            curves.setdefault((row["kind"], row["selector"]), []).append(row)
    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    named: set[str] = set()
    for number, ((kind, selector), points) in enumerate(curves.items()):
        colour, width, line = _STYLES[kind]
        title = _TITLES.get(kind, selector)
        points = sorted(points, key=lambda row: row["density"])
        axes.plot(
            [row["density"] for row in points],
            [row["accuracy"] for row in points],
            line,
            color=colour,
            linewidth=width,
            marker="." if kind in _TITLES else _MARKERS[number % len(_MARKERS)],
            markersize=4,
            label=None if title in named else title,
        )
        named.add(title)
    for row in rows:
        if row["tuned"] and row["kind"] in _STYLES:
            label = None if "fine-tuned" in named else "fine-tuned"
            axes.plot(row["density"], row["accuracy"], "*", color=_STYLES[row["kind"]][0], markersize=10, label=label)
            named.add("fine-tuned")
    axes.axhline(rows[0]["dense_accuracy"], color="#404040", linewidth=0.8, linestyle=":", label="nothing skipped")
    axes.set(xlabel="fraction of attention blocks computed", ylabel="digits judged rightly, % (chance: 50)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.supxlabel(note, x=0.99, ha="right", fontsize=6, color="#707070")  # the layout makes room for it
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
