#!/usr/bin/env -S python3 -P
"""Shows two captions of each image side by side, as a page: those of one folder and those of another.

    dataset_scripts/compare_captions.py /data /data_recaptioned --out captions.html

Images come from the first folder; captions are matched by relative path. The exit code is 1 if some caption could not
be read (each is named), 2 on any other error.
"""

import os
import sys
from collections import Counter

try:
    from tqdm import tqdm

    from cachetrain import cli, outputs
    from cachetrain.curation.captions import read_all
    from cachetrain.curation.messages import print_failures
    from cachetrain.curation.page import MAX_ITEMS, Item, Section, write_page
    from cachetrain.data.captions import Pair, caption_file, read_caption
    from cachetrain.log import describe
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("first", metavar="DIR", help="folder of images and captions")
    parser.add_argument("second", metavar="OTHER", help="folder of the other captions, with or without images")
    parser.add_argument("--out", type=outputs.page, default="captions.html", metavar="FILE", help="page to write")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from cachetrain.curation.pictures import thumbnail_of

    if not os.path.isdir(args.second):
        raise ValueError(f"{args.second}: no such directory")
    failures, counts, different = [], Counter(), []
    for pair, text in tqdm(read_all(args.first, failures), unit="caption", disable=None):
        name = os.path.relpath(pair.image, args.first)
        stem = os.path.join(args.second, os.path.splitext(name)[0])
        path = caption_file(stem)
        try:
            other = None if path is None else read_caption(Pair(stem, path)).text
        except (OSError, ValueError) as error:
            failures.append(describe(error))
            continue
        outcome = "missing in the second" if other is None else "equal" if text == other else "different"
        counts[outcome] += 1
        if outcome == "different":
            image = thumbnail_of(pair.image) if len(different) < MAX_ITEMS else None
            different.append(Item(name, (text, other), image=image))
    note = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())
    sections = [Section("Different captions", note, different, (args.first, args.second))]
    write_page(args.out, f"{args.first} and {args.second}", sections)
    print_failures(failures)
    print(f"{args.out}: {note}, {len(failures):,} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    cli.run(main)
