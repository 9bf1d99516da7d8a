"""Records of measurements: what they were made on, where they lie, how they become tables.

A record is ``{"meta": {...}, "rows": [{...}, ...]}`` in ``results/<script>-<device>.json``. Every number in a table of
this repository comes from such a file.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparse_attn_modules

RESULTS = Path(__file__).parent / "results"
_REQUIRED_META = ("device", "torch", "cuda", "git", "date")

Row = dict[str, Any]


def environment(device: torch.device | str = "cpu", **more: Any) -> dict[str, Any]:
    """What a measurement is made on: device name, versions, commit, date, and whatever else is given."""
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if is_cuda else None,
        "git": commit_of(Path(sparse_attn_modules.__file__).parent),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **more,
    }


def result_path(script: str, device: torch.device | str = "cpu", folder: Path = RESULTS) -> Path:
    """``results/<script>-<device>.json``; the device is ``cpu``, or the GPU's name in short: ``h200``."""
    device = torch.device(device)
    label = device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower().removeprefix("nvidia")
        label = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return folder / f"{script}-{label}.json"


def write(path: Path, meta: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes a record.

    Raises:
        ValueError: if there are no rows, or ``meta`` lacks what a reader must know.
    """
    missing = [key for key in _REQUIRED_META if key not in meta]
    if missing:
        raise ValueError(f"write: meta must hold {', '.join(_REQUIRED_META)}, got none of {', '.join(missing)}")
    if not rows:
        raise ValueError("write: rows must not be empty")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": meta, "rows": list(rows)}, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The meta data and rows of a record."""
    record = json.loads(path.read_text("utf-8"))
    return record["meta"], record["rows"]


def merge(
    path: Path, meta: dict[str, Any], rows: Sequence[Row], keys: Sequence[str]
) -> tuple[dict[str, Any], list[Row]]:
    """A record that adds rows to those of a file, if that was made on the same device, versions and commit.

    Args:
        path: the file; need not exist.
        meta, rows: what was measured now.
        keys: what tells rows apart. A row of the file with the same values of these is replaced.
    """
    if not path.exists():
        return meta, list(rows)
    before, kept = read(path)
    if any(before.get(key) != meta.get(key) for key in _REQUIRED_META if key != "date"):
        return meta, list(rows)
    new = {tuple(row.get(key) for key in keys) for row in rows}
    return meta, [*(row for row in kept if tuple(row.get(key) for key in keys) not in new), *rows]


def caption(meta: dict[str, Any]) -> str:
    """What a reader must know of a measurement, in one line."""
    parts = [meta["device"], f"torch {meta['torch']}"]
    if meta["cuda"]:
        parts.append(f"CUDA {meta['cuda']}")
    elif "threads" in meta:
        parts.append(f"{meta['threads']} threads")
    if meta["git"]:
        parts.append(f"commit {meta['git'][:10]}{'-dirty' if meta['git'].endswith('-dirty') else ''}")
    return ", ".join([*parts, meta["date"][:10]])


@dataclass(frozen=True)
class Column:
    """A column of a table: its header, and what it shows of a row.

    Args:
        header: text of the header.
        value: key of the row, or a function of the row. A key that a row lacks and None show as an empty cell.
        form: format specification of the value.
    """

    header: str
    value: str | Callable[[Row], Any]
    form: str = ""

    def cell(self, row: Row) -> str:
        value = row.get(self.value) if isinstance(self.value, str) else self.value(row)
        if value is None:
            return ""
        if isinstance(value, bool):
            return "yes" if value else "no"
        return format(value, self.form).replace("|", r"\|")


def table(rows: Sequence[Row], columns: Sequence[Column] | None = None) -> str:
    """A Markdown table, aligned so that it also reads in a terminal; by default of all keys."""
    if columns is None:
        keys = dict.fromkeys(key for row in rows for key in row)
        columns = [Column(key, key, ".4g" if _is_fractional(row.get(key) for row in rows) else "") for key in keys]
    cells = [[column.header for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    numeric = [all(re.fullmatch(r"[-−+.\d]*[×%]?", line[i]) for line in cells[1:]) for i in range(len(columns))]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(columns))]

    def line(texts: Sequence[str]) -> str:
        aligned = (text.rjust(w) if right else text.ljust(w) for text, w, right in zip(texts, widths, numeric))
        return "| " + " | ".join(aligned) + " |"

    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def _is_fractional(values: Iterable[Any]) -> bool:
    present = [value for value in values if value is not None]
    return bool(present) and all(isinstance(value, float) for value in present)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit_of(folder: Path) -> str | None:
    """The commit a folder is at, ``-dirty`` if tracked files other than records differ from it; None without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude,glob)**/results/**")
        return commit + "-dirty" if changed else commit
    except (OSError, subprocess.CalledProcessError):
        return None
