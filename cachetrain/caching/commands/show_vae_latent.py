"""Shows what image sidecars hold: decodes each latent to a picture, or all of them to a contact sheet.

    cache/show_vae_latent.py --model models/t5_sd15 photos/ --out previews
    cache/show_vae_latent.py --model models/t5_sd15 photos/ --sheet previews.png

Pictures in --out keep the sub-folders and the names of their sidecars: `sub/a.img_sdxl.png`. The exit code is 1 if
some sidecar could not be decoded (each is named), 2 on any other error.
"""

import math
import os
from argparse import Namespace
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from cachetrain import cli, outputs
from cachetrain.caching import arguments
from cachetrain.caching.inspect import previews, rows
from cachetrain.caching.inspect.statistics import PATH_HELP
from cachetrain.caching.messages import say
from cachetrain.data import many_files
from cachetrain.data.objects import is_url
from cachetrain.log import counted

_SHEET_IMAGES = 36
_SHEET_SIDE = 256


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help=PATH_HELP)
    arguments.add_vae_arguments(parser)
    parser.add_argument(
        "--cache_suffix",
        metavar="SUFFIX",
        help="suffix of the sidecars in folders; default: all that begin with .img_",
    )
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--out", type=Path, metavar="DIR", help="write a PNG per sidecar into this folder")
    output.add_argument("--sheet", type=outputs.sheet, metavar="FILE", help="write one PNG with all pictures")
    arguments.add_subset_arguments(parser, None, f"; default: {_SHEET_IMAGES} with --sheet, all with --out")
    parser.add_argument(
        "--flip", action="store_true", help="show the latent of the mirrored image (latent_flip) instead"
    )
    args = parser.parse_args(argv)
    if args.num_images is None:
        args.num_images = _SHEET_IMAGES if args.sheet else 0
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from tqdm import tqdm

    suffixes = previews.image_cache_suffixes(args.paths, args.cache_suffix)
    # By absolute path, because a sidecar may be named beside its folder.
    found = list({os.path.abspath(path): path for path in rows.find_sidecars(args.paths, suffixes)}.values())
    if not found:
        raise ValueError(f"no {' or '.join(suffixes)} under {', '.join(args.paths)}; run an image cache script first")
    paths = many_files.random_subset(found, args.num_images, args.seed)
    names = preview_names(args, paths)
    fail = previews.Failures()
    decoder = previews.Decoder(args, fail)
    latents = decoder.read(paths, "latent_flip" if args.flip else "latent")
    decoded = tqdm(decoder.pictures(latents), total=len(paths), desc="decoding", unit="image", disable=None)
    if args.sheet:
        num_written = write_sheet(args.sheet, {latent.path: pixels for latent, pixels in decoded}, names)
    else:
        num_written = write_previews(args, decoded, names)
    failed = f", {fail.count} failed" if fail.count else ""
    say(f"{num_written} of {counted(len(found), 'latent')} decoded{failed}: {args.sheet or args.out}")
    return 1 if fail.count else 0


def preview_names(args: Namespace, paths: Iterable[str]) -> dict[str, str]:
    """Returns path -> its path relative to the deepest folder that holds all of args.paths, which is unique; the rows
    of a shard have their own."""
    folders = [path if is_tree(path) else os.path.dirname(rows.as_path(path)) for path in args.paths]
    base = os.path.commonpath([os.path.abspath(rows.as_path(path)) for path in folders])
    return {path: os.path.relpath(rows.as_path(path), base) for path in paths}


def is_tree(path: str) -> bool:
    """Whether a path is that of a folder, or of something with rows."""
    return os.path.isdir(path) or rows.is_shard(path) or (is_url(path) and not rows.is_row(path))


def write_previews(args: Namespace, decoded: Iterable, names: dict[str, str]) -> int:
    """Writes one picture per sidecar and returns their number."""
    from PIL import Image

    num_written = 0
    for latent, pixels in decoded:
        path = args.out / f"{names[latent.path]}{'.flip' if args.flip else ''}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        num_written += 1
    return num_written


def write_sheet(path: Path, pictures: dict, names: dict[str, str]) -> int:
    """Writes the pictures, by path, as one labelled sheet in the order of `names`; returns their number."""
    shown = [name for name in names if name in pictures]
    if shown:
        labels = [f"{names[name]} {pictures[name].shape[1]}x{pictures[name].shape[0]}" for name in shown]
        columns = math.ceil(math.sqrt(len(shown)))
        sheet = previews.contact_sheet([pictures[name] for name in shown], labels, columns, _SHEET_SIDE)
        outputs.save_sheet(sheet, path)
    return len(shown)


run = partial(cli.run, main)  # the console script
