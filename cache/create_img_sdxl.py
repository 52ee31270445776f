#!/usr/bin/env python3
"""Encodes images with SDXL's VAE: `a.jpg` -> `a.img_sdxl` beside it. What is fresh already is skipped.

    cache/create_img_sdxl.py --data_root ~/photos --resolution 512

The exit code is 1 if some image could not be read (each is named), 2 on any other error.
"""

try:
    from cachetrain import cli
    from cachetrain.caching import arguments
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None


def parse_args(argv=None):
    parser = arguments.image_parser(__doc__, "img_sdxl", "stabilityai/stable-diffusion-xl-base-1.0")
    return arguments.check_image_args(parser, parser.parse_args(argv))


def main(argv=None):
    args = parse_args(argv)
    from cachetrain.caching.image_run import cache_images

    return cache_images(args, "img_sdxl")


if __name__ == "__main__":
    cli.run(main)
