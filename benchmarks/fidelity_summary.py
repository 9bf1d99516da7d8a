"""What the main README shows of fidelity: the best of each kind of selector at two densities, and after fine-tuning."""

from __future__ import annotations

from records import Column, Row

COLUMNS = [
    Column("blocks chosen by", "selector"),
    Column("fine-tuned", "tuned"),
    Column("density", "density", ".3f"),
    Column("mass kept", "mass", ".3f"),
    Column("agreement, %", "agreement", ".2f"),
    Column("accuracy, %", "accuracy", ".2f"),
    Column("lost", lambda row: row["dense_accuracy"] - row["accuracy"], ".2f"),
]
_DENSITIES = (0.25, 0.125)
_BEST_OF = ("tiles", "strips")  # kinds with many selectors, all static


def summarize(rows: list[Row]) -> list[Row]:
    """Dense attention, then for each density the best pattern of each static kind and every other selector."""
    chosen = [row for row in rows if row["kind"] == "dense"]
    for tuned in (False, True):
        for density in _DENSITIES:
            here = [row for row in rows if row["target"] == density and row["tuned"] == tuned]
            here = [row for row in here if row["kind"] != "dense"]
            for kind in _BEST_OF:
                of_kind = [row for row in here if row["kind"] == kind]
                for row in sorted(of_kind, key=lambda row: row["accuracy"], reverse=True)[1:]:
                    here.remove(row)
            chosen += sorted(here, key=lambda row: row["accuracy"])
    return chosen
