"""Checks an image cache against its images: decodes latents and measures how far they are from the sources (PSNR).

    cache/validate_img_cache.py --model models/t5_sd15 --data_root photos --num_images 200 --min_psnr 25

Each source is resized and cropped again as the header of its sidecar says (a foreign sidecar has no header: then to
the size it decodes to). A wrong VAE, a shifted crop, a rotation or the latent of another image give a low PSNR; which
values are normal depends on VAE and images, and `cache/validate_vae.py` measures them. The exit code is 1 if some
image is below --min_psnr or could not be compared (each is named), 2 on any other error.
"""

import os
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import numpy as np

from cachetrain import cli, outputs
from cachetrain.caching import arguments
from cachetrain.caching.inspect import previews, rows
from cachetrain.caching.messages import say
from cachetrain.data import many_files, walk
from cachetrain.data.sidecar import sidecar_path
from cachetrain.log import counted

_NUM_WORST = 10
_SHEET_SIDE = 512


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = cli.parser(__doc__)
    arguments.add_vae_arguments(parser)
    arguments.add_data_root_argument(parser)
    parser.add_argument(
        "--cache_suffix",
        metavar="SUFFIX",
        help="suffix of the sidecars; default: all that begin with .img_",
    )
    parser.add_argument(
        "--shards",
        nargs="+",
        metavar="PATH",
        help="take the sidecars from these rows (00012-5be2c0d1.tar#a), shards or sets, not from beside the images",
    )
    arguments.add_subset_arguments(parser, 100)
    parser.add_argument(
        "--min_psnr",
        type=cli.not_negative,
        metavar="DB",
        help="lowest PSNR in dB that is accepted; below it the exit code is 1",
    )
    parser.add_argument(
        "--sheet",
        type=outputs.sheet,
        metavar="FILE",
        help=f"write a PNG of the {_NUM_WORST} worst: source, decoded, difference",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from tqdm import tqdm

    fail = previews.Failures()
    cached = find_cached(args, fail)
    chosen = dict(many_files.random_subset(cached, args.num_images, args.seed))
    measured, stale, worst = [], [], []
    compared = comparisons(previews.Decoder(args, fail), chosen, stale)
    for comparison in tqdm(compared, total=len(chosen), desc="comparing", unit="image", disable=None):
        measured.append((comparison.psnr, comparison.name))
        worst = sorted([*worst, comparison], key=lambda one: one.psnr)[:_NUM_WORST]
    num_low = print_table(sorted(measured), stale, args.min_psnr)
    summary = previews.psnr_summary([value for value, _ in measured])
    say(f"{summary} of {len(cached)} cached, {len(stale)} stale, {fail.count} failed")
    if args.sheet and worst:
        outputs.save_sheet(previews.comparison_sheet(worst, _SHEET_SIDE), args.sheet, model=args.model)
        say(args.sheet)
    return 1 if num_low or fail.count or not measured else 0


def find_cached(args: Namespace, fail: previews.Failures) -> list[tuple[str, str]]:
    """Returns a list of (sidecar, its image)."""
    suffixes = previews.image_cache_suffixes(args.shards or args.data_root, args.cache_suffix)
    if args.shards:
        return find_in_shards(args, suffixes, fail)
    candidates = (
        (str(sidecar_path(pair.image, suffix)), pair.image)
        for pair in walk.find_images(args.data_root, fail)
        for suffix in suffixes
    )
    cached = [candidate for candidate in candidates if os.path.exists(candidate[0])]
    if not cached:
        raise ValueError(
            f"no images with {' or '.join(suffixes)} under {', '.join(args.data_root)}; "
            "run an image cache script first"
        )
    return cached


def find_in_shards(args: Namespace, suffixes: list[str], fail: previews.Failures) -> list[tuple[str, str]]:
    """Returns a list of (row of args.shards, its image), by their names."""
    images = {
        os.path.relpath(os.path.splitext(pair.image)[0], root): pair.image
        for root in args.data_root
        for pair in walk.find_images([root], fail)
    }
    found = [(row, images.get(rows.name_of(row))) for row in rows.find_sidecars(args.shards, suffixes)]
    if not any(image for _, image in found):
        raise ValueError(
            f"no images of the {counted(len(found), 'row')} of {', '.join(args.shards)} under "
            f"{', '.join(args.data_root)}; extract the tars of the images there"
        )
    return [(row, image) for row, image in found if image]


def comparisons(decoder: previews.Decoder, images: dict[str, str], stale: list[str]) -> Iterator[previews.Comparison]:
    """Yields a Comparison per sidecar.

    Args:
        images: sidecar -> its image.
        stale: list to which sidecars are appended whose image has changed since; they are not compared.
    """
    for latent, pixels in decoder.pictures(decoder.read(images)):
        try:
            source = source_of(latent, images[latent.path], pixels)
        except (OSError, ValueError) as error:
            decoder.fail(latent.path, error)
            continue
        if source is None:
            stale.append(latent.path)
        else:
            yield previews.compare(latent.path, source, pixels)


def source_of(latent: previews.Latent, image: str, pixels: np.ndarray) -> np.ndarray | None:
    """Returns the pixels that were encoded, uint8 like `pixels`, or None if the image has changed since.

    Raises:
        ValueError: the latent decodes to another size than was encoded, or the image cannot be read.
        OSError: the image cannot be read.
    """
    height, width = pixels.shape[:2]
    metadata = latent.header.metadata  # {} for a foreign sidecar: then only its size is known
    encoded_size = int(metadata.get("width", width)), int(metadata.get("height", height))
    if encoded_size != (width, height):
        raise ValueError(
            f"decodes to {width}x{height} pixels, was made from {encoded_size[0]}x{encoded_size[1]}; "
            f"pass the VAE that made it as --model ({metadata.get('model')})"
        )
    return previews.source_pixels(image, width, height, metadata.get("source_sha256"))


def print_table(measured: list[tuple[float, str]], stale: list[str], min_psnr: float | None) -> int:
    """Prints the stale sidecars, and the worst or all that are too low as a table; returns how many are too low.

    Args:
        measured: (PSNR in dB, sidecar), ascending.
    """
    for path in stale:
        say(f"{path}: stale, its image has changed; run the cache script again")
    num_low = 0 if min_psnr is None else sum(value < min_psnr for value, _ in measured)
    say(f"{'PSNR':>7}  the worst")
    for value, path in measured[: max(_NUM_WORST, num_low)]:
        say(f"{value:7.2f}  {path}")
    if num_low:
        say(
            f"{num_low} of {len(measured)} below {min_psnr:g} dB. If all of them are, --model has another VAE "
            "than the one that made the cache, or a poor one (cache/validate_vae.py shows). If some are, delete "
            "these sidecars and run the cache script again"
        )
    return num_low


run = partial(cli.run, main)  # the console script
