#!/usr/bin/env -S python3 -P
"""Removes, renames, sorts and adds tags in all captions of a folder, and shows what changes.

    dataset_scripts/edit_tags.py --data_root /data --remove watermark --rename "1girl" "a girl" --dedup --dry_run

The options apply in the order remove, rename, dedup, sort, first, last. Each caption file that is replaced is
kept as a.txt.bak; where that has other content already, as a.txt.bak2, and so on.
The exit code is 1 if some caption could not be read or written (each is named), 2 on any other error.
"""

import os
import sys
from collections import Counter
from contextlib import suppress
from itertools import count

try:
    from tqdm import tqdm

    from cachetrain import cli
    from cachetrain.atomic import atomic_write
    from cachetrain.curation.captions import add_captions_option, read_all
    from cachetrain.curation.messages import print_failures
    from cachetrain.curation.tags import TagEdit
    from cachetrain.log import describe, printable
    from cachetrain.reading import read_bytes
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--data_root", required=True, metavar="DIR", help="folder of images, with all subfolders")
    add_captions_option(parser)
    parser.add_argument("--remove", nargs="+", default=[], metavar="TAG", help="tags to remove")
    parser.add_argument(
        "--rename", nargs=2, action="append", default=[], metavar=("OLD", "NEW"), help="rename a tag; can be repeated"
    )
    parser.add_argument("--dedup", action="store_true", help="keep only the first of equal tags")
    parser.add_argument("--sort", action="store_true", help="sort the tags by the alphabet")
    parser.add_argument("--first", nargs="+", default=[], metavar="TAG", help="put these tags at the beginning")
    parser.add_argument("--last", nargs="+", default=[], metavar="TAG", help="put these tags at the end")
    parser.add_argument(
        "--regex", action="store_true", help="the tags of --remove and OLD are regular expressions for whole tags"
    )
    parser.add_argument("--tag_separator", default=",", metavar="TEXT", help="what stands between two tags")
    parser.add_argument("--no_backup", action="store_true", help="keep no .bak of the files that are replaced")
    parser.add_argument("--top", type=cli.count, default=20, metavar="N", help="show this many changed captions")
    parser.add_argument("--dry_run", action="store_true", help="write nothing, only show what would change")
    args = parser.parse_args(argv)
    if not (args.remove or args.rename or args.dedup or args.sort or args.first or args.last):
        parser.error("nothing to do; give --remove, --rename, --dedup, --sort, --first or --last")
    if not args.tag_separator.strip():
        parser.error("--tag_separator: expected some text that is not white space")
    return args


def main(argv=None):
    args = parse_args(argv)
    fields = {name: getattr(args, name) for name in ("remove", "rename", "dedup", "sort", "first", "last", "regex")}
    edit = TagEdit(**fields, separator=args.tag_separator).function()
    counts, failures = Counter(), []
    for pair, text in tqdm(read_all(args.data_root, failures, args.captions), unit="caption", disable=None):
        new = edit(text)
        if pair.caption_file is None:
            counts["in file names, not edited"] += 1
        elif new == text:
            counts["unchanged"] += 1
        else:
            if counts["changed"] < args.top:
                tqdm.write(f"{printable(pair.caption_file)}\n- {printable(text)}\n+ {printable(new)}")
            try:
                if not args.dry_run:
                    replace(pair.caption_file, new, not args.no_backup)
                counts["changed"] += 1
            except OSError as error:
                failures.append(describe(error))
    print_failures(failures)
    parts = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())
    print(f"captions: {parts}, {len(failures):,} failed{' (dry run)' if args.dry_run else ''}")
    return 1 if failures else 0


def replace(path, text, backup):
    """Writes a caption file with the permissions that it has; with `backup`, what it held stays in a .bak."""
    mode = os.stat(path).st_mode
    if backup:
        keep(path, read_bytes(path), mode)
    atomic_write(path, f"{text}\n".encode(), mode)


def keep(path, data, mode):
    """Writes the content of a file to the first free name of .bak, .bak2, .bak3 ..., unless one of them has it."""
    for number in count(1):
        name = f"{path}.bak{number if number > 1 else ''}"
        if not os.path.lexists(name):
            return atomic_write(name, data, mode)
        with suppress(OSError):  # a directory, for example; of a link, the content may change
            if not os.path.islink(name) and read_bytes(name) == data:
                return None


if __name__ == "__main__":
    cli.run(main)
