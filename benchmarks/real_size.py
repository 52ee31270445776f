#!/usr/bin/env -S python3 -P
"""Caches and trains with models of real size: SD1.5's UNet, SD's and SDXL's VAE, CLIP-L; random weights, on the CPU.

    ./benchmarks/real_size.py --work /tmp/real_size
    ./benchmarks/real_size.py --work /tmp/real_size --sdxl --steps 3

The scripts cache photographs from scikit-image (test extra) at 512x512, then train the UNet for a few steps at batch
size 1. Each script is compared with a bare counterpart on inputs of the same size: the VAE or text encoder alone on
one resident batch, or a loop of forward, backward and AdamW on one resident batch. Times of cache scripts include
loading the model. Needs 20 GB of memory and 15 GB of disk; takes about ten minutes on two CPU cores.

--sdxl caches two photographs at 1024x1024 and at 512x512 with SDXL's VAE and text encoders, and trains all of SDXL's
UNet (2.57 billion parameters) at 512x512 with bfloat16 weights, AdamW and gradient checkpointing: with and without
--gradient_release, beside the bare loop. A run that does not fit into memory is shown as such. Needs 24 GB of memory
and 60 GB of disk.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from cachetrain import cli

REPO = Path(__file__).resolve().parent.parent
SDXL_UNET = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
CAPTIONS = {
    "astronaut": "a woman in an orange space suit in front of a flag and a model of a space shuttle",
    "chelsea": "a close-up of a tabby cat with green eyes",
    "coffee": "a cup of coffee on a saucer on a wooden table",
    "rocket": "a rocket on its launch pad at dusk",
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--work", required=True, help="directory for models, caches and the run; not deleted")
    parser.add_argument(
        "--steps", type=cli.Number(int, 2, 10**6), default=4, help="training steps; the first one is not timed"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="precision of training")
    parser.add_argument("--sdxl", action="store_true", help="measure SDXL instead of SD1.5")
    # The script calls itself with this flag, to measure one counterpart in a separate process.
    parser.add_argument("--bare", choices=("vae", "clip", "unet", "sdxl_unet"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def make_models(work):
    """Saves the pipeline sd/ and the VAE sdxl_vae/, of real size with random weights, unless they exist."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    if (work / "sd").exists():
        return
    torch.manual_seed(0)
    blocks = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    blocks |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**blocks, sample_size=512, scaling_factor=0.18215).save_pretrained(work / "sd_vae")
    AutoencoderKL(**blocks, sample_size=1024, scaling_factor=0.13025).save_pretrained(work / "sdxl_vae")
    UNet2DConditionModel(sample_size=64, cross_attention_dim=768).save_config(work / "unet")
    tiny = REPO / "models" / "tiny" / "clip" / "tokenizer"
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        hidden_act="quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(work / "clip" / "text_encoder")
    (work / "clip" / "tokenizer").mkdir()
    for path in tiny.iterdir():  # the tiny tokenizer will do, because the cost does not depend on the token ids
        (work / "clip" / "tokenizer" / path.name).write_bytes(path.read_bytes())
    parts = ["--unet", work / "unet", "--vae", work / "sd_vae", "--clip", work / "clip"]
    command = [REPO / "models" / "compose_sd.py", *parts, "--fresh_unet", "--out", work / "sd"]
    subprocess.run([sys.executable, *command], check=True)


def make_sdxl(work):
    """Saves SDXL as the pipeline sdxl/, of real size with random bfloat16 weights, unless it exists."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from cachetrain.diffusion.noise_schedulers import SD_SCHEDULE

    if (work / "sdxl").exists():
        return
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=1024,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025,
    )  # fmt: skip
    unet = UNet2DConditionModel(**SDXL_UNET)
    tiny = REPO / "models" / "tiny" / "clip" / "tokenizer"
    words = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    clip_l = CLIPTextConfig(**words, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                            num_attention_heads=12, projection_dim=768)  # fmt: skip
    clip_g = CLIPTextConfig(**words, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                            num_attention_heads=20, projection_dim=1280, hidden_act="gelu")  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae, unet=unet, text_encoder=CLIPTextModel(clip_l), text_encoder_2=CLIPTextModelWithProjection(clip_g),
        tokenizer=CLIPTokenizer.from_pretrained(tiny), scheduler=DDIMScheduler(**SD_SCHEDULE), add_watermarker=False,
        tokenizer_2=CLIPTokenizer.from_pretrained(tiny, pad_token="!"),
    ).save_pretrained(work / "sdxl")  # fmt: skip
    torch.set_default_dtype(torch.float32)


def make_photographs(data, names=tuple(CAPTIONS)):
    """Writes the photographs as JPEGs with captions."""
    import skimage.data
    from PIL import Image

    data.mkdir(parents=True, exist_ok=True)
    for name, caption in ((name, CAPTIONS[name]) for name in names):
        Image.fromarray(getattr(skimage.data, name)()).convert("RGB").save(data / f"{name}.jpg", quality=92)
        (data / f"{name}.txt").write_text(caption)


def measured(*command):
    """Runs a Python script; returns (seconds, peak memory of the process in GiB, standard output)."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise ValueError(f"{command[0]} failed with exit code {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20, output


def bare(what, work, args):
    """Measures a bare counterpart, without the code of this project; prints seconds per image as JSON."""
    import torch

    from cachetrain.modeling import load

    if what == "unet":
        return bare_loop(work, args)
    if what == "sdxl_unet":
        return bare_sdxl_loop(work, args)
    if what == "vae":
        batch = torch.rand(1, 3, 512, 512)
        encode = load.load_vae(work / "sd_vae").encode
    else:
        batch = torch.zeros(4, 77, dtype=torch.long)
        encode = load.load_text_encoder(work / "clip" / "text_encoder")
    with torch.no_grad():
        encode(batch)
        start = time.perf_counter()
        for _ in range(3):
            encode(batch)
    print(json.dumps((time.perf_counter() - start) / 3 / len(batch)))


def bare_loop(work, args):
    """Prints the seconds per step of forward, backward and AdamW on one resident batch of size 1."""
    import torch

    from cachetrain.modeling import load

    unet = load.load_unet(work / "sd" / "unet")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
    x, text, t = torch.randn(1, 4, 64, 64), torch.randn(1, 77, 768), torch.tensor([500])
    for step in range(args.steps):
        if step == 1:
            start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            output = unet(x, t, text).sample
        (output.float() - x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(json.dumps((time.perf_counter() - start) / (args.steps - 1)))


def bare_sdxl_loop(work, args):
    """Prints the seconds per step of SDXL's UNet with torch-optimi's own gradient release, on a resident batch."""
    import optimi
    import torch

    from cachetrain.modeling import load

    unet = load.load_unet(work / "sdxl" / "unet", torch.bfloat16)
    unet.enable_gradient_checkpointing()
    optimizer = optimi.AdamW(unet.parameters(), lr=1e-5, triton=False, gradient_release=True)
    optimi.prepare_for_gradient_release(unet, optimizer)
    widths = unet.config.cross_attention_dim, load.pooled_width(unet.config)
    x, t = torch.randn(1, 4, 64, 64, dtype=torch.bfloat16), torch.tensor([500])
    text, pooled = torch.randn(1, 77, widths[0]).bfloat16(), torch.randn(1, widths[1]).bfloat16()
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[512, 512, 0, 0, 512, 512]])}
    for step in range(args.steps):
        if step == 1:
            start = time.perf_counter()
        output = unet(x, t, text, added_cond_kwargs=added).sample
        (output.float() - x.float()).square().mean().backward()
    print(json.dumps((time.perf_counter() - start) / (args.steps - 1)))


def encode_seconds(output):
    """Parses seconds per sidecar from a cache script's summary; loading the model is included."""
    encoded, elapsed_s = re.search(r"(\d+) encoded.* in ([\d.]+) s", output).groups()
    return float(elapsed_s) / int(encoded)


def measure_counterparts(args, work):
    """Returns {counterpart: seconds per image}."""
    settings = ["--work", work, "--steps", args.steps, "--precision", args.precision]
    return {what: float(measured(__file__, *settings, "--bare", what)[2]) for what in ("vae", "clip", "unet")}


def measure_caching(work, data, counterparts):
    """Yields (label, seconds per image, seconds of the counterpart, total seconds, peak GiB) per cache script."""
    for script, model, what in (
        ("create_img_sdvae.py", ["--model", work / "sd"], "vae"),
        ("create_img_sdxl.py", ["--model", work / "sdxl_vae", "--vae"], "vae"),
        ("create_clipl.py", ["--model", work / "sd"], "clip"),
    ):
        flags = ["--data_root", data, "--overwrite", "--batch_size", "4" if what == "clip" else "1"]
        seconds, gib, output = measured(REPO / "cache" / script, *flags, *model)
        yield f"cache/{script}, 512x512", encode_seconds(output), counterparts[what], seconds, gib


def measure_training(args, work, data, counterparts):
    """Returns the same row for the trainer."""
    out = work / f"run-{int(time.time())}"
    flags = ["--model", work / "sd", "--train_data_dir", data, "--output_dir", out, "--logdir", work / "tensorboard"]
    flags += ["--imgcache_suffix", ".img_sdvae", "--txtcache_suffix", ".txt_clipl", "--batch_size", 1]
    flags += ["--max_steps", args.steps, "--log_step", 1, "--precision", args.precision]
    seconds, gib, _ = measured(REPO / "train_from_cached.py", *flags)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    step_s = sum(1 / line["05_Performance/images_per_second"] for line in lines) / len(lines)
    return f"train_from_cached.py, {args.precision}, batch 1", step_s, counterparts["unet"], seconds, gib


def measure_sdxl_caching(work):
    """Caches two photographs at 1024x1024 and at 512x512; yields (label, total seconds, peak GiB)."""
    for resolution in (1024, 512):
        make_photographs(data := work / f"data_{resolution}", ("astronaut", "coffee"))
        for script, flags in (
            ("create_img_sdxl.py", ["--resolution", resolution, "--batch_size", 1]),
            ("create_sdxl_text.py", []),
        ):
            flags = ["--model", work / "sdxl", "--data_root", data, "--overwrite", *flags]
            seconds, gib, _ = measured(REPO / "cache" / script, *flags)
            yield f"cache/{script}, {resolution}x{resolution}", seconds, gib


def measure_sdxl_training(args, work, *flags):
    """Returns (seconds per step, peak GiB) of training SDXL's UNet on the photographs of 512x512."""
    out = work / f"sdxl-{time.time_ns()}"
    flags = ["--model", work / "sdxl", "--train_data_dir", work / "data_512", "--output_dir", out, *flags]
    flags += ["--logdir", work / "tensorboard", "--imgcache_suffix", ".img_sdxl", "--txtcache_suffix", ".txt_sdxl"]
    flags += ["--batch_size", 1, "--max_steps", args.steps, "--log_step", 1, "--log_groups", 1, 5]
    _, gib, _ = measured(
        REPO / "train_from_cached.py", *flags, "--precision", "bf16_pure", "--gradient_checkpointing"
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    return sum(1 / line["05_Performance/steps_per_second"] for line in lines) / len(lines), gib


def measure_sdxl_bare(args, work):
    """Returns (seconds per step, peak GiB) of the bare loop."""
    _, gib, output = measured(__file__, "--work", work, "--steps", args.steps, "--bare", "sdxl_unet")
    return float(output), gib


def sdxl(args, work):
    """Measures SDXL and prints its two tables; what does not fit into memory is shown as such."""
    make_sdxl(work)
    for label, seconds, gib in measure_sdxl_caching(work):
        print(f"{label:44}{seconds:9.0f} s in all{gib:10.1f} GiB", flush=True)
    for label, measure, flags in (
        ("bare loop with release", measure_sdxl_bare, []),
        ("train_from_cached.py --gradient_release", measure_sdxl_training, ["--gradient_release"]),
        ("train_from_cached.py without release", measure_sdxl_training, ["--gradient_clip", 0]),
    ):
        try:
            step_s, gib = measure(args, work, *flags)
            print(f"{label:44}{step_s:9.0f} s/step {gib:10.1f} GiB", flush=True)
        except ValueError as error:  # killed for its memory
            print(f"{label:44} failed: {error}", flush=True)


def main(argv=None):
    args = parse_args(argv)
    work = Path(args.work)
    if args.bare:
        bare(args.bare, work, args)
        return 0
    work.mkdir(parents=True, exist_ok=True)
    if args.sdxl:
        sdxl(args, work)
        return 0
    make_models(work)
    make_photographs(data := work / "data")
    counterparts = measure_counterparts(args, work)
    rows = [*measure_caching(work, data, counterparts), measure_training(args, work, data, counterparts)]
    print(f"{'':44}{'s/image':>9}{'bare':>9}{'ratio':>7}{'total s':>9}{'peak GiB':>10}")
    for label, per_image, reference, total, gib in rows:
        print(f"{label:44}{per_image:9.2f}{reference:9.2f}{per_image / reference:7.2f}{total:9.0f}{gib:10.1f}")
    return 0


if __name__ == "__main__":
    cli.run(main)
