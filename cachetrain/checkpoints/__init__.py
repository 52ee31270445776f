"""Checkpoints: how a run is saved, trusted again, resumed and exported."""
