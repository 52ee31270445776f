"""SDXL as a single file: the keys of the public checkpoint, and weights and pictures that diffusers reads back."""

import os

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from helpers import run_script, train
from safetensors import safe_open
from safetensors.torch import load_file
from sdxl_fixtures import SDXL, SDXL_UNET, copy_with, load_pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from cachetrain.checkpoints.export import export_single_file
from cachetrain.checkpoints.original_layout import open_clip_tensors, text_names, unet_names, vae_names, vae_shape

# The public checkpoint of SDXL 1.0: its configs, and shapes of some tensors by name.
SDXL_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 1024,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
NUM_KEYS = {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 390}
OPEN_CLIP = {
    "token_embedding.weight": (49408, 1280), "positional_embedding": (77, 1280), "text_projection": (1280, 1280),
    "ln_final.weight": (1280,), "ln_final.bias": (1280,), "logit_scale": (),
}  # fmt: skip
RESBLOCK = {
    "ln_1.weight": (1280,), "ln_1.bias": (1280,), "ln_2.weight": (1280,), "ln_2.bias": (1280,),
    "attn.in_proj_weight": (3840, 1280), "attn.in_proj_bias": (3840,), "attn.out_proj.weight": (1280, 1280),
    "attn.out_proj.bias": (1280,), "mlp.c_fc.weight": (5120, 1280), "mlp.c_fc.bias": (5120,),
    "mlp.c_proj.weight": (1280, 5120), "mlp.c_proj.bias": (1280,),
}  # fmt: skip


def meta(cls, config):
    with torch.device("meta"):
        model = cls(**config) if cls in (UNet2DConditionModel, AutoencoderKL) else cls(CLIPTextConfig(**config))
    return dict(model.state_dict())


def test_keys_and_shapes_are_those_of_the_public_checkpoint():
    unet, vae = meta(UNet2DConditionModel, SDXL_UNET), meta(AutoencoderKL, SDXL_VAE)
    names = unet_names({key: tensor.shape for key, tensor in unet.items()}, SDXL_UNET)
    found = {name: tuple(unet[key].shape) for key, name in names.items()}
    assert len(found) == NUM_KEYS["unet"]
    assert (
        found.items()
        >= {
            "label_emb.0.0.weight": (1280, 2816),
            "label_emb.0.2.weight": (1280, 1280),
            "input_blocks.4.1.proj_in.weight": (640, 640),
            "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
            "middle_block.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
            "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
            "output_blocks.5.1.transformer_blocks.1.ff.net.0.proj.weight": (5120, 640),
            "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
            "out.2.weight": (4, 320, 3, 3),
        }.items()
    )
    names = vae_names({key: tensor.shape for key, tensor in vae.items()}, SDXL_VAE)
    assert len(names) == NUM_KEYS["vae"]
    attention = "decoder.mid_block.attentions.0.to_q.weight"
    assert vae_shape(names[attention], vae[attention].shape) == (512, 512, 1, 1)
    assert len(text_names(meta(CLIPTextModel, CLIP_L))) == NUM_KEYS["text_encoder"]
    found = {name: tuple(t.shape) for name, t in open_clip_tensors(meta(CLIPTextModelWithProjection, CLIP_G)).items()}
    blocks = {f"transformer.resblocks.{n}.{name}": shape for n in range(32) for name, shape in RESBLOCK.items()}
    assert found == OPEN_CLIP | blocks and len(found) == NUM_KEYS["text_encoder_2"]


@pytest.fixture(scope="module")
def run(shapes_sdxl, model_sdxl, tmp_path_factory):
    """A run for v with zero terminal SNR that also writes its checkpoint as a single file, with EMA weights."""
    out = tmp_path_factory.mktemp("export") / "run"
    flags = [
        "--max_steps",
        1,
        "--batch_size",
        2,
        "--ckpt_dir",
        out.parent / "files",
        "--ema_decay",
        0.5,
        "--lr",
        1e-2,
    ]
    flags += ["--objective", "v_prediction", "--zero_terminal_snr"]
    train(shapes_sdxl, model_sdxl, out, *flags, suffixes=SDXL)
    return out


def test_from_single_file_gives_back_weights_and_pictures(run):
    checkpoint, path = run / "checkpoint-000001", run.parent / "files" / "run-000001.safetensors"
    assert sorted(os.listdir(path.parent)) == [".run.run", path.name]  # no .yaml: web UIs have SDXL's
    read = StableDiffusionXLPipeline.from_single_file(
        str(path), config=str(checkpoint), local_files_only=True, torch_dtype=torch.float32, add_watermarker=False
    )
    expected = load_pipeline(checkpoint)
    expected.unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet_ema", use_safetensors=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        found, wanted = getattr(read, name).state_dict(), getattr(expected, name).state_dict()
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(found[key], tensor), f"{name}: {key}"
    read.scheduler = expected.scheduler
    for pipeline in (read, expected):
        pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "width": 64, "height": 64, "guidance_scale": 4}
    images = [
        np.asarray(pipe("a star", generator=torch.Generator().manual_seed(1), **settings).images[0]).astype(int)
        for pipe in (read, expected)
    ]
    assert np.abs(images[0] - images[1]).max() <= 1  # the file's projection lies otherwise in memory


def test_file_is_marked_as_web_uis_expect_sdxl(run, tmp_path):
    out = tmp_path / "half.safetensors"
    checkpoint = run / "checkpoint-000001"
    assert run_script("models/export_single_file.py", "--model", checkpoint, "--out", out, "--dtype", "fp16") == 0
    with safe_open(out, "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.prediction_type"] == "v" and metadata["weights"] == "unet_ema"
    assert {"v_pred", "ztsnr"} <= keys and "detect it by the key v_pred" in metadata["notes"]
    tensors = load_file(out)
    positions = tensors.pop("conditioner.embedders.0.transformer.text_model.embeddings.position_ids")
    assert torch.equal(positions, torch.arange(77)[None])
    assert {tensor.dtype for tensor in tensors.values() if tensor.numel()} == {torch.float16}
    assert not any(key.startswith("cond_stage_model") for key in keys)


def test_text_encoders_that_web_uis_would_misread_are_refused(model_sdxl, tmp_path):
    model = copy_with(model_sdxl, tmp_path / "model", "text_encoder_2", hidden_act="quick_gelu")
    with pytest.raises(ValueError, match="text_encoder_2 has hidden_act quick_gelu, expected gelu"):
        export_single_file(model, tmp_path / "x.safetensors")
