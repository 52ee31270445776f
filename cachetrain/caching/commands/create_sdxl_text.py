"""Encodes captions with SDXL's two CLIP encoders: `a.jpg` and `a.txt` -> `a.txt_sdxl`. Fresh sidecars are skipped.

    cache/create_sdxl_text.py --data_root ~/photos

A sidecar holds `emb` [77, 2048], the second-last hidden states of CLIP ViT-L and OpenCLIP bigG, and `pooled` [1280],
the projected output of bigG. The empty caption becomes zeros if the model's force_zeros_for_empty_prompt says so, and
is also written to `_null_caption.txt_sdxl` in each data root. The caption of `a.jpg` is `a.txt`, else `a.caption`,
else the file name up to its first underscore. The exit code is 1 if some caption could not be read (each is named),
2 on any other error.
"""

from argparse import Namespace
from functools import partial

from cachetrain import cli
from cachetrain.caching import arguments


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = arguments.text_parser(__doc__, "txt_sdxl", "stabilityai/stable-diffusion-xl-base-1.0")
    arguments.add_clip_length_argument(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from cachetrain.caching.text_run import cache_captions

    return cache_captions(args, "txt_sdxl", arguments.clip_length(args))


run = partial(cli.run, main)  # the console script
