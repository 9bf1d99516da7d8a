"""LearnedTopK: blocks chosen at run time by scores that were trained on the attention of the model itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..block_mask import BlockMask
from ..token_grid import TokenGrid
from .dynamic import DynamicTopK
from .selection import choose_mask


@dataclass(frozen=True)
class LearnedTopK(DynamicTopK):
    """As :class:`DynamicTopK`, with scores that bend to the model: every layer gets a ``selector`` with parameters.

    Untrained it chooses what ``DynamicTopK`` chooses; :func:`train_selectors` trains the selectors of a patched model.
    They lie in its ``state_dict`` as ``<layer>.selector.weight``. Another density takes the same selectors.

    Args:
        density: fraction of block pairs; met to within one block per row.
    """

    @property
    def has_selector(self) -> bool:
        return True

    def select(
        self,
        query: Tensor,
        key: Tensor,
        query_grid: TokenGrid,
        key_grid: TokenGrid | None = None,
        *,
        scale: float | None = None,
        relative_position: tuple[Tensor, Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
        selector: nn.Module | None = None,
    ) -> BlockMask:
        """As :meth:`DynamicPattern.select`, with the layer's :class:`BlockSelector`.

        Raises:
            TypeError: without a selector.
        """
        key_grid = query_grid if key_grid is None else key_grid
        self._check(query, key, query_grid, key_grid)
        if selector is None:
            raise TypeError(f"{type(self).__name__}.select: selector must be a BlockSelector, got None")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        queries, keys = selector(query, key, query_grid, key_grid, scale, relative_position, key_padding_mask)
        return choose_mask(
            queries,
            keys,
            query_grid,
            key_grid,
            self.rule(query_grid, key_grid),
            with_query_lists=torch.is_grad_enabled() and (query.requires_grad or key.requires_grad),
        )
