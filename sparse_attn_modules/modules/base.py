"""What the attention modules share: a pattern, the masks made from it, and the call of the operator."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import without_autocast
from ..backends import BACKENDS
from ..block_mask import LISTS, BlockMask
from ..functional import block_sparse_attention
from ..patterns import Dense, Pattern, resolve_pattern
from ..patterns.traced import register_for_tracing, traced_mask
from ..token_grid import TokenGrid
from .block_selector import BlockSelector

_MAX_MASKS = 8  # kept per layer: more than the image sizes of one training run, less than a leak
_keeping = threading.Lock()  # of all layers: a layer that held one could not be copied


def head_dim_of(layer: Any) -> int:
    """Channels of each head of an attention layer of timm or segment_anything.

    Most say so, or their projection to query, key and value does. The scale is asked last: it can be set to anything.
    """
    head_dim = getattr(layer, "head_dim", None)
    if isinstance(head_dim, int):
        return head_dim
    columns = getattr(getattr(layer, "qkv", None), "out_features", None)
    return columns // (3 * layer.num_heads) if isinstance(columns, int) else round(layer.scale**-2)


class SparseAttention(nn.Module):
    """Base of the attention modules. Holds no parameters of its own and adds nothing to ``state_dict``, but for the
    ``selector`` of a learned pattern.

    Args:
        pattern: which blocks are computed, or a short name of such a pattern; dense if None. May be assigned later.
        backend: backend of :func:`block_sparse_attention`; the best that can run if None.
        compute_dtype: dtype in which attention itself runs; that of its inputs if None.
    """

    def __init__(
        self,
        pattern: Pattern | str | None = None,
        backend: str | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.selector: BlockSelector | None = None
        self._selector_sizes: tuple[int, int] | None = None
        self._set_pattern(Dense() if pattern is None else pattern)
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"{type(self).__name__}: backend must be one of {list(BACKENDS)} or None, got {backend!r}")
        if compute_dtype is not None and not isinstance(compute_dtype, torch.dtype):
            raise TypeError(f"{type(self).__name__}: compute_dtype must be a dtype or None, got {compute_dtype!r}")
        self.backend = backend
        self.compute_dtype = compute_dtype

    @property
    def pattern(self) -> Pattern:
        return self._pattern

    @pattern.setter
    def pattern(self, pattern: Pattern | str) -> None:
        self._set_pattern(pattern)

    def _set_pattern(self, pattern: Pattern | str) -> None:
        self._pattern = resolve_pattern(pattern, type(self).__name__)
        self._pattern_name = register_for_tracing(self._pattern)
        self._masks: dict[str, BlockMask] = {}
        self._fit_selector()

    def _set_heads(self, num_heads: int, head_dim: int) -> None:
        """Tells the number and width of the heads, which a selector needs; called when a layer is otherwise made."""
        self._selector_sizes = (num_heads, head_dim)
        self._fit_selector()

    def _fit_selector(self) -> None:
        """Gives the layer a selector if its pattern needs one. It stays when the pattern changes, trained as it is."""
        if self._pattern.has_selector and self.selector is None and self._selector_sizes is not None:
            device = next((parameter.device for parameter in self.parameters()), None)
            self.selector = BlockSelector(*self._selector_sizes, device=device)

    def block_mask(
        self, query_grid: TokenGrid, num_heads: int, device: torch.device, key_grid: TokenGrid | None = None
    ) -> BlockMask:
        """The mask of this layer's pattern on a geometry; the last few are kept."""
        key_grid = query_grid if key_grid is None else key_grid
        # Compiled code asks for one name, so that masks for other geometries may come and go.
        name = _mask_name(query_grid, key_grid, device)
        kept = self._masks.get(name)
        if kept is not None:
            return kept
        if torch.compiler.is_compiling():
            return traced_mask(self._pattern_name, query_grid, key_grid, num_heads, device)
        mask = self.pattern.mask(query_grid, num_heads, key_grid=key_grid, device=device)
        self.keep_masks([mask])
        return mask

    @property
    def kept_masks(self) -> tuple[BlockMask, ...]:
        """The masks that :meth:`block_mask` finds without asking the pattern, the latest last."""
        return tuple(self._masks.values())

    def keep_masks(self, masks: Iterable[BlockMask]) -> None:
        """Adds masks of this layer's pattern to those kept.

        Compiled code takes a kept mask as a tensor like any other: it runs on, without being compiled again, when a new
        pattern is assigned and its masks for the same geometries are kept before the next call.
        """
        masks = list(masks)
        for mask in masks:
            for part in (mask.blocks, *(getattr(mask, list_name) for list_name in LISTS)):
                _mark_static(part)
        with _keeping:
            for mask in masks:
                name = _mask_name(mask.query_grid, mask.key_grid, mask.device)
                self._masks.pop(name, None)
                self._masks[name] = mask
            while len(self._masks) > _MAX_MASKS:
                del self._masks[next(iter(self._masks))]

    def mask_for(
        self,
        query: Tensor,
        key: Tensor,
        query_grid: TokenGrid,
        key_grid: TokenGrid | None = None,
        *,
        scale: float | None = None,
        relative_position: tuple[Tensor, Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> BlockMask:
        """The mask for these queries and keys ``[B, H, N, D]``: the kept one, unless the pattern looks at them."""
        key_grid = query_grid if key_grid is None else key_grid
        if not self._pattern.is_dynamic_on(query_grid, key_grid):
            return self.block_mask(query_grid, query.shape[1], query.device, key_grid)
        return self._pattern.select(
            query,
            key,
            query_grid,
            key_grid,
            scale=scale,
            relative_position=relative_position,
            key_padding_mask=key_padding_mask,
            selector=self.selector if self._pattern.has_selector else None,
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_grid: TokenGrid,
        key_grid: TokenGrid | None = None,
        *,
        scale: float | None = None,
        relative_position: tuple[Tensor, Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """:func:`block_sparse_attention` under this layer's mask, in ``compute_dtype``; ``[B, H, N, D]`` each."""
        dtype = query.dtype
        if self.compute_dtype is not None:
            query, key, value = (tensor.to(self.compute_dtype) for tensor in (query, key, value))
            if relative_position is not None:
                rel_h, rel_w = relative_position
                relative_position = rel_h.to(self.compute_dtype), rel_w.to(self.compute_dtype)
        # A dtype that was asked for holds under autocast too, which would replace it.
        keeps_dtype = nullcontext() if self.compute_dtype is None else without_autocast(query.device.type)
        with keeps_dtype:
            mask = self.mask_for(
                query,
                key,
                query_grid,
                key_grid,
                scale=scale,
                relative_position=relative_position,
                key_padding_mask=key_padding_mask,
            )
            out = block_sparse_attention(
                query,
                key,
                value,
                mask,
                scale=scale,
                relative_position=relative_position,
                key_padding_mask=key_padding_mask,
                dropout_p=dropout_p,
                backend=self.backend,
            )
        return out if self.compute_dtype is None else out.to(dtype)

    def __getstate__(self) -> dict[str, Any]:
        # Masks can be rebuilt; copies and pickles need not carry them.
        return {**self.__dict__, "_masks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pattern_name = register_for_tracing(self.pattern)

    def extra_repr(self) -> str:
        return f"pattern={self.pattern}"


def _mask_name(query_grid: TokenGrid, key_grid: TokenGrid, device: torch.device) -> str:
    return f"{query_grid.pack()} {key_grid.pack()} {device}"


def _mark_static(tensor: Tensor) -> None:
    """What torch._dynamo.mark_static does, which would import the compiler.

    Without it, compiling with dynamic shapes would take a batch that is as large as a mask to be so ever after.
    """
    for part in (tensor, tensor._base):
        if part is not None:
            vars(part).update(_dynamo_static_indices=set(range(part.dim())), _has_dynamo_dim_marking=True)
