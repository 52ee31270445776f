"""Encodes images with SDXL's VAE: `a.jpg` -> `a.img_sdxl` beside it. Fresh sidecars are skipped.

    cache/create_img_sdxl.py --data_root ~/photos --resolution 512

The exit code is 1 if some image could not be read (each is named), 2 on any other error.
"""

from argparse import Namespace
from functools import partial

from cachetrain import cli
from cachetrain.caching import arguments


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = arguments.image_parser(__doc__, "img_sdxl", "stabilityai/stable-diffusion-xl-base-1.0")
    return arguments.check_image_args(parser, parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from cachetrain.caching.image_run import cache_images

    return cache_images(args, "img_sdxl")


run = partial(cli.run, main)  # the console script
