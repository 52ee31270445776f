"""Checkpoints: when and how a run is saved, how they are trusted again, and how a run goes on from one."""
