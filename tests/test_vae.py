"""cachetrain/modeling/vae.py: the reduction of every autoencoder class, and drawing with one that is not 8-fold."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL, AutoencoderTiny
from helpers import TINY

from cachetrain.diffusion.noise_schedulers import make_scheduler, sampler_for
from cachetrain.modeling import load, t5_pipeline
from cachetrain.modeling.conditioning import Conditioning
from cachetrain.modeling.vae import vae_reduction
from cachetrain.sampling.prompts import Sample
from cachetrain.sampling.render import Drawing, Renderer
from cachetrain.sampling.samples import default_latent_size, latent_size_of


def kl(levels):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def asymmetric(encoder_levels, decoder_levels):
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * encoder_levels,
        down_block_out_channels=(8,) * encoder_levels,
        up_block_types=("UpDecoderBlock2D",) * decoder_levels,
        up_block_out_channels=(8,) * decoder_levels,
        norm_num_groups=4,
    )


def deep(levels):
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        scaling_factor=0.41407,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        encoder_layers_per_block=(1,) * levels,
        decoder_layers_per_block=(1,) * levels,
        encoder_qkv_multiscales=((),) * levels,
        decoder_qkv_multiscales=((),) * levels,
    )


def tiny(levels):
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels,
    )


AUTOENCODERS = {
    "kl 4": (lambda: kl(3), 4),
    "kl 8": (lambda: kl(4), 8),
    "asymmetric": (lambda: asymmetric(2, 2), 2),
    "asymmetric, deeper decoder": (lambda: asymmetric(2, 3), 2),
    "deep 16": (lambda: deep(5), 16),
    "deep 32": (lambda: deep(6), 32),
    "tiny 4": (lambda: tiny(3), 4),
    "tiny 8": (lambda: tiny(4), 8),
}


@torch.no_grad()
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_vae_reduction_is_that_of_an_encoded_image(name):
    make, reduction = AUTOENCODERS[name]
    vae = make().eval()
    latent = vae.encode(torch.zeros(1, 3, 64, 128), return_dict=False)[0]
    latent = latent if isinstance(latent, torch.Tensor) else latent.mean
    assert tuple(latent.shape[2:]) == (64 // reduction, 128 // reduction)
    assert vae_reduction(vae) == reduction == t5_pipeline.vae_reduction(vae)


def test_vae_whose_reduction_is_unknown_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Namespace: .*pass another VAE"):
        vae_reduction(Namespace(config=Namespace()))


def test_samples_are_drawn_with_a_32_fold_autoencoder():
    torch.manual_seed(0)
    vae, unet = deep(6).eval(), load.fresh_unet(load.read_config(TINY / "unet"), 0).eval()
    info, no_size = {"latent_size": None}, Namespace(height=None, width=None)
    native = default_latent_size(no_size, info, unet, vae)
    wide = latent_size_of(Sample("x", size=(128, 64)), native, vae)
    assert wide == (2, 4) == default_latent_size(Namespace(height=64, width=128), info, unet, vae)
    with pytest.raises(ValueError, match="--height 72: must be a multiple of 32"):
        default_latent_size(Namespace(height=72, width=None), info, unet, vae)
    condition = Conditioning("txt_t5cache").of_caption({"emb": torch.randn(5, unet.config.cross_attention_dim)})
    drawings = [Drawing("x", "x", "", seed, size, condition, condition) for seed, size in enumerate((wide, native))]
    sampler = sampler_for(make_scheduler("epsilon"))
    renderer = Renderer(unet, vae, sampler, Conditioning("txt_t5cache"), num_inference_steps=2, batch_size=2)
    images = {i: image for i, _, image in renderer.draw(drawings, [3.0])}
    assert images[0].size == (128, 64)
    assert images[1].size == (native[1] * 32, native[0] * 32)
    assert all(np.asarray(image).std() > 0 for image in images.values())
