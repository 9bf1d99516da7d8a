"""Block-sparse attention for vision transformers."""

from .block_mask import BlockMask
from .functional import block_sparse_attention
from .token_grid import TokenGrid

__all__ = ["BlockMask", "TokenGrid", "block_sparse_attention"]
