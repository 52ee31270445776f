"""A tiny SDXL pipeline of random weights: two CLIP towers of different widths, a UNet that takes pooled vector and
time ids. Real in its structure, so that diffusers' own pipeline reads it."""

import json
import shutil

from helpers import TINY

WIDTHS, POOLED, TIME_DIM = (32, 48), 40, 8
# The public checkpoint's UNet.
SDXL_UNET = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SDXL = (".img_sdxl", ".txt_sdxl")


def make_sdxl(out, force_zeros=True, seed=0):
    """Writes the pipeline directory `out`; returns it."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from cachetrain.diffusion.noise_schedulers import SD_SCHEDULE

    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "clip" / "tokenizer")
    tokenizer_2 = CLIPTokenizer.from_pretrained(TINY / "clip" / "tokenizer", pad_token="!")
    words = {"vocab_size": len(tokenizer), "bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1}
    common = words | {"num_attention_heads": 4, "max_position_embeddings": 77}
    # Eleven layers: diffusers recognizes SDXL's file by a tensor of the tenth.
    first = CLIPTextConfig(**common, hidden_size=WIDTHS[0], intermediate_size=64, num_hidden_layers=3)
    second = CLIPTextConfig(
        **common, hidden_size=WIDTHS[1], intermediate_size=96, num_hidden_layers=11, projection_dim=POOLED,
        hidden_act="gelu",
    )  # fmt: skip
    towers = CLIPTextModel(first), CLIPTextModelWithProjection(second)
    for tower in towers:
        for norm in [module for module in tower.modules() if isinstance(module, torch.nn.LayerNorm)]:
            torch.nn.init.normal_(norm.weight, 1, 0.2)  # so that a forgotten or doubled norm shows
            torch.nn.init.normal_(norm.bias, 0, 0.2)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2], attention_head_dim=[2, 4, 4], cross_attention_dim=sum(WIDTHS),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=TIME_DIM,
        projection_class_embeddings_input_dim=POOLED + 6 * TIME_DIM,
    )  # fmt: skip
    vae = AutoencoderKL.from_pretrained(TINY / "vae", torch_dtype=torch.float32)
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=towers[0], text_encoder_2=towers[1], tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        unet=unet, scheduler=DDIMScheduler(**SD_SCHEDULE), force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    ).save_pretrained(out)  # fmt: skip
    return out


def load_pipeline(model):
    """diffusers' own pipeline of a model directory, in float32, without a progress bar."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32, add_watermarker=False)
    # Where that pipeline looks for the tower's own norm in transformers 4.
    pipeline.text_encoder.__dict__.setdefault("text_model", pipeline.text_encoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def copy_with(model, out, component, **config):
    """Copies a pipeline directory with other entries in the config of a component; returns `out`."""
    shutil.copytree(model, out)
    path = out / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return out


def cache_shapes(root, model):
    """Six drawn pictures of several sizes, cached at 64x64 with their captions in float32; returns `root`."""
    from cache_fixtures import save_pictures
    from helpers import run_script

    for number, size in enumerate([(64, 64), (72, 64), (64, 100), (90, 80), (128, 64), (200, 300)]):
        name = f"{number}"
        save_pictures(root, [f"{name}.png"], size)
        (root / f"{name}.txt").write_text(f"a small red {('circle', 'square', 'star')[number % 3]} on the left")
    size = ["--target_width", 64, "--target_height", 64, "--num_workers", 0]
    assert run_script("cache/create_img_sdxl.py", "--data_root", root, "--model", model, *size) == 0
    flags = ["--store_dtype", "fp32"]
    assert run_script("cache/create_sdxl_text.py", "--data_root", root, "--model", model, *flags) == 0
    return root


def ids_of_training_script(width, height, target_width, target_height):
    """train_text_to_image_sdxl.py of diffusers, --center_crop, with a rectangle in place of its square."""
    scale = max(target_width / width, target_height / height)
    resized = int(width * scale + 1e-6), int(height * scale + 1e-6)  # torchvision's Resize truncates
    x1 = max(0, round((resized[0] - target_width) / 2.0))
    y1 = max(0, round((resized[1] - target_height) / 2.0))
    return [height, width, y1, x1, target_height, target_width]
