"""Checkpoints: saving, verifying, resuming and exporting."""
