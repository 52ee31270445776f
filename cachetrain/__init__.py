"""The parts that the cache scripts and the trainer share."""

__version__ = "0.1.0"
