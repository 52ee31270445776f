"""Shows what a VAE does to images, before anything is cached with it: image -> encode -> decode -> PSNR and picture.

    cache/validate_vae.py --model models/t5_sd15 img1.jpg img2.png photos/ --out validated.png

The picture has a row per image: source, decoded, difference. To compare two VAEs, run it once with each on the same
images. The exit code is 1 if some image could not be read (each is named), 2 on any other error.
"""

import os
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

from cachetrain import cli, outputs
from cachetrain.caching import arguments
from cachetrain.caching.inspect import previews
from cachetrain.caching.messages import say
from cachetrain.data import many_files, walk
from cachetrain.modeling.vae import latent_channels

_MAX_ROWS = 16


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image, or folder searched with all sub-folders")
    arguments.add_vae_arguments(parser)
    arguments.add_subset_arguments(parser, 100)
    parser.add_argument(
        "--resolution",
        type=arguments.resolution,
        metavar="N",
        help="side in pixels of the center square that is encoded; smaller images are enlarged to it; default: 512, "
        "or less for a smaller image, which is not enlarged",
    )
    parser.add_argument(
        "--out", type=outputs.sheet, metavar="FILE", help=f"write a PNG of the first {_MAX_ROWS} images"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from cachetrain.caching.encoders import check_vae

    fail = previews.Failures()
    paths = many_files.random_subset(find_images(args.paths, fail), args.num_images, args.seed)
    decoder = previews.Decoder(args, fail)
    side = args.resolution or 512
    check_vae(decoder.vae, [(side, side)])
    values, shown = [], []
    say(f"{'PSNR':>7}  image")
    for comparison in round_trips(decoder, paths, side, enlarge=args.resolution is not None):
        smaller = f"  ({len(comparison.source)}x{len(comparison.source)})" * (len(comparison.source) < side)
        say(f"{comparison.psnr:7.2f}  {comparison.name}{smaller}")
        values.append(comparison.psnr)
        if len(shown) < _MAX_ROWS:
            shown.append(comparison)
    vae = f"{type(decoder.vae).__name__} of {args.model}, {latent_channels(decoder.vae)} channels"
    say(f"{previews.psnr_summary(values)} at {side}x{side}, {vae}")
    if args.out and shown:
        outputs.save_sheet(previews.comparison_sheet(shown, max_side=side), args.out, model=args.model)
        say(args.out)
    return 1 if fail.count else 0


def find_images(paths: list[str], fail: previews.Failures) -> list[str]:
    """Returns the image files named, and all under the folders named."""
    found = []
    for path in paths:
        found += [pair.image for pair in walk.find_images([path], fail)] if os.path.isdir(path) else [path]
    if not found:
        raise ValueError(f"no images under {', '.join(paths)}")
    return list(dict.fromkeys(found))


def round_trips(
    decoder: previews.Decoder, paths: list[str], side: int, enlarge: bool
) -> Iterator[previews.Comparison]:
    """Yields a Comparison per image that can be read. `side`, `enlarge`: see previews.square_pixels."""
    for start in range(0, len(paths), decoder.batch_size):
        by_side = {}
        for path in paths[start : start + decoder.batch_size]:
            try:
                pixels = previews.square_pixels(path, side, enlarge)
            except (OSError, ValueError) as error:
                decoder.fail(path, error)
            else:
                by_side.setdefault(len(pixels), {})[path] = pixels
        for sources in by_side.values():
            latents = map(previews.Latent, sources, decoder.encode(list(sources.values())))
            for latent, pixels in decoder.pictures(latents):
                yield previews.compare(latent.path, sources[latent.path], pixels)


run = partial(cli.run, main)  # the console script
