#!/usr/bin/env python3
"""Composes the flagship from parts: SD1.5 UNet + SDXL VAE + T5 encoder + a frozen projection to the UNet's width.

    ./models/compose_t5_sd.py --unet stable-diffusion-v1-5/stable-diffusion-v1-5 --vae stabilityai/sdxl-vae \\
        --t5 city96/t5-v1_1-xxl-encoder-bf16 --out t5_sd15

Each part is a Hugging Face model id, a pipeline directory, or the directory of the part alone, as safetensors.
DiffusionPipeline.from_pretrained(dir, custom_pipeline=dir, trust_remote_code=True) loads the result anywhere; the
scripts here load it without running code from it.

With --train_projection the projection is no frozen component but a layer of the UNet (diffusers' "text_proj") that
trains with it, from the same initial values. The text caches of such a model hold T5's own width: make them with
cache/create_t5cache_768.py --raw.
"""

try:
    from cachetrain import cli
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    cli.add_compose_arguments(parser)
    parser.add_argument("--t5", required=True, help="where the T5 encoder and its tokenizer come from")
    parser.add_argument(
        "--fit_captions",
        metavar="FILE",
        help="fit the projection by PCA to the captions in this file, one on each line; default: a random orthogonal "
        "projection",
    )
    parser.add_argument(
        "--train_projection",
        action="store_true",
        help="make the projection a layer of the UNet that trains with it; cache the captions with --raw then",
    )
    cli.add_device_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    captions = None
    if args.fit_captions:
        with open(args.fit_captions, encoding="utf-8") as file:
            captions = [line.strip() for line in file if line.strip()]
    from cachetrain.modeling.compose import compose_t5
    from cachetrain.modeling.load import pick_device, pick_dtype

    device = pick_device(args.device)
    compose_t5(
        args.unet,
        args.vae,
        args.t5,
        args.out,
        args.objective,
        args.fresh_unet,
        args.seed,
        args.overwrite,
        captions,
        args.train_projection,
        pick_dtype(args.dtype, device),
        device,
    )
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
