"""What is worth saying once, not at every call."""

from __future__ import annotations

import logging

import torch

_logger = logging.getLogger("sparse_attn_modules")
_said: set[str] = set()


def log_once(message: str) -> None:
    """Logs a warning the first time it is met; silent while a graph is traced, which logging would break."""
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        _logger.warning(message)
