"""Backends of ``block_sparse_attention`` and the choice between them."""

from __future__ import annotations

from ..notices import log_once
from . import cuda, flex, gathered, reference
from .interface import AttentionGradients, AttentionInputs, Backend, Request

__all__ = ["BACKENDS", "AttentionGradients", "AttentionInputs", "Backend", "Request", "select_backend"]

# In order of preference. The reference comes last: it materialises every token pair.
BACKENDS: dict[str, Backend] = {module.name: module for module in (cuda, flex, gathered, reference)}


def select_backend(request: Request, name: str | None = None) -> str:
    """The backend to use: ``name`` if given, else the first that can run the request.

    Raises:
        ValueError: if ``name`` is unknown, cannot run the request, or nothing can; with every reason.
    """
    if name is not None:
        if not isinstance(name, str) or name not in BACKENDS:
            raise ValueError(f"block_sparse_attention: backend must be one of {list(BACKENDS)} or None, got {name!r}")
        reason = BACKENDS[name].why_not(request)
        if reason is not None:
            raise ValueError(f"block_sparse_attention: backend '{name}' cannot run: {reason}")
        return name
    reasons: list[str] = []
    runner_up: str | None = None
    for candidate, backend in BACKENDS.items():
        reason = backend.why_not(request)
        if reason is None:
            reason = backend.why_slower(request)
            if reason is None:
                if reasons and request.device.type == "cuda":
                    log_once(f"CUDA tensors fall back to backend '{candidate}': " + "; ".join(reasons))
                return candidate
            runner_up = runner_up or candidate
        reasons.append(f"{candidate}: {reason}")
    if runner_up is not None:
        return runner_up
    raise ValueError("block_sparse_attention: no backend can run: " + "; ".join(reasons))
