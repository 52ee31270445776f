"""Encodes images with any diffusers autoencoder, and captions with the pipeline code of a model's repository."""

import inspect
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from cachetrain.modeling.t5_pipeline import takes_frames
from cachetrain.modeling.vae import check_takes_images, vae_reduction

FLOAT16_MAX = torch.finfo(torch.float16).max


@torch.no_grad()
def encode_posterior(vae, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encodes images to the mean and log-variance of their latents (scaling_factor and shift_factor not applied).

    Args:
        vae: any frozen diffusers autoencoder, in eval mode.
        images: float [B, 3, H, W] in [-1, 1], in the VAE's dtype and on its device.

    Returns:
        (mean, logvar), each [B, C, h, w] in the same dtype and on the same device; h, w: H, W over the VAE's
        reduction. logvar is None for a deterministic autoencoder.
    """
    if takes_frames(vae):
        posterior = vae.encode(images[:, :, None]).latent_dist
        return posterior.mean[:, :, 0], posterior.logvar[:, :, 0]
    output = vae.encode(images)
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mean, output.latent_dist.logvar
    # Deterministic: AutoencoderDC says `latent`, AutoencoderTiny `latents`.
    return (output.latent if hasattr(output, "latent") else output.latents), None


def encode_images(vae, images: torch.Tensor) -> torch.Tensor:
    """The mean of `encode_posterior`."""
    return encode_posterior(vae, images)[0]


def check_vae(vae, sizes: Iterable[tuple[int, int]]) -> None:
    """Refuses a VAE that cannot encode these images.

    Args:
        sizes: (width, height) of the images.

    Raises:
        ValueError: an autoencoder of videos or sounds; a size that its reduction does not divide.
    """
    check_takes_images(vae)
    name = type(vae).__name__
    reduction = vae_reduction(vae)
    for width, height in sizes:
        if width % reduction or height % reduction:
            raise ValueError(
                f"{width}x{height}: {name} reduces {reduction}-fold; give sides in multiples of {reduction}"
            )


def to_model_range(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> `dtype` [B, 3, H, W] in [-1, 1], on the same device."""
    # Contiguous: with channels last, float32 GroupNorm on a CPU is up to 200 times less exact.
    return (pixels.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1).to(dtype)


def latent_masks(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Averages masks over the area of each latent position.

    Args:
        masks: uint8 [B, H, W], 255 where all is trained.
        size: (h, w) of the latents.

    Returns:
        float32 [B, 1, h, w] in [0, 1], on the same device.
    """
    return F.interpolate(masks[:, None].float() / 255, size=size, mode="area")


def storage_dtype(latent: torch.Tensor) -> torch.Tensor:
    """Casts a latent to float16, or to float32 if a value does not fit."""
    return latent.to(torch.float32 if latent.abs().max() > FLOAT16_MAX else torch.float16)


class CustomTextEncoder:
    """Encodes captions by `encode_prompt` of a pipeline whose code comes with its model (`--custom`)."""

    def __init__(self, pipeline, device: torch.device):
        self.pipeline = pipeline.to(device)
        known = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        parameters = inspect.signature(pipeline.encode_prompt).parameters
        self.options = {name: value for name, value in known.items() if name in parameters}

    @torch.no_grad()
    def encode(self, caption: str) -> tuple[torch.Tensor, int, bool]:
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
