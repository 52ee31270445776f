#!/usr/bin/env python3
"""Encodes captions with T5 and the projection to the UNet's width: `a.jpg` and `a.txt` -> `a.txt_t5cache`.

    cache/create_t5cache_768.py --model models/t5_sd --data_root ~/photos

The model is a pipeline directory made by models/compose_t5_sd.py. Embeddings [T, 768] are tight: no padding is
stored, T5's closing </s> is. A caption is `a.txt`, else `a.caption`, else the image's file name up to its first
underscore. The embedding of the empty caption goes to `_null_caption.txt_t5cache` in each data root. What is fresh
already is skipped. The exit code is 1 if some caption could not be read (each is named), 2 on any other error.
"""

try:
    from cachetrain import cli
    from cachetrain.caching import arguments
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None


def parse_args(argv=None):
    parser = arguments.text_parser(__doc__, "txt_t5cache", None)
    parser.add_argument(
        "--max_length", type=arguments.positive_int, metavar="N", help="tokens kept, </s> included. Default: 256"
    )
    parser.add_argument("--raw", action="store_true", help="keep T5's own width: no projection")
    parser.add_argument(
        "--custom",
        action="store_true",
        help="encode by the pipeline code in the model's own repository: RUNS that code",
    )
    args = parser.parse_args(argv)
    if args.custom and (args.raw or args.max_length):
        parser.error("--custom leaves length and projection to the repository's code: drop --max_length and --raw")
    if args.custom and args.batch_size != parser.get_default("batch_size"):
        parser.error("--custom encodes one caption at a time: drop --batch_size")
    return args


def main(argv=None):
    args = parse_args(argv)
    from cachetrain.caching.text_run import cache_captions

    if args.custom:
        return cache_captions(args, "txt_t5cache", {"custom": True}, custom=True)
    components = ["text_encoder", "tokenizer", *([] if args.raw else ["projection"])]
    return cache_captions(args, "txt_t5cache", {"max_length": args.max_length or 256, "raw": args.raw}, components)


if __name__ == "__main__":
    cli.run(main)
