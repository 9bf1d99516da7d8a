"""Attention modules with the parameters of the layers they replace."""

from .base import SparseAttention, head_dim_of
from .multihead import SparseMultiheadAttention
from .sam import SAMAttentionSparse
from .sam_block import SAMWindowBlock
from .skipping import why_skipping_cannot_pay
from .vit import ViTSparseAttention

__all__ = [
    "SAMAttentionSparse",
    "SAMWindowBlock",
    "SparseAttention",
    "SparseMultiheadAttention",
    "ViTSparseAttention",
    "head_dim_of",
    "why_skipping_cannot_pay",
]
