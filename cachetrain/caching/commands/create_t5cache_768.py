"""Encodes captions with T5 and the projection to the UNet's width: `a.jpg` and `a.txt` -> `a.txt_t5cache`.

    cache/create_t5cache_768.py --model models/t5_sd --data_root ~/photos

The model is a pipeline directory made by models/compose_t5_sd.py. Embeddings [T, 768] include T5's closing </s> and
no padding. The caption of `a.jpg` is `a.txt`, else `a.caption`, else the file name up to its first underscore. The
embedding of the empty caption is written to `_null_caption.txt_t5cache` in each data root. Fresh sidecars are
skipped. The exit code is 1 if some caption could not be read (each is named), 2 on any other error.
"""

from argparse import Namespace
from functools import partial

from cachetrain import cli
from cachetrain.caching import arguments


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = arguments.text_parser(__doc__, "txt_t5cache", None)
    parser.add_argument(
        "--max_length",
        type=cli.Number(int, 1, 4096),
        metavar="N",
        help="tokens kept of longer captions, </s> included; default: 256",
    )
    parser.add_argument("--raw", action="store_true", help="store T5's own width, without the projection")
    parser.add_argument(
        "--custom",
        action="store_true",
        help="encode with the pipeline code in the model's repository; this RUNS that code",
    )
    args = parser.parse_args(argv)
    if args.custom and (args.raw or args.max_length):
        parser.error(
            "--custom cannot be combined with --max_length or --raw: the repository's code decides both; omit them"
        )
    if args.custom and args.batch_size != parser.get_default("batch_size"):
        parser.error("--custom cannot be combined with --batch_size: it encodes one caption at a time; omit it")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from cachetrain.caching.text_run import cache_captions

    if args.custom:
        return cache_captions(args, "txt_t5cache", {"custom": True})
    return cache_captions(args, "txt_t5cache", {"max_length": args.max_length or 256, "raw": args.raw})


run = partial(cli.run, main)  # the console script
