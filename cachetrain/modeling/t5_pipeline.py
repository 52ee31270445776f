"""A Stable Diffusion pipeline that encodes prompts with T5 and projects the embeddings to the UNet's width.

The projection is a frozen component, or a trained layer of the UNet (diffusers' "text_proj"); then the component
`projection` is None. SDXL's UNet gets zeros in place of the pooled text vector, which T5 does not have, and the time
ids of a picture that is neither resized nor cropped.

This file is copied into model directories as `pipeline.py`, so it must not import cachetrain:

    DiffusionPipeline.from_pretrained(dir, custom_pipeline=dir, trust_remote_code=True)("a red circle").images[0]

As in training, embeddings include T5's closing </s>, are zero-padded to a common length that is a multiple of 8, and
padding is hidden from cross-attention by `encoder_attention_mask`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin


def pad_embeddings(embeddings: Sequence[torch.Tensor], multiple: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero-pads text embeddings to a common length that is a multiple of `multiple`.

    Multiples of 8 suit tensor cores and SDPA.

    Args:
        embeddings: B tensors [T_i, D].

    Returns:
        (embeddings [B, T, D], bool mask [B, T], True where there is text).
    """
    lengths = [len(embedding) for embedding in embeddings]
    longest = -(-max(lengths) // multiple) * multiple
    padded = embeddings[0].new_zeros(len(lengths), longest, embeddings[0].shape[-1])
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool, device=padded.device)
    for row, (embedding, length) in enumerate(zip(embeddings, lengths, strict=True)):
        padded[row, :length] = embedding
        mask[row, :length] = True
    return padded, mask


@torch.no_grad()
def denoise(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler,
    latents: torch.Tensor,
    guidance_scale: float,
    num_inference_steps: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Samples latents with classifier-free guidance (Ho & Salimans 2022): e = e_uncond + w (e_cond - e_uncond).

    Args:
        predict: function of (noisy latents, timestep) that returns the UNet's prediction. The latents are
            [2B, C, h, w], the unconditional half first; at guidance_scale 1 [B, C, h, w], conditional only.
        scheduler: any diffusers scheduler for the objective that the UNet was trained with.
        latents: float32 [B, C, h, w], unit Gaussian noise.
        generator: for schedulers that draw noise; one, or one per image.

    Returns:
        float32 [B, C, h, w], latents with scaling_factor applied.
    """
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters and "FlowMatch" in type(scheduler).__name__:
        # Equal steps down to sigma 0; with the scheduler's default grid the last model call is at sigma 0.001.
        sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        scheduler.set_timesteps(sigmas=sigmas, device=latents.device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=latents.device)
    guided = guidance_scale != 1
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        x = torch.cat([latents, latents]) if guided else latents
        if hasattr(scheduler, "scale_model_input"):
            x = scheduler.scale_model_input(x, t)
        output = predict(x, t).float()
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(output, t, latents, **extra, return_dict=False)[0]
    return latents


def latent_statistics(vae) -> tuple | None:
    """Returns (scale, shift) of the map from a VAE's latents to those of the UNet, (latents - shift) * scale.

    Each is a number, or a list of one for each channel. None: neither config nor batch norm says anything.
    """
    config, norm = vae.config, getattr(vae, "bn", None)
    scale = config.get("scaling_factor")
    if config.get("latents_mean") is not None:
        return [(scale or 1.0) / std for std in config.latents_std], list(config.latents_mean)
    if isinstance(norm, torch.nn.BatchNorm2d):
        # AutoencoderKLFlux2: statistics of each channel at each position of a patch, the channel outermost. Those of
        # a channel, at all positions together, are what unpacked latents need.
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        if bool((mean == 0).all() and (variance == 1).all()):  # never measured
            return None
        mean, variance = (values.reshape(config.latent_channels, -1) for values in (mean, variance))
        variance = variance.mean(1) + mean.var(1, correction=0) + norm.eps
        return variance.rsqrt().tolist(), mean.mean(1).tolist()
    return None if scale is None else (scale, config.get("shift_factor") or 0.0)


@torch.no_grad()
def decode_latents(vae, latents: torch.Tensor) -> torch.Tensor:
    """Decodes latents as the UNet sees them, [B, C, h, w], to float32 images [B, 3, H, W] in [-1, 1].

    Raises:
        ValueError: the VAE does not say how its latents are normalised for the UNet.
    """
    statistics = latent_statistics(vae)
    if statistics is None:
        raise ValueError(f"{type(vae).__name__}: its config does not say how latents are normalised for the UNet")
    scale, shift = (
        latents.new_tensor(value)[:, None, None] if isinstance(value, list | tuple) else value for value in statistics
    )
    return decode_raw(vae, latents / scale + shift)


@torch.no_grad()
def decode_raw(vae, latents: torch.Tensor) -> torch.Tensor:
    """Decodes latents as the VAE gave them, [B, C, h, w], to float32 images [B, 3, H, W] in [-1, 1]."""
    latents = latents.to(vae.dtype)
    if takes_frames(vae):
        return vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0].float().clamp(-1, 1)
    return vae.decode(latents, return_dict=False)[0].float().clamp(-1, 1)


def takes_frames(vae) -> bool:
    """Whether an autoencoder for images takes them as videos of one frame, [B, 3, 1, H, W]."""
    return type(vae).__name__ in ("AutoencoderKLQwenImage", "AutoencoderKLWan")


def vae_reduction(vae) -> int:
    """Returns the VAE's downsampling factor; same as cachetrain.modeling.vae, which cannot be imported here."""
    for owner in (vae.config, vae):
        if ratio := getattr(owner, "spatial_compression_ratio", None):
            return ratio
    keys = ("down_block_out_channels", "encoder_block_out_channels", "block_out_channels", "ch_mult")
    return next(2 ** (len(vae.config[key]) - 1) for key in keys if vae.config.get(key))


class StableDiffusionT5Pipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Text-to-image pipeline: T5 encoder, projection (may be None), UNet, VAE. Load it with `from_pretrained`, and
    adapters of its UNet with `load_lora_weights`."""

    model_cpu_offload_seq = "text_encoder->projection->unet->vae"
    _optional_components: ClassVar = ["projection"]

    def __init__(self, vae, text_encoder, tokenizer, projection, unet, scheduler):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            projection=projection,
            unet=unet,
            scheduler=scheduler,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=vae_reduction(vae))

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str], max_length: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes B prompts as the text caches do.

        Args:
            prompt: the prompts; "" for the unconditional embedding.
            max_length: maximum number of tokens, </s> included.

        Returns:
            (embeddings [B, T, D], bool mask [B, T]). D is the UNet's width, or T5's width if the UNet projects.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        tokens = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(self._execution_device)
        hidden = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        if self.projection is not None:
            hidden = self.projection(hidden.to(self.projection.dtype))
        return pad_embeddings([row[keep.bool()] for row, keep in zip(hidden, tokens.attention_mask, strict=True)])

    def _sdxl_conditions(self, batch_size, height, width):
        config, device = self.unet.config, self._execution_device
        pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        pooled = torch.zeros(batch_size, pooled_width, dtype=self.unet.dtype, device=device)
        time_ids = torch.tensor(batch_size * [[height, width, 0, 0, height, width]], device=device)
        return {"text_embeds": pooled, "time_ids": time_ids}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draws one image per prompt.

        Args:
            prompt: one prompt, or a list of B.
            negative_prompt: one for all images, or a list of B.
            height, width: in pixels; default: the size in the UNet's config.
            generator: for the initial noise, unless `latents` are given, and for schedulers that draw noise.
            latents: [B, C, h, w] unit Gaussian noise; default: drawn from `generator`.
            output_type: "pil", "np", "pt" or "latent".

        Returns:
            ImagePipelineOutput, or the tuple (images,).
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        embeddings, mask = self.encode_prompt(negatives + prompts)
        if guidance_scale == 1:
            embeddings, mask = embeddings[len(prompts) :], mask[len(prompts) :]
        text = {"encoder_hidden_states": embeddings.to(self.unet.dtype), "encoder_attention_mask": mask}
        scale = self.image_processor.config.vae_scale_factor
        if latents is None:
            side = self.unet.config.sample_size * scale
            shape = (len(prompts), self.unet.config.in_channels, (height or side) // scale, (width or side) // scale)
            device = generator.device if generator else self._execution_device
            latents = torch.randn(shape, generator=generator, device=device).to(self._execution_device)
        if self.unet.config.addition_embed_type == "text_time":
            height, width = (side * scale for side in latents.shape[-2:])
            text["added_cond_kwargs"] = self._sdxl_conditions(len(embeddings), height, width)

        def predict(x, t):
            return self.unet(x.to(self.unet.dtype), t, **text).sample

        latents = denoise(predict, self.scheduler, latents, guidance_scale, num_inference_steps, generator)
        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(decode_latents(self.vae, latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
