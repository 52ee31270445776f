"""A Stable Diffusion pipeline whose prompts are read by T5, through a projection to the UNet's width: a frozen
component, or (then projection is None) a trained layer of the UNet, which diffusers calls "text_proj".

This file is copied into model directories as `pipeline.py`, so it imports nothing of ours:

    DiffusionPipeline.from_pretrained(dir, custom_pipeline=dir, trust_remote_code=True)("a red circle").images[0]

Convention, the same in training: embeddings keep T5's closing </s>, are zero-padded to a common length that is a
multiple of 8, and padding is hidden from cross-attention by `encoder_attention_mask`.
"""

import inspect
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor


def pad_embeddings(embeddings, multiple=8):
    """Pads text embeddings to one length, a multiple of 8 (tensor cores and SDPA like it).

    Args:
        embeddings: list of B tensors [T_i, D].

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
def denoise(predict, scheduler, latents, guidance_scale, num_inference_steps, generator=None):
    """Samples latents with classifier-free guidance (Ho & Salimans 2022): e = e_uncond + w (e_cond - e_uncond).

    Args:
        predict: function of (noisy latents, timestep) that returns the UNet's prediction: for [2B, C, h, w], of the
            unconditional and then the conditional half, or at guidance_scale 1 for [B, C, h, w], conditional.
        scheduler: any diffusers scheduler, of the objective that the UNet was trained on.
        latents: float32 [B, C, h, w], unit Gaussian noise.
        generator: torch.Generator, or one for each of the B, for schedulers that draw noise.

    Returns:
        float32 [B, C, h, w] latents, scaling_factor still applied.
    """
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters and "FlowMatch" in type(scheduler).__name__:
        # Equal steps that end at sigma 0; the scheduler's own grid spends its last model call at sigma 0.001.
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


@torch.no_grad()
def decode_latents(vae, latents):
    """Decodes latents [B, C, h, w] (scaling_factor applied) to float32 images [B, 3, H, W] in [-1, 1]."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    latents = latents / vae.config.scaling_factor + shift
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float().clamp(-1, 1)


def vae_reduction(vae):
    """Pixels along a side of one latent pixel; the rule of cachetrain.modeling.vae, which cannot be imported here."""
    if getattr(vae, "spatial_compression_ratio", None):
        return vae.spatial_compression_ratio
    keys = ("down_block_out_channels", "encoder_block_out_channels", "block_out_channels")
    return next(2 ** (len(vae.config[key]) - 1) for key in keys if vae.config.get(key))


class StableDiffusionT5Pipeline(DiffusionPipeline):
    """VAE + T5 encoder + projection + UNet. Components: see `__init__`; all from `from_pretrained`."""

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
    def encode_prompt(self, prompt, max_length=256):
        """Encodes prompts as the caches hold them.

        Args:
            prompt: str or list of B str; "" is the unconditional one.
            max_length: tokens kept, </s> included.

        Returns:
            (embeddings [B, T, D], bool mask [B, T]); D is T5's own width where the UNet projects.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        tokens = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(self._execution_device)
        hidden = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        if self.projection is not None:
            hidden = self.projection(hidden.to(self.projection.dtype))
        return pad_embeddings([row[keep.bool()] for row, keep in zip(hidden, tokens.attention_mask, strict=True)])

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        negative_prompt="",
        height=None,
        width=None,
        num_inference_steps=30,
        guidance_scale=4.0,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
    ):
        """Draws one image per prompt.

        Args:
            prompt: str or list of B str.
            negative_prompt: str or list of B str.
            height, width: pixels; default: the size the UNet was configured for.
            generator: torch.Generator, used for `latents` when they are None.
            latents: [B, C, h, w] unit Gaussian noise.
            output_type: "pil", "np", "pt" or "latent".

        Returns:
            ImagePipelineOutput, or the tuple (images,).
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        embeddings, mask = self.encode_prompt(negatives + prompts)
        if guidance_scale == 1:
            embeddings, mask = embeddings[len(prompts) :], mask[len(prompts) :]
        embeddings = embeddings.to(self.unet.dtype)

        def predict(x, t):
            text = {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}
            return self.unet(x.to(self.unet.dtype), t, **text).sample

        if latents is None:
            scale = self.image_processor.config.vae_scale_factor
            side = self.unet.config.sample_size * scale
            shape = (len(prompts), self.unet.config.in_channels, (height or side) // scale, (width or side) // scale)
            device = generator.device if generator else self._execution_device
            latents = torch.randn(shape, generator=generator, device=device).to(self._execution_device)
        latents = denoise(predict, self.scheduler, latents, guidance_scale, num_inference_steps, generator)
        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(decode_latents(self.vae, latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
