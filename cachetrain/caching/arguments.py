"""Arguments that several cache scripts share. Imports no torch, so that `--help` answers at once."""

import argparse
import re
from functools import partial

from cachetrain import cli
from cachetrain.data import sidecar
from cachetrain.data.captions import CAPTION_SUFFIXES
from cachetrain.data.variants import MAX_VARIANTS, PLAIN, CaptionSettings
from cachetrain.data.walk import IMAGE_SUFFIXES

aspect_limit = cli.Number(float, 1, 16)
resolution = cli.Number(int, 64, 2048, step=64)
_SIDE = cli.Number(int, 8, 8192, step=8)
_CROPS = cli.Number(int, 1, 64)


def image_parser(doc: str, kind: str, model: str) -> argparse.ArgumentParser:
    """Parser of an image cache script; `check_image_args` completes what it parses."""
    parser = _cache_parser(doc, kind, model, batch_size=8)
    parser.add_argument("--vae", action="store_true", help="--model is a bare VAE instead of a pipeline")
    parser.add_argument(
        "--custom",
        action="store_true",
        help="load the VAE with the pipeline code in the model's repository; this RUNS that code",
    )
    _add_size_arguments(parser)
    parser.add_argument(
        "--mask",
        choices=("files", "alpha"),
        help="also store a mask for --unmasked_weight of training, white where the image counts: a.mask.png beside "
        "a.jpg, or its alpha channel",
    )
    parser.add_argument("--store_posterior", action="store_true", help="also store the posterior's log-variance")
    parser.add_argument(
        "--norm",
        metavar="FILE",
        help="JSON file of cache/calculate_vae_scaling.py --out: scaling_factor and shift_factor of the latents, in "
        "place of what the VAE says; sidecars that exist only get it in their headers",
    )
    parser.add_argument(
        "--num_workers",
        type=cli.workers,
        help="processes that decode images; 0: decode in the main process; default: one for each core but one, at "
        "most 8",
    )
    return parser


def _add_size_arguments(parser):
    size = parser.add_argument_group("size at which images are encoded (resized to cover it, then center-cropped)")
    size.add_argument(
        "--resolution",
        type=resolution,
        metavar="N",
        help="side of the square in pixels; below 256 for toy models; default: 512",
    )
    size.add_argument("--target_width", type=_SIDE, metavar="W", help="width in pixels, with --target_height")
    size.add_argument("--target_height", type=_SIDE, metavar="H", help="height in pixels, with --target_width")
    size.add_argument(
        "--bucket",
        action="store_true",
        help="encode each image at the size nearest to its own aspect ratio, out of those of about --resolution² "
        "pixels with sides in steps of 64",
    )
    size.add_argument(
        "--aspect_limit",
        type=aspect_limit,
        metavar="A",
        help="largest ratio of the longer side to the shorter one, with --bucket; default: 2",
    )
    size.add_argument(
        "--flip", action="store_true", help="also encode the mirrored image; needed to train with --flip_p"
    )
    size.add_argument(
        "--crops",
        type=_CROPS,
        default=1,
        metavar="N",
        help="encode the centered crop and N - 1 at random places, of which each visit of training draws one; an "
        "image with the aspect ratio of its size has one",
    )


def check_image_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Sets args.width, args.height (those of the square with --bucket) and args.aspect_limit from the size options;
    exits with a usage error if options contradict each other."""
    if (args.target_width is None) != (args.target_height is None):
        parser.error("--target_width and --target_height go together; give both, or --resolution")
    if args.target_width is not None and args.resolution is not None:
        parser.error("give --resolution or --target_width and --target_height, not both")
    if args.target_width is not None:
        args.width, args.height = args.target_width, args.target_height
    else:
        args.width = args.height = 512 if args.resolution is None else args.resolution
    if args.aspect_limit is not None and not args.bucket:
        parser.error("--aspect_limit needs --bucket")
    if args.bucket and args.target_width is not None:
        parser.error("--bucket needs --resolution instead of --target_width and --target_height")
    args.aspect_limit = args.aspect_limit or 2.0
    if args.vae and args.custom:
        parser.error("--custom cannot be combined with --vae: a bare VAE has no pipeline code to run")
    return args


def text_parser(doc: str, kind: str, model: str | None) -> argparse.ArgumentParser:
    """Parser of a text cache script, without the options that only CLIP or only T5 has."""
    parser = _cache_parser(doc, kind, model, batch_size=32)
    parser.add_argument("--store_dtype", choices=("bf16", "fp32"), default="bf16", help="dtype of the stored tensors")
    _add_caption_arguments(parser.add_argument_group("captions; of several, each visit in training draws one"))
    return parser


def _add_caption_arguments(group):
    """Adds the options that `caption_settings` reads, with the names of its fields."""
    group.add_argument(
        "--captions",
        nargs="+",
        choices=("lines", "files"),
        default=(),
        help="lines: each line of a caption file that is not empty is a caption; files: all of a.txt, a.caption, "
        "a.long.txt and so on are captions of a.jpg; default: one caption, of the first of these files",
    )
    group.add_argument(
        "--shuffle_tags",
        type=cli.Number(int, 2, MAX_VARIANTS),
        metavar="N",
        help="N variants of each caption: itself, and N - 1 with its tags in another order",
    )
    group.add_argument(
        "--keep_tags", type=cli.count, metavar="K", help="the first K tags stay where they are; default: 0"
    )
    group.add_argument(
        "--drop_tags",
        type=cli.share,
        metavar="P",
        help="leave out each other tag of a shuffled variant with this probability; default: 0",
    )
    group.add_argument("--tag_separator", metavar="TEXT", help="what stands between tags; default: a comma")
    group.add_argument(
        "--tag_files",
        nargs="+",
        metavar="SUFFIX",
        help="shuffle only captions of these files, like .txt, where others hold sentences; default: all",
    )
    group.add_argument("--seed", type=cli.seed, metavar="N", help="random seed of the orders of tags; default: 0")
    group.add_argument("--prefix", default="", metavar="TEXT", help="put this before every caption")
    group.add_argument("--suffix", default="", metavar="TEXT", help="put this after every caption")


def caption_settings(args: argparse.Namespace) -> CaptionSettings:
    """Returns the settings of the captions that the command line names.

    Raises:
        ValueError: an option would have no effect.
    """
    names = ("keep_tags", "drop_tags", "tag_separator", "tag_files", "seed")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if given and not args.shuffle_tags:
        raise ValueError(f"--{next(iter(given))} needs --shuffle_tags")
    if given.get("tag_separator") == "":
        raise ValueError("--tag_separator is empty; give what stands between tags, like ,")
    given["tag_files"] = tuple(sorted({suffix.lower() for suffix in given.get("tag_files", ())}))
    captions = tuple(sorted(set(args.captions)))
    ends = {"prefix": args.prefix, "suffix": args.suffix}
    return PLAIN._replace(captions=captions, shuffle_tags=args.shuffle_tags or 1, **ends, **given)


def add_clip_length_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --max_length of the CLIP scripts; `clip_length` reads it."""
    parser.add_argument(
        "--max_length",
        choices=("77", "152", "227"),
        default="77",
        help="tokens kept of longer captions, first and last included; 152 and 227 encode two and three windows of "
        "75 tokens apart and join them",
    )


def clip_length(args: argparse.Namespace) -> dict[str, int]:
    """Returns --max_length as a setting for the header; {} for the 77 tokens that CLIP reads at once."""
    return {} if args.max_length == "77" else {"max_length": int(args.max_length)}


def _cache_parser(doc, kind, model, batch_size):
    parser = cli.parser(doc)
    add_data_root_argument(
        parser, " or, with --out, a directory or s3:// address of tars or parquet files", ", without --out"
    )
    parser.add_argument(
        "--out",
        type=set_address,
        metavar="DIR|URL",
        help="write a shard set instead of sidecars: a directory, or s3://, gs:// or az:// with a bucket and a path; "
        "--data_root then holds tars or parquet files of images and captions, 00000.tar and so on",
    )
    parser.add_argument(
        "--engine",
        choices=("ray",),
        help="with --out, have Ray make the shards, with a process for each GPU: on the cluster that RAY_ADDRESS "
        "names, else on this machine; default: make them in this process",
    )
    add_model_arguments(parser, "pipeline", batch_size, model)
    parser.add_argument(
        "--cache_suffix",
        type=partial(_suffix_of_kind, kind),
        default=sidecar.SUFFIXES[kind],
        help="suffix of the sidecars, which replaces the image's own",
    )
    parser.add_argument("--overwrite", action="store_true", help="make all sidecars again, even fresh and foreign")
    parser.add_argument(
        "--full",
        action="store_true",
        help="find stale and corrupt sidecars by hashing every source and every sidecar, instead of comparing sizes, "
        "times and headers",
    )
    return parser


def add_data_root_argument(parser: argparse.ArgumentParser, more: str = "", end: str = "") -> None:
    """Adds --data_root; `more` follows what the help says it is, and `end` ends the help."""
    parser.add_argument(
        "--data_root",
        action="append",
        required=True,
        metavar="DIR",
        help=f"folder of images, searched with all sub-folders{more}; can be given several times{end}",
    )


def add_model_arguments(
    parser: argparse.ArgumentParser, what: str, batch_size: int, default: str | None = None
) -> None:
    """Adds --model and what says how to run it."""
    parser.add_argument(
        "--model", default=default, required=default is None, help=f"{what}: directory or Hugging Face model id"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face model id")
    parser.add_argument(
        "--batch_size",
        type=cli.batch_size,
        default=batch_size,
        help="batch size of the model; a smaller one needs less memory",
    )
    cli.add_device_arguments(parser)


def add_vae_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model and --vae for a tool that decodes latents."""
    add_model_arguments(parser, "pipeline or bare VAE", batch_size=4)
    parser.add_argument("--vae", action="store_true", help="--model is a bare VAE instead of a pipeline")


def add_subset_arguments(parser: argparse.ArgumentParser, default: int | None, note: str = "") -> None:
    """Adds --num_images and --seed for a tool that can look at a random subset. `note` ends the help."""
    parser.add_argument(
        "--num_images",
        type=cli.count,
        default=default,
        metavar="N",
        help=f"look at this many, chosen at random; 0: all{note}",
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="random seed of that choice")


def set_address(text: str) -> str:
    """argparse type: where a shard set is to be written."""
    if not text:
        raise argparse.ArgumentTypeError("no directory given for the shard set")
    if match := re.match("(s3|gs|az|file):/(?!/)", text):
        raise argparse.ArgumentTypeError(f"{text!r}: did you mean {match[1]}://{text[match.end() :]}?")
    return text


def cache_suffix(text: str) -> str:
    """argparse type: a suffix of sidecars."""
    last = text[text.rfind(".") :].lower()
    if not text.strip("./") or text[0] != "." or "/" in text or last in IMAGE_SUFFIXES.union(CAPTION_SUFFIXES):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a suffix like .img_sdxl that no images or captions have"
        )
    return text


def _suffix_of_kind(kind, text):
    """`cache_suffix`, unless sidecars of captions have it by default and `kind` is one of images, or vice versa."""
    others = [suffix for other, suffix in sidecar.SUFFIXES.items() if other[:3] != kind[:3]]
    if text in others:
        raise argparse.ArgumentTypeError(f"{text!r}: is the suffix of other caches, which would be replaced")
    return cache_suffix(text)
