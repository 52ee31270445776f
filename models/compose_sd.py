#!/usr/bin/env python3
"""Composes a vanilla Stable Diffusion pipeline from parts: UNet + VAE + CLIP text tower.

    ./models/compose_sd.py --unet stable-diffusion-v1-5/stable-diffusion-v1-5 --fresh_unet \\
        --vae stabilityai/sdxl-vae --clip stable-diffusion-v1-5/stable-diffusion-v1-5 --out sd15_scratch

Each part is a Hugging Face model id, a pipeline directory, or the directory of the part alone, as safetensors.
"""

try:
    from cachetrain import cli
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    cli.add_compose_arguments(parser)
    parser.add_argument("--clip", required=True, help="where the CLIP text encoder and its tokenizer come from")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from cachetrain.modeling.compose import compose_sd

    compose_sd(args.unet, args.vae, args.clip, args.out, args.objective, args.fresh_unet, args.seed, args.overwrite)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
