#!/usr/bin/env -S python3 -P
"""Trains a tiny VAE on small pictures of a single shape on a plain background.

    ./dataset_scripts/draw_shapes.py --out shapes --num_images 12000 --seed 1
    ./models/train_tiny_vae.py --data_root shapes --out models/tiny/vae

Takes half an hour on one CPU core. The VAE is saved at every evaluation, so a usable one exists early.
models/tiny/vae was made with these two commands.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from cachetrain import cli
    from cachetrain.reading import read_json
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

WIDTHS = (16, 32, 64, 64)  # block_out_channels
NUM_VALIDATION = 128
KL_WEIGHT = 5e-4  # weight of the mean KL per latent element, relative to the mean squared error of pixels in [-1, 1]


def load_images(data_root: Path) -> torch.Tensor:
    """Returns the PNGs in a folder as uint8 [N, 3, H, W], sorted by name."""
    import numpy as np
    import torch
    from PIL import Image

    images = [
        np.asarray(Image.open(path, formats=["PNG"]).convert("RGB")) for path in sorted(data_root.glob("*.png"))
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def new_vae(latent_channels: int = 4) -> AutoencoderKL:
    """Returns a fresh AutoencoderKL: 8x downsampling, 945 thousand parameters with 4 latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=64,
    )


def start_from(vae: AutoencoderKL, path: Path) -> None:
    """Gives a VAE the weights of another one, but for layers of other shapes: with other latent channels, those on
    either side of the latents."""
    from cachetrain.log import counted
    from cachetrain.modeling.load import load_vae

    own, weights = vae.state_dict(), load_vae(path).state_dict()
    fitting = {name: tensor for name, tensor in weights.items() if tensor.shape == own[name].shape}
    vae.load_state_dict(fitting, strict=False)
    print(f"{path}: {len(fitting)} of {counted(len(own), 'tensor')} fit", flush=True)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Converts uint8 [B, 3, H, W] to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def with_smooth_field(batch: torch.Tensor) -> torch.Tensor:
    """Replaces the first picture by a smooth random color field, so that the VAE can encode other pictures too."""
    import torch
    import torch.nn.functional as F

    field = torch.rand(1, 3, 6, 6, device=batch.device) * 2 - 1
    field = F.interpolate(field, size=batch.shape[-2:], mode="bicubic", align_corners=True).clamp(-1, 1)
    return torch.cat([field, batch[1:]]).contiguous(memory_format=torch.channels_last)


def vae_loss(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Weighted squared error plus a KL term, which adds as much noise to the latents as reconstruction tolerates.

    Plain squared error stalls near 23 dB with the shapes washed out, because shapes cover only a few percent of the
    pixels. Pixels of a shape therefore weigh five times as much; pixels near a shape do too, or else notches and
    holes fill up.
    """
    import torch
    import torch.nn.functional as F

    posterior = vae.encode(images).latent_dist
    reconstructions = vae.decode(posterior.sample()).sample
    background = images[:, :, :1, :1]  # no shape reaches a corner
    foreground = ((images - background).abs().amax(dim=1, keepdim=True) > 0.1).float()
    weights = 1 + 4 * F.max_pool2d(foreground, kernel_size=9, stride=1, padding=4)
    weights[0] = 1  # the smooth field
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return torch.mean(weights * (reconstructions - images) ** 2) + KL_WEIGHT * kl


def save_vae(vae: AutoencoderKL, images: torch.Tensor, out: Path) -> float:
    """Saves the VAE in bfloat16, with the scaling_factor that gives latents of `images` unit variance.

    Args:
        images: float32 [N, 3, 64, 64] in [-1, 1].

    Returns:
        PSNR of the reconstructions, in dB.
    """
    import torch

    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        reconstructions = vae.decode(latents).sample.clamp(-1, 1)
    mse = ((reconstructions - images) / 2).square().mean(dim=(1, 2, 3))
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    copy.deepcopy(vae).bfloat16().save_pretrained(out)
    return (-10 * mse.log10()).mean().item()


def train(images: torch.Tensor, args: argparse.Namespace, device: str) -> None:
    """Trains the VAE and saves it to args.out; the first 128 images, uint8 [N, 3, H, W], are for validation."""
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from tqdm import trange

    validation, images = to_float(images[:NUM_VALIDATION]).to(device), images[NUM_VALIDATION:].to(device)
    torch.manual_seed(args.seed)
    vae = new_vae(args.latent_channels)
    if args.init:
        start_from(vae, args.init)
    vae.to(device, memory_format=torch.channels_last)
    ema = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        args.lr,
        total_steps=args.max_steps,
        pct_start=0.05,
        cycle_momentum=False,
        div_factor=10,
        final_div_factor=100,
    )
    for step in trange(1, args.max_steps + 1, desc="vae", disable=None):
        batch = to_float(images[torch.randint(len(images), (args.batch_size,), device=device)])
        loss = vae_loss(vae, with_smooth_field(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(vae)
        if step % args.eval_every == 0 or step == args.max_steps:
            print(f"step {step}: {save_vae(ema.module, validation, args.out):.2f} dB", flush=True)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--data_root", type=Path, required=True, help="directory of 64x64 PNGs")
    parser.add_argument("--out", type=Path, required=True, help="directory for the VAE, in diffusers format")
    parser.add_argument(
        "--latent_channels", type=cli.positive_int, default=4, help="channels of the latents; the UNet needs as many"
    )
    parser.add_argument(
        "--init",
        type=Path,
        metavar="VAE",
        help="start from this VAE; layers of other shapes, and all by default, are new",
    )
    parser.add_argument("--max_steps", type=cli.positive_int, default=6000, help="optimizer steps")
    parser.add_argument("--batch_size", type=cli.batch_size, default=8, help="images per step")
    parser.add_argument(
        "--learning_rate", "--lr", dest="lr", type=cli.positive_float, default=2e-3, help="peak learning rate"
    )
    parser.add_argument(
        "--eval_every",
        type=cli.positive_int,
        default=250,
        help="optimizer steps between evaluations; each evaluation also saves the VAE",
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="random seed of weights and data order")
    args = parser.parse_args(argv)
    config = args.out / "config.json"
    if config.exists() and read_json(config).get("block_out_channels") != list(WIDTHS):
        parser.error(f"--out {args.out}: has a model that is not of this script; choose another directory")
    if len(list(args.data_root.glob("*.png"))) <= NUM_VALIDATION:
        parser.error(
            f"--data_root {args.data_root}: expected more than {NUM_VALIDATION} PNGs; "
            "run dataset_scripts/draw_shapes.py"
        )
    return args


def main(argv=None):
    args = parse_args(argv)
    import torch

    torch.set_num_threads(1)  # for tensors this small, more threads are slower
    train(load_images(args.data_root), args, "cuda" if torch.cuda.is_available() else "cpu")
    return 0


if __name__ == "__main__":
    cli.run(main)
