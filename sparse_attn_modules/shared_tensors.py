"""Tensors that outlive the call that first needs them must not carry that caller's modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

Made = TypeVar("Made")


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device as a key of a cache: the CPU if None; an index-free "cuda" means the current one, which may change."""
    resolved = torch.device("cpu" if device is None else device)
    if resolved.type != "cpu" and resolved.index is None:
        resolved = torch.empty(0, device=resolved).device
    return resolved


@contextmanager
def leaving_modes() -> Iterator[None]:
    """Leaves inference mode, fake tensors and ``torch.jit.trace`` while something is computed that outlives the call.

    Else a mask first met in inference mode could not serve a later training step, lists made among fake tensors would
    stay fake, and a traced graph would compute what is kept.
    """
    with torch.inference_mode(False), unset_fake_temporarily(), _pausing_jit_trace():
        yield


@contextmanager
def _pausing_jit_trace() -> Iterator[None]:
    tracing = torch._C._get_tracing_state()
    # Within an operator nothing is traced anyway, and the state must not be touched.
    if tracing is None or torch._C._dispatch_tls_is_dispatch_key_excluded("Tracer"):
        yield
        return
    set_tracing_state = torch._C._set_tracing_state  # type: ignore[attr-defined]
    set_tracing_state(None)
    try:
        yield
    finally:
        set_tracing_state(tracing)


def may_keep(device: torch.device) -> bool:
    """Whether tensors computed now on a device may be kept for later calls.

    Those of a region that is compiled, or captured in a CUDA graph, belong to that graph: its memory is reused, and
    what was captured is not computed before the first replay.
    """
    if torch.compiler.is_compiling():
        return False
    return not (device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def outside_graphs(make: Callable[[], Made], device: torch.device) -> Made:
    """What ``make`` returns: tensors copied from the CPU to a device to be kept for later calls.

    The CUDA graphs of ``torch.compile`` take what their thread allocates from memory of their own, even in the call
    that warms up, and reuse it. Another thread's is not theirs.
    """
    if device.type != "cuda" or not may_keep(device):
        return make()
    with ThreadPoolExecutor(max_workers=1) as another:
        return another.submit(make).result()


class MadeOnStream:
    """Makes other streams of a device wait for tensors that were made on one, until these are there."""

    def __init__(self) -> None:
        self.event: torch.cuda.Event | None = None  # nothing to wait for without one

    def mark(self, device: torch.device) -> None:
        """To be called when they have been made, before others may find them."""
        if device.type == "cuda" and torch.cuda.is_initialized():  # else they are fake
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self.event = event

    def wait(self, device: torch.device) -> None:
        """To be called before they are used."""
        event = self.event
        # A captured graph cannot wait for what happens outside; who captures has warmed up before.
        if event is None or not may_keep(device):
            return
        if event.query():
            self.event = None
        else:
            torch.cuda.current_stream(device).wait_event(event)


@contextmanager
def building_shared_tensors() -> Iterator[None]:
    """:func:`leaving_modes`, and the default device, while tensors for a cache are built on the CPU.

    What was first met under ``torch.device("meta")`` would stay there for the rest of the process.
    """
    with leaving_modes(), torch.device("cpu"):
        yield
