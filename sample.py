#!/usr/bin/env python3
"""Draws prompts with a checkpoint (or any model directory made by models/compose_*.py).

    ./sample.py --model output/run1/checkpoint-010000 --prompt "a red circle" --out samples --cfgs 1 4 7

EMA weights are used where the checkpoint has them. One PNG per prompt and cfg, its settings inside; all cfgs start
from the same noise, and the same seed gives the same noise on every device. --prompts may also be a
sample_prompts.json as for training; what it says comes before the flags.
"""

import json
import secrets
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
    prompts.add_argument("--prompts", metavar="FILE", help="prompts, one a line, or a sample_prompts.json")
    parser.add_argument("--negative_prompt", default="", help="for all prompts")
    parser.add_argument("--out", required=True, help="directory for the PNGs")
    parser.add_argument("--cfgs", type=float, nargs="+", default=[4.0], help="guidance scales")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next has the next one")
    parser.add_argument("--sampler", help="ddim, dpm++, euler, ...; default: ddim, or euler for flow matching")
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
    prompts = open_prompts(args)

    from tqdm import tqdm

    from cachetrain.modeling import load
    from cachetrain.modeling.pictures import grid, render_drawings, sample_name, save_png
    from cachetrain.modeling.schedulers import default_sampler, sampler_for

    device = load.pick_device(args.device)
    dtype = load.pick_dtype(args.dtype, device)
    model_dir = load.resolve_model(args.model)
    text, step = checkpoint_info(model_dir)
    own = load.load_scheduler(model_dir / "scheduler")
    sampler = sampler_for(own, prompts.scheduler)
    embeddings = encode(prompts, model_dir, text, device, dtype)
    vae = load.load_vae(model_dir / "vae").to(device)
    weights = "unet" if args.raw_weights or not (model_dir / "unet_ema").is_dir() else "unet_ema"
    unet = load.load_unet(model_dir / weights, dtype).to(device).eval()
    drawings = resolve(args, prompts, embeddings, unet, vae)

    out, drawn = Path(args.out), {}
    images = render_drawings(unet, vae, sampler, drawings, prompts.cfgs, prompts.num_inference_steps,
                             text["kind"] == "txt_t5cache", prompts.batch_size)  # fmt: skip
    for i, cfg, image in tqdm(
        images, total=len(drawings) * len(prompts.cfgs), desc="samples", unit="img", disable=None
    ):
        drawing = drawings[i]
        save_png(
            image, out / sample_name(i, drawing.name, cfg), prompt=drawing.prompt, seed=drawing.seed, cfg=f"{cfg:g}",
            negative_prompt=drawing.negative_prompt, step=step, num_inference_steps=prompts.num_inference_steps,
            scheduler=prompts.scheduler or default_sampler(own), weights=weights,
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
    from cachetrain.training.prompts import prompts_of, read_prompts, warn

    prompts, warnings = (prompts_of(args.prompt), []) if args.prompt else read_prompts(args.prompts)
    for warning in warnings:
        warn(warning)
    if any(sample.random_caption for sample in prompts.samples):
        raise ValueError(f"{args.prompts}: random_caption takes captions of the training data; there is none here")
    if not prompts.samples:
        raise ValueError(f"{args.prompts or '--prompt'}: no prompts")
    return prompts._replace(
        samples=tuple(s._replace(negative_prompt=s.negative_prompt or args.negative_prompt) for s in prompts.samples),
        batch_size=prompts.batch_size or args.batch_size,
        cfgs=prompts.cfgs or tuple(args.cfgs),
        scheduler=prompts.scheduler or args.sampler,
        num_inference_steps=prompts.num_inference_steps or args.sampler_steps,
    )


def encode(prompts, model_dir, text, device, dtype):
    """Returns {prompt or negative prompt: embedding}."""
    from cachetrain.modeling.text import encode_like_cache

    texts = sorted({words for sample in prompts.samples for words in (sample.prompt, sample.negative_prompt)})
    encoded = encode_like_cache(model_dir, text["kind"], text["settings"], texts, device, dtype)
    scale = text.get("scaling_factor", 1.0)
    return {words: embedding * scale for words, embedding in zip(texts, encoded, strict=True)}


def resolve(args, prompts, embeddings, unet, vae):
    """Returns a list of Drawing: prompts with their seeds, sizes and embeddings."""
    from cachetrain.modeling.pictures import Drawing, native_latent_size, vae_factor
    from cachetrain.training.prompts import sample_seed, sample_size

    factor = vae_factor(vae)
    native_height, native_width = (side * factor for side in native_latent_size(unet))
    default = args.width or native_width, args.height or native_height
    if default[0] % factor or default[1] % factor:
        raise ValueError(f"--height {default[1]} --width {default[0]}: must be multiples of {factor}")
    drawings, any_number = [], secrets.randbelow(2**31)  # for seeds of -1
    for slot, sample in enumerate(prompts.samples):
        width, height = sample_size(sample, (native_width, native_height)) or default
        seed = sample_seed(sample, prompts, slot, any_number, args.seed)
        size = height // factor, width // factor
        texts = sample.prompt, sample.negative_prompt
        drawings.append(Drawing(sample.prompt, *texts, seed, size, *(embeddings[words] for words in texts)))
    return drawings


def checkpoint_info(model_dir):
    """Returns (how captions are encoded, training step); a model that was never trained here has encoder defaults."""
    path = model_dir / "cachetrain.json"
    if path.exists():
        info = json.loads(path.read_text())
        return info["text"], info["step"]
    is_t5 = json.loads((model_dir / "text_encoder" / "config.json").read_text())["model_type"] == "t5"
    return {"kind": "txt_t5cache" if is_t5 else "txt_clipl", "settings": {}}, 0


if __name__ == "__main__":
    cli.run(main)
