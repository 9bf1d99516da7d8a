"""Writes the tables of README.md and benchmarks/README.md from the records in benchmarks/results.

    python benchmarks/make_tables.py            # rewrites the tables
    python benchmarks/make_tables.py --check    # only says which files are stale, and exits with 1 if any is

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, where NAME is that of a table below, or of the
script that wrote the record, ``results/NAME-<device>.json``. There is one table for each device that has a record.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import attention
import attention_backward
import attention_summary
import cpu_attention
import encoders
import encoders_summary
import fidelity_summary
import selection
import training
from records import RESULTS, Column, Row, caption, read, table

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")


@dataclass(frozen=True)
class Table:
    """A table that is made of a script's records: which columns, of which rows."""

    script: str
    columns: Sequence[Column] | None = None
    select: Callable[[list[Row]], list[Row]] = list


# A name that is not here is that of a script, and becomes a table of all the keys in its records.
TABLES = {
    "attention": Table("attention", attention.COLUMNS),
    "attention_backward": Table("attention_backward", attention_backward.COLUMNS),
    "attention_summary": Table("attention", attention_summary.COLUMNS, attention_summary.summarize),
    "cpu_attention": Table("cpu_attention", cpu_attention.COLUMNS),
    "encoders": Table("encoders", encoders.COLUMNS, encoders.naming_dtypes),
    "encoders_summary": Table("encoders", encoders_summary.COLUMNS, encoders_summary.summarize),
    "fidelity": Table("fidelity", fidelity_summary.COLUMNS),
    "fidelity_summary": Table("fidelity", fidelity_summary.COLUMNS, fidelity_summary.summarize),
    "selection": Table("selection", selection.COLUMNS),
    "training": Table("training", training.STEP_COLUMNS, training.steps),
    "training_attention": Table("training", training.ATTENTION_COLUMNS, training.attention),
}

_START = re.compile(r"<!-- table: (?P<name>\S+) -->\n")
_END = "<!-- end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is stale")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("documents", type=Path, nargs="*", default=DOCUMENTS, help="default: both README files")
    options = parser.parse_args(arguments)
    stale = []
    for path in options.documents:
        text = path.read_text("utf-8")
        filled = fill(text, options.results)
        if filled == text:
            continue
        stale.append(path)
        if not options.check:
            path.write_text(filled, "utf-8")
    for path in stale:
        print(f"{path}: {'stale, run python benchmarks/make_tables.py' if options.check else 'tables written'}")
    return 1 if options.check and stale else 0


def fill(text: str, results: Path = RESULTS) -> str:
    """The text with every table between markers made anew.

    Raises:
        ValueError: if a marker that begins a table is not followed by one that ends it.
    """
    parts, position = [], 0
    for start in _START.finditer(text):
        end = text.find(_END, start.end())
        following = _START.search(text, start.end())
        if end < 0 or (following is not None and following.start() < end):
            raise ValueError(f"make_tables: table {start['name']} must be followed by {_END}, got none")
        parts += [text[position : start.end()], tables(start["name"], results), "\n"]
        position = end
    return "".join([*parts, text[position:]])


def tables(name: str, results: Path = RESULTS) -> str:
    """The tables of a script, one for each device that has a record, each with what it was measured on."""
    made_of = TABLES.get(name, Table(name))
    paths = sorted(results.glob(f"{made_of.script}-*.json"))
    if not paths:
        return "*Not measured yet.*"
    sections = []
    for path in paths:
        meta, rows = read(path)
        sections.append(f"{table(made_of.select(rows), made_of.columns)}\n\n*{caption(meta)}*")
    return "\n\n".join(sections)


if __name__ == "__main__":
    sys.exit(main())
