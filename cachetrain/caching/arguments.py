"""Command lines of the cache scripts. Imports no torch, so that `--help` answers at once."""

import argparse

from cachetrain import cli
from cachetrain.data import sidecar
from cachetrain.data.scan import CAPTION_SUFFIXES, IMAGE_SUFFIXES


def image_parser(doc, kind, model):
    """Parser of an image cache script; `check_image_args` completes what it parsed."""
    parser = _parser(doc, kind, model, batch_size=8)
    parser.add_argument("--vae", action="store_true", help="--model is a bare VAE, not a pipeline with one")
    parser.add_argument(
        "--custom", action="store_true", help="load the VAE by the pipeline code in the model's repository: RUNS it"
    )
    group = parser.add_argument_group("size of the images that are encoded (cover-resize, then centre crop)")
    group.add_argument(
        "--resolution",
        type=resolution,
        metavar="N",
        help="square: 64 to 2048 in steps of 64, below 256 for toy models; default 512",
    )
    group.add_argument("--target_width", type=int, metavar="W", help="with --target_height: multiples of 8")
    group.add_argument("--target_height", type=int, metavar="H")
    group.add_argument(
        "--bucket",
        action="store_true",
        help="each image at the size nearest to it in aspect ratio: about --resolution² pixels, sides in steps of 64",
    )
    group.add_argument(
        "--aspect_limit", type=_aspect_limit, metavar="A", help="of --bucket: longest side / other side; default 2"
    )
    group.add_argument("--flip", action="store_true", help="also encode the mirrored image, for --flip_p of training")
    parser.add_argument("--store_posterior", action="store_true", help="also store the posterior's logvar")
    parser.add_argument(
        "--num_workers",
        type=int,
        default=max(1, min(8, cli.cores_of_this_rank() - 1)),
        help="processes that decode images; 0: none but this one",
    )
    return parser


def text_parser(doc, kind, model):
    """Parser of a text cache script, without the options that only CLIP or only T5 has."""
    parser = _parser(doc, kind, model, batch_size=32)
    parser.add_argument("--store_dtype", choices=("bf16", "fp32"), default="bf16", help="of the stored embeddings")
    return parser


def check_image_args(parser, args):
    """Sets args.width, args.height (of the square bucket) and args.aspect_limit from the size options; exits with a
    usage error if they make no sense."""
    if (args.target_width is None) != (args.target_height is None):
        parser.error("--target_width and --target_height go together")
    if args.target_width is not None and args.resolution is not None:
        parser.error("give --resolution or --target_width and --target_height, not both")
    if args.target_width is not None:
        args.width, args.height = args.target_width, args.target_height
        if min(args.width, args.height) < 8 or args.width % 8 or args.height % 8:
            parser.error(f"{args.width}x{args.height}: width and height must be multiples of 8")
    else:
        args.width = args.height = 512 if args.resolution is None else args.resolution
    if args.aspect_limit is not None and not args.bucket:
        parser.error("--aspect_limit belongs to --bucket")
    if args.bucket and args.target_width is not None:
        parser.error("--bucket takes --resolution, not --target_width and --target_height")
    args.aspect_limit = args.aspect_limit or 2.0
    if args.vae and args.custom:
        parser.error("--vae names a bare VAE, which has no pipeline code for --custom to run")
    return args


def resolution(text):
    """A side of square images."""
    value = int(text)
    if value % 64 or not 64 <= value <= 2048:
        raise argparse.ArgumentTypeError(f"{value}: expected 64 to 2048 in steps of 64")
    return value


def _aspect_limit(text):
    value = float(text)
    if not 1 <= value <= 16:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 to 16")
    return value


def positive_int(text):
    """An int of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected 1 or more")
    return value


def count(text):
    """An int of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value}: expected 0 or more")
    return value


def add_choice_arguments(parser, default, note=None):
    parser.add_argument("--num_images", type=count, default=default, metavar="N",
                        help=f"that many, chosen at random; 0: all{note or ''}")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the choice")


def cache_suffix(text):
    """A suffix of sidecars, as an argparse type."""
    if not text.startswith(".") or "/" in text or text.lower() in IMAGE_SUFFIXES.union(CAPTION_SUFFIXES):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a suffix like .img_sdxl, none of images or captions")
    return text


def _parser(doc, kind, model, batch_size):
    parser = cli.parser(doc)
    parser.add_argument(
        "--data_root",
        action="append",
        required=True,
        metavar="DIR",
        help="folder of images, sub-folders included; may be given again",
    )
    parser.add_argument("--model", default=model, required=model is None, help="directory or hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--batch_size", type=positive_int, default=batch_size)
    cli.add_device_arguments(parser)
    parser.add_argument(
        "--cache_suffix",
        type=cache_suffix,
        default=sidecar.SUFFIXES[kind],
        help="of the sidecars, in place of the image's own",
    )
    parser.add_argument("--overwrite", action="store_true", help="make all again, fresh and foreign ones too")
    parser.add_argument(
        "--full",
        action="store_true",
        help="decide by content: hash every source and every sidecar, not only compare size, time and header",
    )
    return parser
