"""Encodes captions with CLIP: `a.jpg` and `a.txt` -> `a.txt_clipl`, 77 tokens. Fresh sidecars are skipped.

    cache/create_clipl.py --data_root ~/photos --clip_skip 2

The caption of `a.jpg` is `a.txt`, else `a.caption`, else the file name up to its first underscore. The embedding of
the empty caption is written to `_null_caption.txt_clipl` in each data root. The exit code is 1 if some caption could
not be read (each is named), 2 on any other error.
"""

from argparse import Namespace
from functools import partial

from cachetrain import cli
from cachetrain.caching import arguments


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = arguments.text_parser(__doc__, "txt_clipl", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument(
        "--clip_skip",
        type=cli.Number(int, 0, 4),
        metavar="N",
        default=0,
        help="0: the last hidden state; N: the N-th last layer, normalized (1 is the same as 0)",
    )
    arguments.add_clip_length_argument(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from cachetrain.caching.text_run import cache_captions

    return cache_captions(args, "txt_clipl", {"clip_skip": args.clip_skip} | arguments.clip_length(args))


run = partial(cli.run, main)  # the console script
