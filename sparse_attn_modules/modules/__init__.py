"""Attention modules with the parameters of the layers they replace."""

from .base import SparseAttention

__all__ = ["SparseAttention"]
