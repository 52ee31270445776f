"""The encoders' side of caching: VAE latents, and text by a foreign repository's own pipeline code."""

import inspect

import torch

FLOAT16_MAX = torch.finfo(torch.float16).max


@torch.no_grad()
def encode_posterior(vae, images):
    """Encodes images to what the VAE says of their latents (scaling_factor and shift_factor not applied).

    Args:
        vae: any frozen diffusers autoencoder, in eval mode.
        images: float [B, 3, H, W] in [-1, 1], in the VAE's dtype and on its device.

    Returns:
        (mean, logvar): [B, C, H/8, W/8] each (for a VAE that reduces 8-fold), same dtype and device; logvar is None
        for a deterministic autoencoder.
    """
    output = vae.encode(images)
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mean, output.latent_dist.logvar
    # Deterministic autoencoders name it differently: AutoencoderDC, AutoencoderTiny.
    return (output.latent if hasattr(output, "latent") else output.latents), None


def encode_images(vae, images):
    """The mean alone of `encode_posterior`."""
    return encode_posterior(vae, images)[0]


def check_vae(vae, sizes):
    """Refuses what this VAE cannot encode, or what could not be trained on right afterwards.

    Args:
        sizes: list of (width, height) of the images.

    Raises:
        ValueError: a video autoencoder; latents scaled channel by channel; a size that its reduction does not divide.
    """
    name = type(vae).__name__
    if any(parameter.ndim == 5 for parameter in vae.parameters()):
        raise ValueError(f"{name}: encodes video, not images; pass an image VAE")
    if getattr(vae.config, "latents_mean", None) is not None or getattr(vae.config, "latents_std", None) is not None:
        raise ValueError(
            f"{name}: its config scales each latent channel on its own (latents_mean, latents_std), the cache keeps "
            "one scaling_factor and one shift_factor; pass a VAE without"
        )
    blocks = getattr(vae.config, "block_out_channels", None) or [1] * 4
    factor = getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(blocks) - 1)
    for width, height in sizes:
        if width % factor or height % factor:
            raise ValueError(f"{width}x{height}: {name} reduces {factor}-fold; give sides in multiples of {factor}")


def to_model_range(pixels, dtype):
    """uint8 [B, H, W, 3] -> `dtype` [B, 3, H, W] in [-1, 1], on the same device."""
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).to(dtype)


def storage_dtype(latent):
    """Casts a latent to float16, or to float32 if a value does not fit."""
    return latent.to(torch.float32 if latent.abs().max() > FLOAT16_MAX else torch.float16)


class CustomTextEncoder:
    """Encodes captions by `encode_prompt` of a pipeline that came with its own code (`--custom`)."""

    def __init__(self, pipeline, device):
        self.pipeline, self.device = pipeline.to(device), device
        known = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        parameters = inspect.signature(pipeline.encode_prompt).parameters
        self.options = {name: value for name, value in known.items() if name in parameters}

    @torch.no_grad()
    def encode(self, caption):
        """Encodes one caption.

        Returns:
            (CPU tensor [T, D] without padding, T, whether tokens were cut).
        """
        embeddings = self.pipeline.encode_prompt(prompt=caption, **self.options)
        while not isinstance(embeddings, torch.Tensor):
            embeddings = embeddings[0]  # (prompt_embeds, negative_prompt_embeds), (prompt_embeds, mask), ...
        num_tokens = len(self.pipeline.tokenizer(caption, truncation=False, verbose=False).input_ids)
        length = embeddings.shape[-2]
        emb = embeddings.reshape(-1, length, embeddings.shape[-1])[0, :num_tokens].cpu()
        return emb, len(emb), num_tokens > length
