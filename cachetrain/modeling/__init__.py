"""Loading models, composing models from parts, and conditioning the UNet."""
