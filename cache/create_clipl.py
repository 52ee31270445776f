#!/usr/bin/env python3
"""Encodes captions with CLIP: `a.jpg` and `a.txt` -> `a.txt_clipl`, all 77 tokens. What is fresh already is skipped.

    cache/create_clipl.py --data_root ~/photos --clip_skip 2

A caption is `a.txt`, else `a.caption`, else the image's file name up to its first underscore. The embedding of the
empty caption goes to `_null_caption.txt_clipl` in each data root. The exit code is 1 if some caption could not be
read (each is named), 2 on any other error.
"""

try:
    from cachetrain import cli
    from cachetrain.caching import arguments
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None


def parse_args(argv=None):
    parser = arguments.text_parser(__doc__, "txt_clipl", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument(
        "--clip_skip",
        type=int,
        choices=range(5),
        default=0,
        help="0: last hidden state; N: final norm of the N-th last layer (1 equals 0)",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from cachetrain.caching.text_run import cache_captions

    return cache_captions(args, "txt_clipl", {"clip_skip": args.clip_skip})


if __name__ == "__main__":
    cli.run(main)
