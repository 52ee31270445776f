#!/usr/bin/env python3
"""Draws prompts with a checkpoint (or any model directory made by models/compose_*.py).

    ./sample.py --model output/run1/checkpoint-010000 --prompt "a red circle" --out samples --cfgs 1 4 7

EMA weights are used where the checkpoint has them. One PNG per prompt and cfg, its settings inside; all cfgs start
from the same noise, and the same seed gives the same noise on every device.
"""

import json
from pathlib import Path

try:
    from cachetrain import cli
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint or model directory")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", help="prompts")
    prompts.add_argument("--prompts", metavar="FILE", help="prompts, one a line")
    parser.add_argument("--negative_prompt", default="", help="for all prompts")
    parser.add_argument("--out", required=True, help="directory for the PNGs")
    parser.add_argument("--cfgs", type=float, nargs="+", default=[4.0], help="guidance scales")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next has the next one")
    parser.add_argument("--sampler_steps", type=int, default=30, help="denoising steps")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts drawn at once")
    parser.add_argument("--width", type=int, help="pixels; default: the UNet's own size")
    parser.add_argument("--height", type=int, help="pixels; default: the UNet's own size")
    parser.add_argument("--raw_weights", action="store_true", help="not the EMA weights")
    parser.add_argument("--grid", metavar="FILE", help="also write one picture of the first --grid_size images")
    parser.add_argument("--grid_size", type=int, default=64, help="images in the grid, at most")
    cli.add_device_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from tqdm import tqdm

    from cachetrain.modeling import load
    from cachetrain.modeling.pictures import grid, render, sample_name, save_png
    from cachetrain.modeling.schedulers import sampler_for
    from cachetrain.modeling.text import encode_like_cache
    from cachetrain.training.samples import read_prompts

    device = load.pick_device(args.device)
    dtype = load.pick_dtype(args.dtype, device)
    prompts = args.prompt or read_prompts(args.prompts)
    model_dir = load.resolve_model(args.model)
    text, step = checkpoint_info(model_dir)
    null, *embeddings = encode_like_cache(
        model_dir, text["kind"], text["settings"], [args.negative_prompt, *prompts], device, dtype
    )
    vae = load.load_vae(model_dir / "vae").to(device)
    weights = "unet" if args.raw_weights or not (model_dir / "unet_ema").is_dir() else "unet_ema"
    unet = load.load_unet(model_dir / weights, dtype).to(device).eval()
    scheduler = sampler_for(load.load_scheduler(model_dir / "scheduler"))
    size = latent_size(args, unet, vae)

    out, drawn = Path(args.out), []
    with tqdm(total=len(prompts) * len(args.cfgs), desc="samples", unit="img", disable=None) as progress:
        for start in range(0, len(prompts), args.batch_size):
            part = range(start, min(start + args.batch_size, len(prompts)))
            seeds = [args.seed + i for i in part]
            for cfg in args.cfgs:
                images = render(unet, vae, scheduler, [embeddings[i] for i in part], null, cfg, seeds, size,
                                args.sampler_steps, text["kind"] == "txt_t5cache", args.batch_size)  # fmt: skip
                for i, seed, image in zip(part, seeds, images, strict=True):
                    save_png(
                        image, out / sample_name(i, prompts[i], cfg), prompt=prompts[i], seed=seed, cfg=f"{cfg:g}",
                        negative_prompt=args.negative_prompt, step=step, num_inference_steps=args.sampler_steps,
                        scheduler=type(scheduler).__name__, weights=weights,
                    )  # fmt: skip
                    drawn.append((image, prompts[i] if len(args.cfgs) == 1 else f"{prompts[i]} (cfg {cfg:g})"))
                progress.update(len(images))
    if args.grid:
        images, labels = zip(*drawn[: args.grid_size], strict=True)
        grid(images, labels, columns=min(8, len(images))).save(args.grid)
    print(f"{len(drawn)} images in {out}" + (f"; grid: {args.grid}" if args.grid else ""))
    return 0


def checkpoint_info(model_dir):
    """Returns (how captions are encoded, training step); a model that was never trained here has encoder defaults."""
    path = model_dir / "cachetrain.json"
    if path.exists():
        info = json.loads(path.read_text())
        return info["text"], info["step"]
    is_t5 = json.loads((model_dir / "text_encoder" / "config.json").read_text())["model_type"] == "t5"
    return {"kind": "txt_t5cache" if is_t5 else "txt_clipl", "settings": {}}, 0


def latent_size(args, unet, vae):
    """(h, w) of the latents, from --height and --width or the UNet's configured size."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    own = unet.config.sample_size * factor
    height, width = args.height or own, args.width or own
    if height % factor or width % factor:
        raise ValueError(f"--height {height} --width {width}: must be multiples of {factor}")
    return height // factor, width // factor


if __name__ == "__main__":
    cli.run(main)
