"""Draws prompts with a checkpoint (or any model directory made by models/compose_*.py).

    ./sample.py --model output/run1/checkpoint-010000 --prompt "a red circle" --out samples --cfgs 1 4 7
    ./sample.py --watch output/run1 --device cpu

EMA weights are used where the checkpoint has them. Writes one PNG per prompt and guidance scale (cfg), with its
settings inside. All cfgs start from the same noise, and a seed gives the same noise on every device. --prompts also
takes a sample_prompts.json, as training does; the file overrides the flags.

--watch draws each checkpoint of a run that has no samples yet, in a process and on a device of its own: to
OUTPUT_DIR/samples, with the prompts and settings of the run unless flags override them. It ends when the run has
ended and all checkpoints are drawn. Start it in the directory where the run was started: relative paths in the run's
settings count from there.
"""

import secrets
from functools import partial
from pathlib import Path

from cachetrain import cli


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="checkpoint, pipeline directory or Hugging Face model id to draw with")
    model.add_argument("--watch", metavar="OUTPUT_DIR", help="draw the checkpoints of this run as they appear")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+", help="prompts to draw")
    prompts.add_argument("--prompts", metavar="FILE", help="file of prompts: .txt, one on each line, or .json")
    parser.add_argument("--negative_prompt", default="", help="what to avoid, for prompts without one of their own")
    parser.add_argument("--out", metavar="DIR", help="directory for the PNGs; needed with --model")
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument(
        "--cfgs",
        type=cli.not_negative,
        nargs="+",
        metavar="SCALE",
        help="guidance scales at which each prompt is drawn, 1 for no guidance; default: 4, or the run's",
    )
    drawing.add_argument(
        "--seed",
        type=cli.seed,
        default=0,
        metavar="N",
        help="random seed of the noise for the first prompt; the second prompt has N + 1, and so on",
    )
    drawing.add_argument("--sampler", help="like euler or dpm++; default: euler for flow matching, else ddim")
    drawing.add_argument(
        "--num_inference_steps",
        "--sampler_steps",
        dest="sampler_steps",
        type=cli.denoising_steps,
        metavar="N",
        help="denoising steps: more are slower, too few leave the picture unfinished; default: 30, or the run's",
    )
    for side in ("width", "height"):
        drawing.add_argument(
            f"--{side}",
            type=cli.pixels,
            metavar="PIXELS",
            help=f"{side} of the pictures, a multiple of 8; default: as trained, or what the UNet's config says",
        )
    drawing.add_argument(
        "--batch_size",
        type=cli.positive_int,
        metavar="N",
        help="pictures drawn at once; lower it when memory runs out; default: 16, or 8 with --watch",
    )
    drawing.add_argument("--raw_weights", action="store_true", help="do not use the EMA weights")
    cli.add_device_arguments(drawing)
    drawing.add_argument("--grid", metavar="FILE", help="also write the first pictures as one, labelled image")
    drawing.add_argument(
        "--grid_size", type=cli.positive_int, default=64, metavar="N", help="number of pictures in --grid, at most"
    )
    args = parser.parse_args(argv)
    if args.watch and (args.out or args.grid):
        parser.error("--watch draws to OUTPUT_DIR/samples; it cannot be combined with --out or --grid")
    if args.model and not (args.out and (args.prompt or args.prompts)):
        parser.error("--model needs --out, and --prompt or --prompts")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.watch:
        from cachetrain.sampling.watch import watch

        return watch(args)
    from cachetrain.modeling import load
    from cachetrain.sampling.render import grid
    from cachetrain.sampling.samples import default_latent_size

    device = load.pick_device(args.device)
    model_dir = load.resolve_model(args.model)
    samples, info = open_samples(args, model_dir, device)
    weights = "unet" if args.raw_weights or not (model_dir / "unet_ema").is_dir() else "unet_ema"
    unet = load.load_unet(model_dir / weights, load.pick_dtype(args.dtype, device)).to(device).eval()
    samples.vae.to(device)
    samples.latent_size = default_latent_size(args, info, unet, samples.vae)
    drawings = samples.drawings(unet, step=secrets.randbelow(2**31))  # the number decides seeds of -1

    out, cfgs, for_grid = Path(args.out), samples.prompts.cfgs, {}
    for slot, cfg, image in samples.images(unet, drawings, progress_bar=True):
        samples.save(image, out, slot, drawings[slot], cfg, step=info["step"], weights=weights)
        if args.grid and slot < args.grid_size:
            for_grid[slot, cfg] = image
    if args.grid:
        keys = sorted(for_grid)[: args.grid_size]
        labels = [drawings[slot].prompt + ("" if len(cfgs) == 1 else f" (cfg {cfg:g})") for slot, cfg in keys]
        grid([for_grid[key] for key in keys], labels, columns=min(8, len(keys))).save(args.grid)
    print(f"{len(drawings) * len(cfgs)} images in {out}" + (f"; grid: {args.grid}" if args.grid else ""))
    return 0


def open_samples(args, model_dir, device):
    """(SampleImages of --prompt or --prompts completed by the flags, what the checkpoint says of itself)."""
    from cachetrain.checkpoints.info import checkpoint_info
    from cachetrain.modeling import load
    from cachetrain.sampling.prompts import Prompts, read_prompts
    from cachetrain.sampling.samples import SampleImages

    if args.prompts and not read_prompts(args.prompts)[0].samples:
        raise ValueError(f"{args.prompts}: no prompts")
    info = checkpoint_info(model_dir)
    defaults = Prompts(
        batch_size=args.batch_size or 16,
        cfgs=tuple(args.cfgs or [4.0]),
        scheduler=args.sampler,
        num_inference_steps=args.sampler_steps or 30,
    )
    samples = SampleImages(
        model_dir,
        args.prompts or args.prompt,
        defaults,
        load.load_scheduler(model_dir / "scheduler"),
        info,
        device=device,
        dtype=load.pick_dtype(args.dtype, device),
        negative_prompt=args.negative_prompt,
        first_seed=args.seed,
    )
    return samples, info


run = partial(cli.run, main)  # the console script
