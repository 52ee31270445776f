#!/usr/bin/env -S python3 -P
"""Composes a Stable Diffusion pipeline from parts: UNet + VAE + CLIP text encoder.

    ./models/compose_sd.py --unet stable-diffusion-v1-5/stable-diffusion-v1-5 --fresh_unet \\
        --vae stabilityai/sdxl-vae --clip stable-diffusion-v1-5/stable-diffusion-v1-5 --out sd15_scratch

Each part is a Hugging Face model id, a pipeline directory, or a directory with only that part, in safetensors format.
"""

import sys

try:
    from cachetrain import cli
    from cachetrain.log import info
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    cli.add_compose_arguments(parser)
    parser.add_argument("--clip", required=True, help="source of the CLIP text encoder and its tokenizer")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from cachetrain.modeling.compose import Target, compose_sd

    target = Target(args.out, args.objective, args.fresh_unet, args.seed, args.overwrite, args.channels)
    compose_sd(args.unet, args.vae, args.clip, target)
    info(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
