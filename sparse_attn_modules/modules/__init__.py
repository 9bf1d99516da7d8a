"""Attention modules with the parameters of the layers they replace."""

from .base import SparseAttention
from .sam import SAMAttentionSparse
from .skipping import why_skipping_cannot_pay

__all__ = ["SAMAttentionSparse", "SparseAttention", "why_skipping_cannot_pay"]
