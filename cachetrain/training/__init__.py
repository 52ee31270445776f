"""Stage 2: trains a UNet from the caches."""
