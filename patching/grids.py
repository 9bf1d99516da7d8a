"""How the grid of patches reaches attention layers, which see nothing but a sequence of tokens.

A forward hook on the patch embedding notes the grid of each image; the attention layers of the model ask for it. Every
thread has its own note, so that threads running one model on images of different sizes never mix them.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Collection
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..token_grid import TokenGrid


class _Graph:
    """Lives as long as a graph of autograd that it was put into."""


class GridSource:
    """The token grid of the image that a model is working on.

    Args:
        patch_embed: module from images to patches, with timm's ``grid_size`` and ``dynamic_feat_size``.
        prefix: number of tokens that the model puts before the patches.
    """

    def __init__(self, patch_embed: nn.Module, prefix: int) -> None:
        self.patch_embed = patch_embed
        self.prefix = prefix
        # The last size seen by any thread: what compiled code reads, which can hold no thread-local state.
        self._latest: tuple[int, int] | None = None
        # Every grid seen; those of graphs that a backward pass may still run through; and those seen with gradients but
        # no graph to follow, because the patch embedding is frozen.
        self._seen: set[TokenGrid] = set()
        self._alive: WeakValueDictionary[TokenGrid, _Graph] = WeakValueDictionary()
        self._untracked: set[TokenGrid] = set()
        self._thread = threading.local()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, patch_embed: nn.Module, prefix: int) -> GridSource:
        """The source that follows a patch embedding already, or a new one, not yet installed."""
        for source in installed_sources(patch_embed):
            if source.prefix == prefix:
                return source
        return cls(patch_embed, prefix)

    def install(self) -> None:
        """Follows the patch embedding from now on; does nothing if it does already."""
        if self not in installed_sources(self.patch_embed):
            self.patch_embed.register_forward_hook(self.observe)

    def observe(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the patch embedding: notes the grid."""
        height, width = _size(module, args, output)
        if torch.jit.is_tracing():
            height, width = int(height), int(width)  # torch.jit.trace gives sizes as tensors
        self._latest = (height, width)
        if torch.compiler.is_compiling():
            return
        grid = _grid(height, width, self.prefix)
        self._thread.grid = grid
        with self._lock:
            self._seen.add(grid)
            if not torch.is_grad_enabled():
                return
            metadata = getattr(output.grad_fn, "metadata", None)
            if metadata is None:
                self._untracked.add(grid)
                return
            graph = self._alive.get(grid) or _Graph()
            metadata[graph] = None
            self._alive[grid] = graph

    def current(self) -> TokenGrid | None:
        """The grid of this thread's last image; before the first one, of the image size that the model is made for."""
        if not torch.compiler.is_compiling():
            grid = getattr(self._thread, "grid", None)
            if grid is not None:
                return grid
        size = self._latest
        if size is None:
            size = getattr(self.patch_embed, "grid_size", None)
        return None if size is None else _grid(size[0], size[1], self.prefix)

    def __call__(self, num_tokens: int) -> TokenGrid | None:
        """The grid of the image whose tokens an attention layer is given."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return self._recomputed(num_tokens)
        return self.current()

    def _recomputed(self, num_tokens: int) -> TokenGrid | None:
        """The grid of a checkpointed layer that a backward pass runs again, perhaps in a thread of its own.

        Raises:
            RuntimeError: if two grids in question have the same number of tokens.
        """
        fitting = self._in_question(num_tokens)
        if len(fitting) > 1:
            gc.collect()  # A graph in a reference cycle outlives its last use.
            fitting = self._in_question(num_tokens)
        if len(fitting) > 1:
            raise RuntimeError(
                f"sparse_attn_modules: with activation checkpointing the images of one training step must not have "
                f"different grids of equally many tokens, got {' and '.join(sorted(map(str, fitting)))} (an output "
                f"that is kept belongs to the step, and so does every image if the patch embedding is frozen)"
            )
        if fitting:
            return next(iter(fitting))
        return None if self._seen else self.current()

    def _in_question(self, num_tokens: int) -> set[TokenGrid]:
        """The grids of so many tokens that a backward pass may have come to."""
        with self._lock:
            # Where no graph is known, the patch embedding may have run without gradients.
            known = {*self._alive, *self._untracked} or self._seen
            return {grid for grid in known if grid.num_tokens == num_tokens}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_thread", "_lock", "_alive")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._alive = WeakValueDictionary()
        self._thread = threading.local()
        self._lock = threading.Lock()


def installed_sources(module: nn.Module) -> list[GridSource]:
    """The sources that follow a module."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
    return [owner for owner in owners if isinstance(owner, GridSource)]


def remove_sources(module: nn.Module, keep: Collection[GridSource] = ()) -> None:
    """Takes the sources off a module, but for those to keep."""
    for key, hook in list(module._forward_hooks.items()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, GridSource) and owner not in keep:
            del module._forward_hooks[key]


def _size(patch_embed: nn.Module, args: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
    """(height, width) in patches of what a patch embedding was given."""
    if output.dim() == 4:  # [B, H, W, C], as models of dynamic image size ask for it
        return output.shape[1], output.shape[2]
    height, width = args[0].shape[-2:]
    size: tuple[int, int] = patch_embed.dynamic_feat_size((height, width))  # type: ignore[operator]
    return size


@lru_cache(maxsize=1024)
def _cached_grid(height: int, width: int, prefix: int) -> TokenGrid:
    return TokenGrid(height, width, prefix)


def _grid(height: int, width: int, prefix: int) -> TokenGrid:
    # The tracer of torch.compile has no use for the cache and warns about it.
    return (TokenGrid if torch.compiler.is_compiling() else _cached_grid)(height, width, prefix)
