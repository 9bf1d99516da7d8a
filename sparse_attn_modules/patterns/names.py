"""Short names of patterns, for those who do not want to choose numbers."""

from __future__ import annotations

from .base import Dense, Pattern
from .combined import Hybrid
from .local import DilatedLocal, LocalWindow, MultiScale, Streaming
from .spread import Butterfly, GlobalLocal, Random, Strided

NAMED_PATTERNS: dict[str, Pattern] = {
    "dense": Dense(),
    "local": LocalWindow(density=0.25),
    "global_local": GlobalLocal(density=0.25, global_tiles=2),
    "strided": Strided(density=0.25),
    "random": Random(density=0.25),
    "dilated": DilatedLocal(density=0.25, dilation_rates=(1, 2)),
    "hierarchical": DilatedLocal(density=0.25, dilation_rates=(1, 2, 4)),
    "hybrid": Hybrid(Dense(), LocalWindow(density=0.1), heads=1),
    "multiscale": MultiScale(densities=(0.1, 0.2, 0.45)),
    "butterfly": Butterfly(),
    "streaming": Streaming(density=0.25),
    "ultra_sparse": LocalWindow(density=0.05),
}


def resolve_pattern(pattern: Pattern | str, op: str = "resolve_pattern") -> Pattern:
    """The pattern itself, or the one that goes by a short name. Errors name ``op``, which was given the pattern.

    Raises:
        ValueError: if the name is unknown; lists those that exist.
        TypeError: if it is neither a Pattern nor a name.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if not isinstance(pattern, str):
        raise TypeError(f"{op}: pattern must be a Pattern or a short name, got {type(pattern).__name__}")
    if pattern not in NAMED_PATTERNS:
        raise ValueError(f"{op}: pattern must be one of {sorted(NAMED_PATTERNS)}, got {pattern!r}")
    return NAMED_PATTERNS[pattern]
