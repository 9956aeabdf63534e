"""MedPFL: what can be reconstructed from model updates, under which assumptions, and which defense stops it."""
