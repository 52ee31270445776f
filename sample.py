#!/usr/bin/env python3
"""Draws prompts with a checkpoint (or any model directory made by models/compose_*.py).

    ./sample.py --model output/run1/checkpoint-010000 --prompt "a red circle" --out samples --cfgs 1 4 7
    ./sample.py --watch output/run1 --device cpu

EMA weights are used where the checkpoint has them. One PNG per prompt and cfg, its settings inside; all cfgs start
from the same noise, and the same seed gives the same noise on every device. --prompts may also be a
sample_prompts.json as for training; what it says comes before the flags.

--watch draws each checkpoint of a run that has no samples yet, on a device of its own and as the run itself would
have: to OUTPUT_DIR/samples, with the run's prompts and settings unless flags say others. It ends when the run has
and all is drawn. Start it where the run was started: relative paths in the run's settings are seen from there.
"""

import secrets
from pathlib import Path

try:
    from cachetrain import cli
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="checkpoint or model directory")
    model.add_argument("--watch", metavar="OUTPUT_DIR", help="draw the checkpoints of this run as they appear")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+", help="prompts")
    prompts.add_argument("--prompts", metavar="FILE", help="prompts, one a line, or a sample_prompts.json")
    parser.add_argument("--negative_prompt", default="", help="for all prompts")
    parser.add_argument("--out", help="directory for the PNGs")
    parser.add_argument("--cfgs", type=float, nargs="+", help="guidance scales (4, or the run's)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next has the next one")
    parser.add_argument("--sampler", help="ddim, dpm++, euler, ...; default: ddim, or euler for flow matching")
    parser.add_argument("--sampler_steps", type=int, help="denoising steps (30, or the run's)")
    parser.add_argument("--batch_size", type=int, help="prompts drawn at once (16; 8 with --watch)")
    parser.add_argument("--width", type=int, help="pixels; default: as trained, or the UNet's own")
    parser.add_argument("--height", type=int, help="pixels; default: as trained, or the UNet's own")
    parser.add_argument("--raw_weights", action="store_true", help="not the EMA weights")
    parser.add_argument("--grid", metavar="FILE", help="also write one picture of the first --grid_size images")
    parser.add_argument("--grid_size", type=int, default=64, help="images in the grid, at most")
    cli.add_device_arguments(parser)
    args = parser.parse_args(argv)
    if args.watch and (args.out or args.grid):
        parser.error("--watch draws to its OUTPUT_DIR/samples: --out and --grid do not apply")
    if args.model and not (args.out and (args.prompt or args.prompts)):
        parser.error("--model needs --out, and --prompt or --prompts")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.watch:
        from cachetrain.sampling.watch import watch

        return watch(args)
    prompts = open_prompts(args)

    from tqdm import tqdm

    from cachetrain.checkpoints.info import checkpoint_info
    from cachetrain.diffusion.noise_schedulers import default_sampler, sampler_for
    from cachetrain.modeling import load
    from cachetrain.sampling.render import grid, render_drawings, sample_name, save_png

    device = load.pick_device(args.device)
    dtype = load.pick_dtype(args.dtype, device)
    model_dir = load.resolve_model(args.model)
    info = checkpoint_info(model_dir)
    own = load.load_scheduler(model_dir / "scheduler")
    sampler = sampler_for(own, prompts.scheduler)
    embeddings = encode(prompts, model_dir, info["text"], device, dtype)
    vae = load.load_vae(model_dir / "vae").to(device)
    weights = "unet" if args.raw_weights or not (model_dir / "unet_ema").is_dir() else "unet_ema"
    unet = load.load_unet(model_dir / weights, dtype).to(device).eval()
    drawings = resolve(args, prompts, embeddings, info, unet, vae)

    out, drawn = Path(args.out), {}
    images = render_drawings(unet, vae, sampler, drawings, prompts.cfgs, prompts.num_inference_steps,
                             info["text"]["kind"] == "txt_t5cache", prompts.batch_size)  # fmt: skip
    for i, cfg, image in tqdm(
        images, total=len(drawings) * len(prompts.cfgs), desc="samples", unit="img", disable=None
    ):
        drawing = drawings[i]
        save_png(
            image, out / sample_name(i, drawing.name, cfg), prompt=drawing.prompt, seed=drawing.seed, cfg=f"{cfg:g}",
            negative_prompt=drawing.negative_prompt, step=info["step"], weights=weights,
            num_inference_steps=prompts.num_inference_steps, scheduler=prompts.scheduler or default_sampler(own),
        )  # fmt: skip
        if args.grid and i < args.grid_size:
            drawn[i, cfg] = image
    if args.grid:
        keys = sorted(drawn)[: args.grid_size]
        labels = [drawings[i].prompt + ("" if len(prompts.cfgs) == 1 else f" (cfg {cfg:g})") for i, cfg in keys]
        grid([drawn[key] for key in keys], labels, columns=min(8, len(keys))).save(args.grid)
    print(f"{len(drawings) * len(prompts.cfgs)} images in {out}" + (f"; grid: {args.grid}" if args.grid else ""))
    return 0


def open_prompts(args):
    """The Prompts of --prompt or --prompts, completed by the flags."""
    from cachetrain.log import warn
    from cachetrain.sampling.prompts import Prompts, prompts_of, read_prompts
    from cachetrain.sampling.samples import completed

    prompts, warnings = (prompts_of(args.prompt), []) if args.prompt else read_prompts(args.prompts)
    for warning in warnings:
        warn(warning)
    if any(sample.random_caption for sample in prompts.samples):
        raise ValueError(f"{args.prompts}: random_caption takes captions of the training data; there is none here")
    if not prompts.samples:
        raise ValueError(f"{args.prompts or '--prompt'}: no prompts")
    defaults = Prompts(batch_size=args.batch_size or 16, cfgs=tuple(args.cfgs or [4.0]), scheduler=args.sampler,
                       num_inference_steps=args.sampler_steps or 30)  # fmt: skip
    return completed(prompts, defaults, args.negative_prompt)


def encode(prompts, model_dir, text, device, dtype):
    """Returns {prompt or negative prompt: embedding}."""
    from cachetrain.modeling.text_encoders import encode_like_cache

    texts = sorted({words for sample in prompts.samples for words in (sample.prompt, sample.negative_prompt)})
    encoded = encode_like_cache(model_dir, text["kind"], text["settings"], texts, device, dtype)
    return {words: embedding * text["scaling_factor"] for words, embedding in zip(texts, encoded, strict=True)}


def resolve(args, prompts, embeddings, info, unet, vae):
    """Returns a list of Drawing: prompts with their seeds, sizes and embeddings."""
    from cachetrain.sampling.prompts import sample_seed
    from cachetrain.sampling.render import Drawing
    from cachetrain.sampling.samples import default_latent_size, latent_size_of

    default = default_latent_size(args, info, unet, vae)
    drawings, any_number = [], secrets.randbelow(2**31)  # for seeds of -1
    for slot, sample in enumerate(prompts.samples):
        seed = sample_seed(sample, prompts, slot, any_number, args.seed)
        size = latent_size_of(sample, unet, vae) or default
        texts = sample.prompt, sample.negative_prompt
        drawings.append(Drawing(sample.prompt, *texts, seed, size, *(embeddings[words] for words in texts)))
    return drawings


if __name__ == "__main__":
    cli.run(main)
