"""Patching: swaps the attention layers of a model, says what it did, chooses and schedules blocks, swaps back."""

from .attention_mass import AttentionMass, LayerMass
from .calibration import calibrate, measure_attention_mass
from .density_schedule import DensitySchedule
from .patch import patch_model, unpatch_model
from .report import PatchedLayer, PatchReport, UnpatchedLayer, patch_report
from .selector_training import train_selectors

__all__ = [
    "AttentionMass",
    "DensitySchedule",
    "LayerMass",
    "PatchReport",
    "PatchedLayer",
    "UnpatchedLayer",
    "calibrate",
    "measure_attention_mass",
    "patch_model",
    "patch_report",
    "train_selectors",
    "unpatch_model",
]
