#!/usr/bin/env -S python3 -P
"""Lists the pairs that --val_split of the trainer would hold out, one name per line, before training.

    dataset_scripts/list_split.py --train_data_dir /data --val_split 0.05 > held_out.list

The names go to stdout, the counts to stderr. Give the directories and suffixes that training gets.
"""

import sys

try:
    from cachetrain import cli
    from cachetrain.data.sidecar import SUFFIXES
    from cachetrain.log import counted, printable
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--train_data_dir", nargs="+", required=True, metavar="DIR", help="directories with caches")
    parser.add_argument(
        "--val_split",
        type=cli.Number(float, 0, 1, exclude=(0, 1)),
        required=True,
        metavar="SHARE",
        help="about how large a part of the pairs is held out",
    )
    parser.add_argument(
        "--imgcache_suffix",
        nargs="+",
        default=[SUFFIXES["img_sdxl"]],
        metavar="SUFFIX",
        help="suffix of the cached images; several as in training",
    )
    parser.add_argument("--txtcache_suffix", default=SUFFIXES["txt_t5cache"], help="suffix of the cached captions")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from cachetrain.data.index import PairIndex
    from cachetrain.data.split import split_index

    index = PairIndex(args.train_data_dir, args.imgcache_suffix, args.txtcache_suffix)
    training, validation = split_index(index, args.val_split)
    for i in range(0, len(validation), validation.sizes):
        print(printable(validation.stem(i)))
    held_out, trained = validation.num_pairs, training.num_pairs
    print(f"{held_out:,} of {counted(index.num_pairs, 'pair')} held out, {trained:,} trained on", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
