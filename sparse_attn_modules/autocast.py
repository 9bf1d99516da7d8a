"""Autocast, asked about in a way that works for meta tensors, which have none, and under torch.compile."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast is enabled for tensors of a device type."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Where every step has chosen its precision, autocast must not replace it."""
    return torch.autocast(device_type, enabled=False) if is_autocast_on(device_type) else nullcontext()
