"""Stage 1: images and captions in, sidecars out."""
