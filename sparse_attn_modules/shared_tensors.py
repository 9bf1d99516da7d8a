"""Tensors that outlive the call that first needs them must not carry that caller's modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device as a key of a cache: the CPU if None; an index-free "cuda" means the current one, which may change."""
    resolved = torch.device("cpu" if device is None else device)
    if resolved.type != "cpu" and resolved.index is None:
        resolved = torch.empty(0, device=resolved).device
    return resolved


@contextmanager
def building_shared_tensors() -> Iterator[None]:
    """Leaves inference mode, fake tensors and the default device while tensors for a cache are built on the CPU.

    Else a mask first met in inference mode could not serve a later training step, and one first met under
    ``torch.device("meta")`` would stay there for the rest of the process.
    """
    with torch.inference_mode(False), unset_fake_temporarily(), torch.device("cpu"):
        yield
