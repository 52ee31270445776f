"""What differs between autoencoder classes and callers need to know."""


def vae_reduction(vae) -> int:
    """Returns the number of pixels along a side of one latent pixel: 8 for Stable Diffusion's VAE.

    Args:
        vae: a diffusers autoencoder for images.

    Raises:
        ValueError: neither the class nor its config says.
    """
    # AutoencoderDC, and most of the newer classes.
    if getattr(vae, "spatial_compression_ratio", None):
        return vae.spatial_compression_ratio
    # Each block of the encoder but one halves the sides. AsymmetricAutoencoderKL and AutoencoderTiny name the
    # encoder's blocks apart, and their `block_out_channels` are those of the decoder. AutoencoderTiny's
    # `spatial_scale_factor` counts colours instead of blocks, so it is right for the usual four blocks only.
    for key in ("down_block_out_channels", "encoder_block_out_channels", "block_out_channels"):
        if blocks := getattr(vae.config, key, None):
            return 2 ** (len(blocks) - 1)
    raise ValueError(
        f"{type(vae).__name__}: its config does not say how many pixels a latent pixel covers; pass another VAE"
    )
