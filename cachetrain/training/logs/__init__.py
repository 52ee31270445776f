"""What a run tells about itself: 15 groups of scalars, histograms, pictures and text (docs/logging.md)."""
