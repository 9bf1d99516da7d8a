"""What an adapter says of a layer: how to replace it, or why it is left alone.

An adapter knows the attention layers of one library by their classes. It is asked about every module of a model and
never imports its library: a model made of that library's classes has imported it already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..modules import SparseAttention
from ..patterns import Pattern
from ..token_grid import TokenGrid
from .grids import GridSource

Build = Callable[[Pattern, "str | None", "torch.dtype | None"], SparseAttention]


@dataclass(frozen=True)
class Site:
    """A module and where it sits in the model.

    Args:
        name: dotted path from the model.
        module: the module itself.
        ancestors: the modules above it, from the model down to its parent.
        sources: grid sources that this walk over the model has made so far, by the id of what they follow.
    """

    name: str
    module: nn.Module
    ancestors: tuple[nn.Module, ...]
    sources: dict[int, GridSource] = field(default_factory=dict, repr=False)

    def source(self, patch_embed: nn.Module, prefix: int) -> GridSource:
        """The source of a model's grids, shared by its layers."""
        return self.sources.setdefault(id(patch_embed), GridSource.of(patch_embed, prefix))

    def ancestor(self, *classes: type) -> nn.Module | None:
        """The nearest module above that is an instance of one of these classes."""
        return next((module for module in reversed(self.ancestors) if isinstance(module, classes)), None)


@dataclass(frozen=True)
class Replaceable:
    """An attention layer that can be replaced.

    Args:
        kind: what it is, in words.
        num_heads: number of query heads.
        head_dim: channels per head.
        build: makes the replacement from (pattern, backend, compute_dtype), sharing every parameter.
        geometry: the grid the layer works on at present, or by default before the first image, and how many such grids
            there are per image (windows); None if it is not known yet.
        source: what to install so that the layer learns of its grid; None if it sees it itself.
    """

    kind: str
    num_heads: int
    head_dim: int
    build: Build
    geometry: Callable[[], tuple[TokenGrid, int] | None]
    source: GridSource | None = None


@dataclass(frozen=True)
class LeftAlone:
    """An attention layer that is not replaced, and the reason."""

    kind: str
    reason: str


def loaded_class(module: str, name: str) -> type[Any] | None:
    """A class of an optional library, None if that part of the library has not been imported."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def loaded_classes(*names: tuple[str, str]) -> tuple[type[Any], ...]:
    """Those of the named classes that have been imported."""
    return tuple(found for module, name in names if (found := loaded_class(module, name)) is not None)
