"""BlockSelector: the trainable part of a learned pattern, which scores pairs of blocks for one attention layer.

It starts as the rule of ``DynamicTopK``, the estimate from pooled queries and keys, and may bend it: one small matrix
per head stands between the features of queries and keys, which here include where they lie. Training it on the
attention that a dense layer pays is :func:`train_selectors`; after SeerAttention (arXiv:2410.13276), which learns gates
of language models by self-distillation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import without_autocast
from ..patterns.block_features import part_centres
from ..patterns.selection import features
from ..token_grid import TokenGrid

_CONTENT = 2  # features besides the mean
_WAVES = 4  # of the position features: half a period over a side of the image, one, two, four


class BlockSelector(nn.Module):
    """Scores of block pairs, from features of their parts: ``queries · weight · keys``.

    Args:
        num_heads: number of query heads.
        head_dim: channels per head.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        content, position = head_dim + _CONTENT, 4 * _WAVES
        self.num_heads, self.head_dim = num_heads, head_dim
        weight = torch.zeros(num_heads, content + position, content + position, device=device, dtype=dtype)
        weight.diagonal(dim1=-2, dim2=-1)[:, :content] = 1
        # Attention itself is not differentiated by it, so an optimizer of the model must not wait for its gradient.
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        query_grid: TokenGrid,
        key_grid: TokenGrid,
        scale: float,
        relative_position: tuple[Tensor, Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features whose products are the scores, as :func:`sparse_attn_modules.patterns.selection.features` gives
        them; differentiable with respect to ``weight`` alone.
        """
        queries, keys = features(query, key, query_grid, key_grid, scale, relative_position, key_padding_mask)
        content = self.head_dim + _CONTENT
        with without_autocast(query.device.type):
            extended = torch.cat([queries[..., :content], _position(queries, query_grid)], dim=-1)
            bent = extended @ self.weight.to(queries.dtype)  # [B, heads, parts, content + position]
            keys_extended = torch.cat([keys[..., :content], _position(keys, key_grid)], dim=-1)
        # Behind the content lie zeros, and then what belongs to a relative position, which stays as it is.
        found = torch.cat([bent, queries[..., content:]], dim=-1)
        return found, torch.cat([keys_extended, keys[..., content:]], dim=-1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


def _position(like: Tensor, grid: TokenGrid) -> Tensor:
    """Waves of the place of each part in the image, zero for extra tokens: ``[B, H, parts, 4 · waves]``.

    Products of two such rows are functions of the distance along each side, and of more than that.
    """
    centres = part_centres(grid, like.device)  # [image parts, 2]
    phase = 2 * math.pi * centres[..., None] * 2.0 ** torch.arange(-1, _WAVES - 1, device=like.device)
    waves = torch.cat([phase.cos(), phase.sin()], dim=-1).flatten(1)
    parts = like.shape[2] // grid.num_blocks
    outside = (grid.num_prefix_blocks * parts, grid.num_suffix_blocks * parts)
    return F.pad(waves, (0, 0, *outside)).to(like.dtype).expand(*like.shape[:2], -1, -1)
