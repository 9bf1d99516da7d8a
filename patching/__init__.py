"""Patching: swaps the attention layers of a model, says what it did, and swaps them back."""

from .patch import patch_model, unpatch_model
from .report import PatchedLayer, PatchReport, UnpatchedLayer, patch_report

__all__ = ["PatchReport", "PatchedLayer", "UnpatchedLayer", "patch_model", "patch_report", "unpatch_model"]
