#!/usr/bin/env -S python3 -P
"""Composes a Stable Diffusion pipeline with T5: UNet + VAE + T5 encoder + a frozen projection to the UNet's width.

    ./models/compose_t5_sd.py --unet stable-diffusion-v1-5/stable-diffusion-v1-5 --vae stabilityai/sdxl-vae \\
        --t5 city96/t5-v1_1-xxl-encoder-bf16 --out t5_sd15

Each part is a Hugging Face model id, a pipeline directory, or a directory with only that part, in safetensors format.
DiffusionPipeline.from_pretrained(dir, custom_pipeline=dir, trust_remote_code=True) loads the result without
cachetrain; cachetrain's scripts load the result without running code from the directory.

With --train_projection the projection is a layer of the UNet (diffusers' "text_proj") instead of a frozen component,
and trains with the UNet, from the same initial values. Such a model needs text caches that hold T5's unprojected
hidden states: make them with cache/create_t5cache_768.py --raw.
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

    compose_t5_of(args, sdxl=False)
    info(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
