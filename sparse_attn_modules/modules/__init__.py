"""Attention modules with the parameters of the layers they replace."""

from .base import SparseAttention
from .multihead import SparseMultiheadAttention
from .sam import SAMAttentionSparse
from .skipping import why_skipping_cannot_pay

__all__ = ["SAMAttentionSparse", "SparseAttention", "SparseMultiheadAttention", "why_skipping_cannot_pay"]
