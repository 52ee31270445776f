"""Properties that diffusers' autoencoder classes expose in different ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import ModelMixin


def vae_reduction(vae: ModelMixin) -> int:
    """Returns the VAE's spatial downsampling factor, pixels per latent pixel along a side: 8 for Stable Diffusion.

    Args:
        vae: a diffusers autoencoder for images.

    Raises:
        ValueError: neither the class nor the config contains the factor.
    """
    # AutoencoderDC and most newer classes.
    if getattr(vae, "spatial_compression_ratio", None):
        return vae.spatial_compression_ratio
    # All encoder blocks but one halve the sides. AsymmetricAutoencoderKL and AutoencoderTiny have separate config
    # keys for the encoder's blocks; their `block_out_channels` describe the decoder. AutoencoderTiny's
    # `spatial_scale_factor` is computed from the number of color channels, so it is right only for four blocks.
    for key in ("down_block_out_channels", "encoder_block_out_channels", "block_out_channels"):
        if blocks := getattr(vae.config, key, None):
            return 2 ** (len(blocks) - 1)
    raise ValueError(
        f"{type(vae).__name__}: the config does not contain the spatial downsampling factor; pass another VAE"
    )
