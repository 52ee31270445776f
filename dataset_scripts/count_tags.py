#!/usr/bin/env -S python3 -P
"""Counts the tags or words of all captions, as a table, a CSV file or a page with bars.

    dataset_scripts/count_tags.py --data_root /data --html tags.html

The exit code is 1 if some caption could not be read (each is named), 2 on any other error.
"""

import csv
import io
import os
import sys
from collections import Counter, defaultdict

try:
    from tqdm import tqdm

    from cachetrain import cli, outputs
    from cachetrain.atomic import atomic_write
    from cachetrain.curation.captions import add_captions_option, read_all
    from cachetrain.curation.messages import print_failures
    from cachetrain.curation.page import Item, Section, write_page
    from cachetrain.curation.tags import count_tags
    from cachetrain.log import counted, printable
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--data_root", required=True, metavar="DIR", help="folder of images, with all subfolders")
    add_captions_option(parser)
    parser.add_argument("--tag_separator", default=",", metavar="TEXT", help="what stands between two tags")
    parser.add_argument("--words", action="store_true", help="count words instead of tags, in lower case")
    parser.add_argument("--per_folder", action="store_true", help="count each folder for itself")
    parser.add_argument("--top", type=cli.positive_int, default=50, metavar="N", help="length of the table")
    parser.add_argument(
        "--csv",
        type=outputs.counts,
        metavar="FILE",
        help="write all counts as a table, with a ' before tags that a spreadsheet would take for formulas",
    )
    parser.add_argument("--html", type=outputs.page, metavar="FILE", help="write a page with bars")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    failures, counts, num_captions = [], defaultdict(Counter), Counter()
    separator = None if args.words else args.tag_separator
    for pair, text in tqdm(read_all(args.data_root, failures, args.captions), unit="caption", disable=None):
        folder = os.path.relpath(os.path.dirname(pair.image), args.data_root) if args.per_folder else "all folders"
        counts[folder].update(count_tags(text, separator))
        num_captions[folder] += 1
    for folder, tags in counts.items():
        unit = "word" if args.words else "tag"
        print(f"{printable(folder)}: {counted(num_captions[folder], 'caption')}, {counted(tags.total(), unit)}")
        for tag, count in tags.most_common(args.top):
            print(f"{count:9,}  {printable(tag)}")
    if args.csv:
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["folder", "tag", "count"])
        for folder, tags in counts.items():
            writer.writerows([cell(folder), cell(tag), count] for tag, count in tags.most_common())
        atomic_write(args.csv, table.getvalue().encode())
    if args.html:
        write_page(args.html, f"Tags of {args.data_root}", [section(*entry) for entry in counts.items()])
    print_failures(failures)
    print(f"{counted(num_captions.total(), 'caption')}, {len(failures):,} failed")
    return 1 if failures else 0


def cell(text):
    """A text for spreadsheets: a line of printable characters, and never a formula, which could run a program."""
    return printable(f"'{text}" if text.startswith(("=", "+", "-", "@")) else text)


def section(folder, tags):
    most = max(tags.values(), default=1)
    items = [Item(tag, value=f"{count:,}", share=count / most) for tag, count in tags.most_common()]
    return Section(folder, f"{tags.total():,} in all, {len(tags):,} different", items)


if __name__ == "__main__":
    cli.run(main)
