"""Draws prompts with a checkpoint, or with a model directory made by models/compose_*.py.

    ./sample.py --model output/run1/checkpoint-010000 --prompt "a red circle" --out samples --cfgs 1 4 7
    ./sample.py --watch output/run1 --device cpu

EMA weights are used if the checkpoint has them. Writes one PNG per prompt and guidance scale (cfg); the PNG's text
chunks hold the settings. All cfgs start from the same noise, and a seed gives the same noise on every device.
--prompts also accepts a sample_prompts.json, as in training; the file overrides the flags.

--watch draws each checkpoint of a run that has no samples yet, in a separate process and on any device. The PNGs are
written to OUTPUT_DIR/samples, with the prompts and settings of the run unless flags override them. The script exits
when the run has ended and all checkpoints are drawn. Start the script in the directory where the run was started,
because relative paths in the run's settings are resolved from there.
"""

from __future__ import annotations

import argparse
import secrets
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cachetrain import cli, outputs

if TYPE_CHECKING:
    import torch

    from cachetrain.sampling.samples import SampleImages


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="checkpoint, pipeline directory or Hugging Face model id")
    parser.add_argument(
        "--base", help="base model of an adapter, if it is no longer where the run found it: directory or model id"
    )
    model.add_argument("--watch", metavar="OUTPUT_DIR", help="draw the checkpoints of this run as they appear")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+", help="prompts to draw")
    prompts.add_argument("--prompts", metavar="FILE", help="file of prompts: .txt, one per line, or .json")
    parser.add_argument(
        "--negative_prompt", default="", help="negative prompt; a .json file can set another one for each prompt"
    )
    parser.add_argument("--out", metavar="DIR", help="directory for the PNGs; required with --model")
    _add_drawing_arguments(parser.add_argument_group("drawing"))
    args = parser.parse_args(argv)
    if args.watch and (args.out or args.grid):
        parser.error("--watch draws to OUTPUT_DIR/samples; it cannot be combined with --out or --grid")
    if args.model and not (args.out and (args.prompt or args.prompts)):
        parser.error("--model requires --out, and --prompt or --prompts")
    return args


def _add_drawing_arguments(drawing):
    drawing.add_argument(
        "--cfgs",
        type=cli.guidance,
        nargs="+",
        metavar="SCALE",
        help="guidance scales at which each prompt is drawn; 1: no guidance; default: 4, or those of the run",
    )
    drawing.add_argument(
        "--seed",
        type=cli.seed,
        default=0,
        metavar="N",
        help="random seed of the first prompt's noise; the second prompt has N + 1, and so on",
    )
    drawing.add_argument(
        "--sampler", help="sampler, such as euler or dpm++; default: euler for flow matching, else ddim"
    )
    drawing.add_argument(
        "--num_inference_steps",
        "--sampler_steps",
        dest="sampler_steps",
        type=cli.denoising_steps,
        metavar="N",
        help="denoising steps; more are slower, too few give unfinished pictures; default: 30, or those of the run",
    )
    for side in ("width", "height"):
        drawing.add_argument(
            f"--{side}",
            type=cli.pixels,
            metavar="PIXELS",
            help=f"{side} of the pictures, a multiple of 8; default: as trained, else as in the UNet's config",
        )
    drawing.add_argument(
        "--batch_size",
        type=cli.batch_size,
        metavar="N",
        help="pictures drawn at a time; lower the number if memory runs out; default: 16, or 8 with --watch",
    )
    drawing.add_argument(
        "--raw_weights", action="store_true", help="use the trained weights instead of the EMA weights"
    )
    cli.add_device_arguments(drawing)
    drawing.add_argument(
        "--grid", type=outputs.grid, metavar="FILE", help="also write the first pictures as a labelled grid"
    )
    drawing.add_argument(
        "--grid_size", type=cli.positive_int, default=64, metavar="N", help="maximum number of pictures in --grid"
    )


def main(argv=None):
    args = parse_args(argv)
    if args.watch:
        from cachetrain.sampling.watch import watch

        return watch(args)
    from cachetrain import log
    from cachetrain.checkpoints import adapters
    from cachetrain.modeling import load
    from cachetrain.sampling.render import grid
    from cachetrain.sampling.samples import default_latent_size

    device = load.pick_device(args.device)
    model_dir = load.resolve_model(args.model)
    base = adapters.base_of(model_dir, args.base) if adapters.is_adapter(model_dir) else model_dir
    if args.base and base == model_dir:
        raise ValueError(f"--base is for adapters, and {model_dir} is a model; omit it")
    samples, info = open_samples(args, model_dir, base, device)
    weights = adapters.weights_of(model_dir, args.raw_weights)
    unet = (
        adapters.load_unet(model_dir, base, args.raw_weights, load.pick_dtype(args.dtype, device)).to(device).eval()
    )
    samples.vae.to(device)
    samples.latent_size = default_latent_size(args, info, unet, samples.vae)
    drawings = samples.drawings(unet, step=secrets.randbelow(2**31))  # the step determines seeds of -1

    out, cfgs, for_grid = Path(args.out), samples.prompts.cfgs, {}
    for slot, cfg, image in samples.images(unet, drawings, progress_bar=True):
        samples.save(image, out, slot, drawings[slot], cfg, step=info["step"], weights=weights)
        if args.grid and slot < args.grid_size:
            for_grid[slot, cfg] = image
    if args.grid:
        keys = sorted(for_grid)[: args.grid_size]
        labels = [drawings[slot].prompt + ("" if len(cfgs) == 1 else f" (cfg {cfg:g})") for slot, cfg in keys]
        outputs.save_sheet(grid([for_grid[key] for key in keys], labels, columns=min(8, len(keys))), args.grid)
    log.info(
        f"{log.counted(len(drawings) * len(cfgs), 'image')} in {out}" + (f"; grid: {args.grid}" if args.grid else "")
    )
    return 0


def open_samples(
    args: argparse.Namespace, model_dir: Path, base: Path, device: torch.device
) -> tuple[SampleImages, dict]:
    """Returns (SampleImages for --prompt or --prompts, the dict of checkpoint_info).

    Args:
        model_dir: of --model.
        base: the base model if that is an adapter, else `model_dir`.
    """
    from cachetrain.checkpoints.info import checkpoint_info
    from cachetrain.modeling import load
    from cachetrain.sampling.prompts import Prompts, read_prompts
    from cachetrain.sampling.samples import SampleImages

    if args.prompts and not read_prompts(args.prompts)[0].samples:
        raise ValueError(f"{args.prompts}: contains no prompts; add at least one")
    info = checkpoint_info(model_dir)
    defaults = Prompts(
        batch_size=args.batch_size or 16,
        cfgs=tuple(args.cfgs or [4.0]),
        scheduler=args.sampler,
        num_inference_steps=args.sampler_steps or 30,
    )
    samples = SampleImages(
        base,
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
