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
    from cachetrain.reading import read_text
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    cli.add_compose_arguments(parser)
    parser.add_argument("--t5", required=True, help="source of the T5 encoder and its tokenizer")
    parser.add_argument(
        "--fit_captions",
        metavar="FILE",
        help="fit the projection by PCA to the captions in this file, one on each line; default: a random orthogonal "
        "projection",
    )
    parser.add_argument(
        "--train_projection",
        action="store_true",
        help="make the projection a layer of the UNet, trained with the UNet; cache captions with --raw",
    )
    cli.add_device_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    captions = None
    if args.fit_captions:
        captions = [line.strip() for line in read_text(args.fit_captions).splitlines() if line.strip()]
        if not captions:
            raise ValueError(f"{args.fit_captions}: contains no captions; add some, or omit --fit_captions")
    from cachetrain.modeling.compose import ProjectionOptions, Target, compose_t5
    from cachetrain.modeling.load import pick_device, pick_dtype

    device = pick_device(args.device)
    target = Target(args.out, args.objective, args.fresh_unet, args.seed, args.overwrite)
    projection = ProjectionOptions(captions, args.train_projection, pick_dtype(args.dtype, device), device)
    compose_t5(args.unet, args.vae, args.t5, target, projection)
    info(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
