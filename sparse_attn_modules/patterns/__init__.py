"""Patterns: rules that choose which blocks attention computes."""

from .base import CustomPattern, Dense, Pattern, Union
from .calibrated import CalibratedPattern
from .calibrated_layer import CalibratedLayer
from .combined import Hybrid, ImageToPrompt
from .dynamic import DynamicPattern, DynamicTopK, DynamicTopP
from .learned import LearnedTopK
from .local import DilatedLocal, LocalWindow, MultiScale, Streaming
from .names import NAMED_PATTERNS, resolve_pattern
from .spread import Butterfly, GlobalLocal, Random, RegionFocused, Strided

__all__ = [
    "NAMED_PATTERNS",
    "Butterfly",
    "CalibratedLayer",
    "CalibratedPattern",
    "CustomPattern",
    "Dense",
    "DilatedLocal",
    "DynamicPattern",
    "DynamicTopK",
    "DynamicTopP",
    "GlobalLocal",
    "Hybrid",
    "ImageToPrompt",
    "LearnedTopK",
    "LocalWindow",
    "MultiScale",
    "Pattern",
    "Random",
    "RegionFocused",
    "Streaming",
    "Strided",
    "Union",
    "resolve_pattern",
]
