"""Properties that diffusers' autoencoder classes expose in different ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import ModelMixin


# Autoencoders whose images or latents are not what this project can cache, with the reason.
REFUSED = {
    "AutoencoderRAE": "resizes all images to one size, and takes and gives pixels from 0 to 1",
    "AutoencoderKLQwenImage21": "takes images with an alpha channel, which are cached without one",
    "AutoencoderKLHunyuanImageRefiner": "takes videos of several frames, made by another model",
    "ConsistencyDecoderVAE": "decodes by sampling a diffusion model; pass the AutoencoderKL that it was made for",
}


def check_takes_images(vae: ModelMixin) -> None:
    """Refuses an autoencoder of videos or sounds.

    Raises:
        ValueError: it is one.
    """
    from cachetrain.modeling.t5_pipeline import takes_frames  # imports torch

    dimensions = {parameter.ndim for parameter in vae.parameters()}
    if takes_frames(vae):
        return
    if 5 in dimensions:
        raise ValueError(f"{type(vae).__name__}: encodes video, not images; pass an image VAE")
    if 4 not in dimensions:
        raise ValueError(f"{type(vae).__name__}: does not encode images; pass an image VAE")


def latent_channels(vae: ModelMixin) -> int:
    """Returns the number of channels of the latents of a diffusers autoencoder for images.

    Raises:
        ValueError: the config does not contain it.
    """
    # VQModel's `vq_embed_dim` may differ from its `latent_channels`; AutoencoderKLKVAE and AutoencoderKLWan say z.
    for key in ("vq_embed_dim", "latent_channels", "z_channels", "z_dim"):
        if type(channels := vae.config.get(key)) is int:
            return channels
    raise ValueError(f"{type(vae).__name__}: the config does not contain the number of channels; pass another VAE")


def vae_reduction(vae: ModelMixin) -> int:
    """Returns the VAE's spatial downsampling factor, pixels per latent pixel along a side: 8 for Stable Diffusion.

    Args:
        vae: a diffusers autoencoder for images.

    Raises:
        ValueError: neither the class nor the config contains the factor.
    """
    # AutoencoderDC and most newer classes.
    for owner in (vae.config, vae):
        if ratio := getattr(owner, "spatial_compression_ratio", None):
            return ratio
    # All encoder blocks but one halve the sides. AsymmetricAutoencoderKL and AutoencoderTiny have separate config
    # keys for the encoder's blocks; their `block_out_channels` describe the decoder. AutoencoderTiny's
    # `spatial_scale_factor` is computed from the number of color channels, so it is right only for four blocks.
    for key in ("down_block_out_channels", "encoder_block_out_channels", "block_out_channels", "ch_mult"):
        if blocks := getattr(vae.config, key, None):
            return 2 ** (len(blocks) - 1)
    raise ValueError(
        f"{type(vae).__name__}: the config does not contain the spatial downsampling factor; pass another VAE"
    )
