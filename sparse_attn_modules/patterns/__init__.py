"""Patterns: rules that choose which blocks attention computes."""

from .base import CustomPattern, Dense, Pattern

__all__ = ["CustomPattern", "Dense", "Pattern"]
