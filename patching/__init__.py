"""Patching: swaps the attention layers of a model, says what it did, schedules their density, swaps back."""

from .density_schedule import DensitySchedule
from .patch import patch_model, unpatch_model
from .report import PatchedLayer, PatchReport, UnpatchedLayer, patch_report

__all__ = [
    "DensitySchedule",
    "PatchReport",
    "PatchedLayer",
    "UnpatchedLayer",
    "patch_model",
    "patch_report",
    "unpatch_model",
]
