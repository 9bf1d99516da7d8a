"""Peak memory of a piece of a program on the CPU."""

from __future__ import annotations

import ctypes
import ctypes.util
import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/statm")
_PAGE_MIB = 4096 / 2**20
_INTERVAL = 0.002  # seconds between samples


class ResidentMemory:
    """Samples the resident memory of the process inside a ``with`` block. NaN where the system does not tell it."""

    def __init__(self) -> None:
        self.peak_mib = float("nan")
        self._stop = threading.Event()

    def __enter__(self) -> ResidentMemory:
        if _STATUS.exists():
            _return_free_memory()
            self._before = self._highest = _resident_mib()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _STATUS.exists():
            self._stop.set()
            self._thread.join()
            self.peak_mib = self._highest - self._before

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._highest = max(self._highest, _resident_mib())


def _return_free_memory() -> None:
    """Else a run would be served from what earlier ones left behind, and its own need would not show."""
    libc = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(libc), "malloc_trim", None) if libc else None
    if trim is not None:
        trim(0)


def _resident_mib() -> float:
    return int(_STATUS.read_text().split()[1]) * _PAGE_MIB
