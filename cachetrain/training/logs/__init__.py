"""The logs of a run: 15 groups of scalars, histograms, images and text (docs/logging.md)."""
