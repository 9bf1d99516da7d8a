"""How the grid of patches reaches attention layers, which see nothing but a sequence of tokens.

A forward hook on the patch embedding notes the grid of each image; the attention layers of the model ask for it. Every
thread has its own note, so that threads running one model on images of different sizes never mix them.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..token_grid import TokenGrid


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
        # The grids that backward passes may have to recompute, with the training step in which each was last seen.
        self._trained: dict[TokenGrid, int] = {}
        self._step = 0
        self._backward_has_run = False
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
        self._latest = (height, width)
        if torch.compiler.is_compiling():
            return
        grid = _grid(height, width, self.prefix)
        self._thread.grid = grid
        if torch.is_grad_enabled():
            with self._lock:
                self._step += self._backward_has_run
                self._backward_has_run = False
                self._trained[grid] = self._step

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
        with self._lock:
            self._backward_has_run = True
            fitting = {grid: step for grid, step in self._trained.items() if grid.num_tokens == num_tokens}
        if not fitting:
            return None if self._trained else self.current()
        newest = [grid for grid, step in fitting.items() if step == max(fitting.values())]
        if len(newest) > 1:
            raise RuntimeError(
                f"sparse_attn_modules: with activation checkpointing the images of one training step must not have "
                f"different grids of equally many tokens, got {' and '.join(map(str, newest))}"
            )
        return newest[0]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_thread", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
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
