"""The short table of the ``attention`` record: ours beside the fastest of the others, case by case."""

from __future__ import annotations

from records import Column, Row

_CASE = ("B", "H", "N", "D", "pattern", "density", "relative_position")
_NAMES = {
    "fa4": "FlashAttention-4",
    "cudnn_bsa": "cuDNN block-sparse",
    "cudnn": "cuDNN",
    "fa2": "FlashAttention-2",
    "flex": "FlexAttention",
    "sdpa_bias": "SDPA, bias written out",
}
_PATTERNS = ("dense", "random")


def summarize(rows: list[Row]) -> list[Row]:
    """A row for each dense or random case that others ran too: our time, the fastest of theirs, and the ratio."""
    cases: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row["pattern"] in _PATTERNS:
            cases.setdefault(tuple(row[key] for key in _CASE), []).append(row)
    summary = []
    for case, members in cases.items():
        ours = next((row for row in members if row["implementation"] == "ours"), None)
        others = [row for row in members if row["implementation"] in _NAMES]
        if ours is None or not others:
            continue
        fastest = min(others, key=lambda row: row["fwd_ms"])
        summary.append(
            {
                **dict(zip(_CASE, case)),
                "fwd_ms": ours["fwd_ms"],
                "fwd_tflops": ours["fwd_tflops"],
                "fastest_other": _NAMES[fastest["implementation"]],
                "other_ms": fastest["fwd_ms"],
                "speedup": fastest["fwd_ms"] / ours["fwd_ms"],
            }
        )
    return summary


COLUMNS = [
    Column("batch × heads × tokens × head_dim", lambda row: f"{row['B']} × {row['H']} × {row['N']} × {row['D']}"),
    Column("relative position", "relative_position"),
    Column("density", "density", ".2f"),
    Column("ours, ms", "fwd_ms", ".3f"),
    Column("TFLOP/s", "fwd_tflops", ".0f"),
    Column("fastest other", "fastest_other"),
    Column("its ms", "other_ms", ".3f"),
    Column("speed-up", lambda row: f"{row['speedup']:.2f}×"),
]
