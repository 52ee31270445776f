"""Stage 2: sidecars in, a trained UNet out."""
