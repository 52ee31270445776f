#!/usr/bin/env -S python3 -P
"""Moves a trained 4-channel UNet to an 8-channel VAE by each --channels, and compares with training from scratch.

    ./benchmarks/channels.py --work /tmp/channels

On the shapes, with T5, flow matching and the settings of prompt_following.py. The 8-channel VAE starts from the
4-channel one of models/tiny, but with new layers beside its latents, so that no channel means what it did; how much
of the new latents is linear in the old ones is printed. With --independent_vae it starts from nothing, which takes
half an hour with --vae_steps 6000; use another --work. A moved UNet first trains --layer_steps of conv_in and
conv_out, then all weights; its steps count both. Each number of steps is a run of its own, with a whole cosine
schedule. A picture counts as right if background, color, shape, place and size are all right. What is finished is
skipped when the script is started again. 3,200 steps take five minutes on one CPU core.
"""

import json
import shutil
import sys
from pathlib import Path

from cachetrain import cli

REPO = Path(__file__).resolve().parent.parent
sys.path.append(str(REPO / "benchmarks"))

from prompt_following import TINY, script, train  # noqa: E402

CHANNELS, IMGCACHE = 8, ".img_8"
SCRATCH, MOVED = "scratch", ("repeat", "zero", "fresh")
SETTINGS = {"OBJECTIVE": "flow", "GAMMA": 0, "PRECISION": "fp32", "SAVE_STEPS": 10**6}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--work", required=True, type=Path, help="directory for data, models and runs; not deleted")
    steps = {"type": cli.positive_int, "nargs": "*"}
    parser.add_argument("--scratch_steps", **steps, default=[1600, 3200], help="of runs from scratch")
    parser.add_argument("--moved_steps", **steps, default=[800, 1600], help="of runs of moved UNets")
    parser.add_argument("--ways", nargs="*", choices=MOVED, default=MOVED, help="how to move: --channels")
    whole = cli.Number(int, 0, 10**6)
    parser.add_argument("--layer_steps", type=whole, default=200, help="first steps, of the two layers only; 0: none")
    parser.add_argument("--layer_lr", type=cli.positive_float, default=4e-3, help="learning rate of these steps")
    parser.add_argument("--lr", type=cli.positive_float, default=2e-3, help="learning rate of all other steps")
    parser.add_argument("--base_steps", type=cli.positive_int, default=3200, help="of the 4-channel UNet")
    parser.add_argument("--vae_steps", type=cli.positive_int, default=1500, help="of the 8-channel VAE")
    parser.add_argument("--independent_vae", action="store_true", help="train it from nothing; needs 6,000 steps")
    parser.add_argument("--num_images", type=cli.positive_int, default=6000, help="training images")
    args = parser.parse_args(argv)
    args.steps = args.base_steps  # of prompt_following.train, where a call does not say others
    if any(steps <= args.layer_steps for steps in args.moved_steps):
        parser.error(f"--moved_steps {min(args.moved_steps)}: expected more than --layer_steps {args.layer_steps}")
    return args


def once(folder, make, *argv, **settings):
    """Calls `make` to write a folder, unless it has done so; removes what an interrupted call has left."""
    done = folder.with_name(f"{folder.name}.done")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        make(folder, *argv, **settings)
        done.touch()
    return folder


def make_vae(out, args):
    pictures = args.work / "vae_data"
    script("dataset_scripts/draw_shapes.py", "--out", pictures, "--num_images", args.num_images, "--seed", 1)
    flags = ["--latent_channels", CHANNELS, "--max_steps", args.vae_steps]
    flags += [] if args.independent_vae else ["--init", TINY / "vae", "--lr", 1e-3]
    script("models/train_tiny_vae.py", "--data_root", pictures, "--out", out, *flags)


def describe_vae(args, num_images=256):
    """Returns (the share of the variance of the new latents that a linear map of 3x3 of the old ones explains, on
    pictures that the map was not fitted to; the percentage of pictures that the new VAE keeps all right)."""
    import torch
    import torch.nn.functional as F
    from diffusers.image_processor import VaeImageProcessor

    sys.path += [str(REPO / "models"), str(REPO / "dataset_scripts")]
    from score_shapes import judge, percent
    from train_tiny_vae import load_images, to_float

    from cachetrain.modeling.load import load_vae

    torch.set_num_threads(1)
    paths = sorted((args.work / "data").glob("*.png"))[:num_images]
    images, vaes = to_float(load_images(args.work / "data")[:num_images]), [TINY / "vae", args.work / "vae"]
    with torch.no_grad():
        latents = [load_vae(path).encode(images).latent_dist.mean for path in vaes]
        decoded = VaeImageProcessor().postprocess(load_vae(vaes[1]).decode(latents[1]).sample)
    captions = [path.with_suffix(".txt").read_text().strip() for path in paths]
    kept = percent([judge(*one).followed for one in zip(paths, decoded, captions, strict=True)])
    old, new = F.unfold(latents[0], 3, padding=1).transpose(1, 2), latents[1].flatten(2).transpose(1, 2)
    old, new, half = F.pad(old, (0, 1), value=1.0).double(), new.double(), num_images // 2
    fitted = torch.linalg.lstsq(old[:half].flatten(0, 1), new[:half].flatten(0, 1)).solution
    rest = new[half:] - old[half:] @ fitted
    return 1 - (rest.square().sum() / (new[half:] - new[half:].mean((0, 1))).square().sum()).item(), kept


def compose(out, unet, vae, *flags):
    parts = ["--unet", unet, "--vae", vae, "--t5", TINY / "t5", "--objective", "flow"]
    script("models/compose_t5_sd.py", *parts, "--out", out, *flags)


def make_data(out, args, models):
    """Draws pictures and prompts, and caches them; models: {suffix of the image caches: model}."""
    drawn = ["--out", out, "--num_images", args.num_images, "--num_prompts", 120]
    script("dataset_scripts/draw_shapes.py", *drawn, "--prompts", args.work / "prompts.txt")
    for suffix, model in models.items():
        cached = ["--data_root", out, "--model", model, "--resolution", 64, "--cache_suffix", suffix]
        script("cache/create_img_sdxl.py", *cached)
    script("cache/create_t5cache_768.py", "--data_root", out, "--model", model, "--batch_size", 64)


def run(out, args, model, steps, *flags, **settings):
    settings = SETTINGS | {"MODEL": model, "STEPS": steps} | settings
    train(args, "t5", out, "--lr_decay_steps", steps, *flags, **settings)


def checkpoint(folder):
    return max(folder.glob("checkpoint-*"))


def prepare(args):
    """Makes the VAE, the data, and the models that training starts from; returns {way: model}."""
    vae = once(args.work / "vae", make_vae, args)
    old = once(args.work / "model_4", compose, TINY / "unet", TINY / "vae")
    scratch = once(args.work / "model_scratch", compose, TINY / "unet", vae, "--channels", "fresh")
    once(args.work / "data", make_data, args, {".img_sdxl": old, IMGCACHE: scratch})
    if not args.ways:
        return {SCRATCH: scratch}
    base = once(args.work / f"base-s{args.base_steps}", run, args, old, args.base_steps)
    models = {SCRATCH: scratch}
    for way in args.ways:
        folder = args.work / f"model_{way}-s{args.base_steps}"
        models[way] = once(folder, compose, checkpoint(base), vae, "--channels", way)
    return models


def score(args, name, trained):
    """Draws and scores, unless done; returns the percentages of (trained pairs, held-out pairs)."""
    result = args.work / f"{name}.json"
    if not result.exists():
        drawn = args.work / f"{name}-drawn"
        flags = ["--prompts", args.work / "prompts.txt", "--cfgs", 3, "--batch_size", 60]
        script("sample.py", "--model", checkpoint(trained), "--out", drawn, *flags)
        script("dataset_scripts/score_shapes.py", drawn, "--json", result)
    pairs = json.loads(result.read_text())
    return pairs["trained"]["all"], pairs["held_out"]["all"]


def train_and_score(args, models, way, steps):
    """Trains one way for so many steps, unless done; returns the scores."""
    eight, model, label = {"IMGCACHE": IMGCACHE}, models[way], way
    if way != SCRATCH:
        label = f"{way}-b{args.base_steps}-l{args.layer_steps}-{args.layer_lr:g}"
    if way != SCRATCH and args.layer_steps:
        flags = ["--unfreeze_in", "--unfreeze_out", "--lr", args.layer_lr]
        model = checkpoint(once(args.work / label, run, args, model, args.layer_steps, *flags, **eight))
    name = f"{label}-{args.lr:g}-s{steps}"
    rest = steps if way == SCRATCH else steps - args.layer_steps
    return score(args, name, once(args.work / name, run, args, model, rest, "--lr", args.lr, **eight))


def main(argv=None):
    args = parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    models = prepare(args)
    linear, kept = describe_vae(args)
    print(f"a linear map of the old latents explains {linear:.0%} of the variance of the new ones")
    print(f"of pictures that the VAE encodes and decodes, {kept:.0f}% are all right\n")
    print("| UNet | steps | trained / held-out pairs |\n|---|---|---|", flush=True)
    runs = [(SCRATCH, steps) for steps in sorted(args.scratch_steps, reverse=True)]
    runs += [(way, steps) for steps in sorted(args.moved_steps, reverse=True) for way in args.ways]
    for way, steps in runs:
        scores = train_and_score(args, models, way, steps)
        print(f"| {way} | {steps:,} | {scores[0]:.0f} / {scores[1]:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
