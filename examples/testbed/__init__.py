"""A model that has learned something, and scenes to tell by whether it still knows it: what fidelity is measured on."""
