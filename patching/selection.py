"""Which layers are patched, and with which pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..block_mask import BlockMask
from ..modules import why_skipping_cannot_pay
from ..patterns import Dense, Pattern, resolve_pattern
from ..token_grid import TokenGrid

Include = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True)
class DenseOnFewTiles(Pattern):
    """A pattern that stays dense on grids where skipping blocks cannot pay.

    Args:
        pattern: what holds on all other grids.
    """

    pattern: Pattern

    @classmethod
    def around(cls, pattern: Pattern) -> Pattern:
        """The pattern wrapped, unless it is dense or wrapped already."""
        return pattern if isinstance(pattern, (Dense, cls)) else cls(pattern)

    @staticmethod
    def within(pattern: Pattern) -> Pattern:
        """The pattern without its wrapping."""
        return pattern.pattern if isinstance(pattern, DenseOnFewTiles) else pattern

    def blocks(self, query_grid: TokenGrid, key_grid: TokenGrid, num_heads: int) -> Tensor:
        if why_skipping_cannot_pay(query_grid, key_grid) is None:
            return self.pattern.blocks(query_grid, key_grid, num_heads)
        return torch.ones(1, query_grid.num_blocks, key_grid.num_blocks, dtype=torch.bool)

    def is_dynamic_on(self, query_grid: TokenGrid, key_grid: TokenGrid) -> bool:
        return why_skipping_cannot_pay(query_grid, key_grid) is None and self.pattern.is_dynamic_on(
            query_grid, key_grid
        )

    @property
    def has_selector(self) -> bool:
        return self.pattern.has_selector

    def select(self, query: Tensor, key: Tensor, query_grid: TokenGrid, *rest: Any, **options: Any) -> BlockMask:
        key_grid = rest[0] if rest and rest[0] is not None else query_grid
        if why_skipping_cannot_pay(query_grid, key_grid) is None:
            return self.pattern.select(query, key, query_grid, key_grid, **options)
        return self.mask(query_grid, query.shape[1], key_grid=key_grid, device=query.device)

    def __str__(self) -> str:
        return str(self.pattern)


class Selection:
    """The arguments ``pattern`` and ``include`` of ``patch_model``, checked.

    Args:
        pattern, include: the arguments.
        op: the function that they were given to, for messages.

    Raises:
        ValueError, TypeError: if one of them is not as ``patch_model`` describes it.
    """

    def __init__(
        self,
        pattern: Pattern | str | Mapping[str, Pattern | str] | None,
        include: Include,
        op: str = "patch_model",
    ) -> None:
        self._op = op
        if isinstance(pattern, Mapping):
            if not pattern:
                raise ValueError(f"{op}: pattern must name at least one layer, got an empty mapping")
            for glob in pattern:
                _check_glob(op, "pattern", glob)
            self._patterns = {glob: resolve_pattern(value) for glob, value in pattern.items()}
            globs = list(self._patterns)
        else:
            self._patterns = {"*": Dense() if pattern is None else resolve_pattern(pattern)}
            globs = []
        self._include: Callable[[str, nn.Module], bool] | None = None
        if callable(include):
            self._include = include
        elif include is not None:
            if not isinstance(include, Iterable):
                raise TypeError(
                    f"{op}: include must be a glob, several globs, a function or None, got {type(include).__name__}"
                )
            chosen = [include] if isinstance(include, str) else list(include)
            for glob in chosen:
                _check_glob(op, "include", glob)
            self._include = lambda name, module: any(fnmatchcase(name, glob) for glob in chosen)
            globs += chosen
        self._globs = globs

    def pattern_for(self, name: str, layer: nn.Module) -> Pattern | None:
        """The pattern of a layer, None if it was not selected."""
        if self._include is not None and not self._include(name, layer):
            return None
        return next((pattern for glob, pattern in self._patterns.items() if fnmatchcase(name, glob)), None)

    def check_names(self, names: Iterable[str]) -> None:
        """Raises ValueError if a glob matches none of the layers: most likely it is misspelt."""
        names = list(names)
        for glob in self._globs:
            if not any(fnmatchcase(name, glob) for name in names):
                layers = ", ".join(names) or "none"
                raise ValueError(f"{self._op}: {glob!r} must match the name of an attention layer, which are: {layers}")


def _check_glob(op: str, argument: str, glob: object) -> None:
    if not isinstance(glob, str):
        raise TypeError(f"{op}: {argument} must hold names or globs as strings, got {type(glob).__name__}")
