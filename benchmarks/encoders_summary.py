"""The short table of ``encoders`` records: ours beside the fastest of the others, in the fastest mode of each case."""

from __future__ import annotations

from encoders import TITLES, naming_dtypes
from records import Column, Row

_CASE = ("model", "title", "image_size", "batch")
_MODES = ("graphs", "compiled", "eager")  # the fastest first
_OTHERS = ("sdpa_bias", "cudnn")
_SPARSE = 0.25


def summarize(rows: list[Row]) -> list[Row]:
    """A row for each encoder and size that was measured as shipped and with ours."""
    summary = []
    for case, members in in_fastest_mode(rows).items():
        found = {(row["implementation"], row["density"]): row for row in members}
        shipped, exact = found.get(("stock", 1.0)), found.get(("ours", 1.0))
        if shipped is None or exact is None:
            continue
        others = [found[name, 1.0] for name in _OTHERS if (name, 1.0) in found]
        fastest = min(others, key=lambda row: row["ms"]) if others else None
        summary.append(
            {
                **dict(zip(_CASE, case)),
                "mode": exact["mode"],
                "shipped": shipped,
                "other": fastest,
                "exact": exact,
                "sparse": found.get(("ours", _SPARSE)),
                "floor": found.get(("no_attention", 1.0)),
            }
        )
    return summary


def in_fastest_mode(rows: list[Row]) -> dict[tuple[object, ...], list[Row]]:
    """The rows of each case in the fastest mode that holds the model as shipped and with ours, if any does.

    Rows without a time are left out.
    """
    cases: dict[tuple[object, ...], dict[str, list[Row]]] = {}
    for row in naming_dtypes(rows):
        if row["ms"] is not None:
            modes = cases.setdefault(tuple(row[key] for key in _CASE), {})
            modes.setdefault(row["mode"], []).append(row)
    return {case: modes[max(modes, key=lambda mode: _rank(mode, modes[mode]))] for case, modes in cases.items()}


def _rank(mode: str, rows: list[Row]) -> tuple[bool, bool, int]:
    """Greater for modes that show more of a case, then for faster ones; modes that are not known come last."""
    found = {(row["implementation"], row["density"]) for row in rows}
    holds_both = {"stock", "ours"} <= {name for name, _ in found}
    speed = -_MODES.index(mode) if mode in _MODES else -len(_MODES)
    return holds_both, holds_both and ("ours", 1.0) in found, speed


def _milliseconds(row: Row, which: str) -> str | None:
    if row[which] is None:
        return None
    milliseconds = row[which]["ms"]
    return f"{milliseconds:.{0 if milliseconds >= 1000 else 1 if milliseconds >= 10 else 2}f}"


def _times(row: Row, which: str) -> str | None:
    """How many times faster than as shipped."""
    return None if row[which] is None else f"{row['shipped']['ms'] / row[which]['ms']:.2f}×"


COLUMNS = [
    Column("encoder", "title"),
    Column("pixels", lambda row: f"{row['image_size']}²"),
    Column("batch", "batch"),
    Column("mode", "mode"),
    Column("as shipped, ms", lambda row: _milliseconds(row, "shipped")),
    Column("fastest other", lambda row: row["other"] and TITLES[row["other"]["implementation"]]),
    Column("its ms", lambda row: _milliseconds(row, "other")),
    Column("ours, exact", lambda row: _milliseconds(row, "exact")),
    Column("speed-up", lambda row: _times(row, "exact")),
    Column(f"ours, density {_SPARSE}", lambda row: _milliseconds(row, "sparse")),
    Column("speed-up", lambda row: _times(row, "sparse")),
    Column("no attention", lambda row: _milliseconds(row, "floor")),
    Column("GiB as shipped", lambda row: row["shipped"]["peak_gib"], ".2f"),
    Column("GiB ours", lambda row: row["exact"]["peak_gib"], ".2f"),
]
