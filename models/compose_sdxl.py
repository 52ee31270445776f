#!/usr/bin/env -S python3 -P
"""Composes an SDXL pipeline from parts: UNet + VAE + both CLIP text encoders.

    ./models/compose_sdxl.py --unet stabilityai/stable-diffusion-xl-base-1.0 --fresh_unet \\
        --vae stabilityai/sdxl-vae --clip_l stabilityai/stable-diffusion-xl-base-1.0 \\
        --clip_g stabilityai/stable-diffusion-xl-base-1.0 --out sdxl_scratch

Each part is a Hugging Face model id, a pipeline directory, or a directory with only that part, in safetensors format.
diffusers' StableDiffusionXLPipeline.from_pretrained(dir) loads the result.
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
    parser.add_argument("--clip_l", required=True, help="source of CLIP ViT-L (text_encoder) and its tokenizer")
    parser.add_argument(
        "--clip_g", required=True, help="source of OpenCLIP bigG (text_encoder_2) and its tokenizer (tokenizer_2)"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from cachetrain.modeling.compose import Target, compose_sdxl

    target = Target(args.out, args.objective, args.fresh_unet, args.seed, args.overwrite, args.channels)
    compose_sdxl(args.unet, args.vae, args.clip_l, args.clip_g, target)
    info(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
