"""Patching: swaps the attention layers of a model."""
