#!/usr/bin/env -S python3 -P
"""Writes the captions in lists to a .txt beside each image.

Reads metadata.jsonl, .csv and .parquet (Hugging Face), meta_cap.json and meta_lat.json (kohya), and the .json beside
each image (img2dataset).

    dataset_scripts/import_captions.py /data/pokemon --dry_run
    dataset_scripts/import_captions.py /data/pokemon/metadata.csv --caption_key caption

Existing captions are kept unless --overwrite is given. Each row is accounted for in the last line. The exit code is 1
if some row left its image without a caption of the list, 2 on any other error.
"""

import os
import sys
from collections import Counter

try:
    from tqdm import tqdm

    from cachetrain import cli
    from cachetrain.curation.lists import caption_key, find_lists, read_rows
    from cachetrain.curation.messages import print_failures
    from cachetrain.curation.twins import LOST, Importer
    from cachetrain.log import counted, describe
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("list", metavar="LIST", help="list of captions, or a folder that is searched for lists")
    parser.add_argument(
        "--data_root",
        metavar="DIR",
        help="folder to which the names in the list are relative; default: the folder of each list",
    )
    parser.add_argument(
        "--caption_key",
        type=caption_key,
        metavar="KEY",
        help="column or key of the captions; default: text, or caption in .json",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace captions that exist")
    parser.add_argument("--dry_run", action="store_true", help="write nothing, only say what would be written")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    failures, importers, num_lists = [], {}, 0
    for path in find_lists(args.list, lambda *error: failures.append(": ".join(error))):
        num_lists += 1
        root = args.data_root or os.path.dirname(os.path.abspath(path))
        importer = importers.setdefault(root, Importer(root, args.overwrite, args.dry_run))
        try:
            for row in tqdm(read_rows(path, args.caption_key), desc=os.path.basename(path), unit="row", disable=None):
                outcome, detail = importer.add(row)
                if outcome in LOST:
                    failures.append(f"{row.where}: {outcome} ({detail})")
        except (OSError, ValueError) as error:  # the other lists are read all the same
            failures.append(describe(error))
    if not num_lists:
        raise ValueError(f"{args.list}: holds no metadata.jsonl, .csv or .parquet, and no .json of captions")
    print_failures(failures)
    counts = sum((importer.counts for importer in importers.values()), Counter())
    parts = "".join(f", {count:,} {outcome}" for outcome, count in counts.items())
    print(
        f"{counted(num_lists, 'list')}, {counted(counts.total(), 'row')}{parts}{' (dry run)' if args.dry_run else ''}"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    cli.run(main)
