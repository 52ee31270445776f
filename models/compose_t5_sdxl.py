#!/usr/bin/env -S python3 -P
"""Composes SDXL with T5 in place of its text encoders: UNet + VAE + T5 + a frozen projection to the UNet's width.

    ./models/compose_t5_sdxl.py --unet stabilityai/stable-diffusion-xl-base-1.0 --vae stabilityai/sdxl-vae \\
        --t5 city96/t5-v1_1-xxl-encoder-bf16 --out t5_sdxl

Works as compose_t5_sd.py. T5 has no pooled output: the UNet gets zeros in place of SDXL's pooled text vector. Sizes
and crop are those of the images, as with SDXL. cache/create_t5cache_768.py makes the text caches, in the width of the
projection (2048 for SDXL) whatever its name says.
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
    cli.add_t5_compose_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from cachetrain.modeling.compose import compose_t5_of

    compose_t5_of(args, sdxl=True)
    info(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
