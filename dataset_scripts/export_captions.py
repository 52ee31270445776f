#!/usr/bin/env -S python3 -P
"""Writes all captions of a folder to a metadata.jsonl, as Hugging Face's imagefolder reads it.

    dataset_scripts/export_captions.py --data_root /data

Each line holds the image's path relative to the list, and its caption: {"file_name": "a.jpg", "text": "a red fox"}.
The exit code is 1 if some caption could not be read (each is named), 2 on any other error.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

try:
    from tqdm import tqdm

    from cachetrain import cli
    from cachetrain.atomic import staged_file
    from cachetrain.curation.lists import caption_key
    from cachetrain.curation.messages import print_failures
    from cachetrain.data.captions import read_caption
    from cachetrain.data.walk import find_images
    from cachetrain.log import counted, describe
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--data_root", required=True, metavar="DIR", help="folder of images, with all subfolders")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="list to write, in or above DIR; default: metadata.jsonl in DIR"
    )
    parser.add_argument(
        "--caption_key", type=caption_key, default="text", metavar="KEY", help="key of the captions in the list"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the list if it exists")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    root = Path(os.path.abspath(args.data_root))
    out = Path(os.path.abspath(args.out or root / "metadata.jsonl"))
    if out.parent not in (root, *root.parents):
        raise ValueError(f"--out {out}: must be in or above {root}, because its names are relative to its folder")
    if out.suffix != ".jsonl":
        raise ValueError(f"--out {out}: expected a file name that ends with .jsonl")
    if os.path.lexists(out) and not args.overwrite:
        raise ValueError(f"{out}: exists; pass --overwrite to replace it, or choose another --out")
    counts, failures = Counter(), []

    def fail(path, reason):
        counts["failed"] += 1
        failures.append(f"{path}: {reason}")

    pairs = find_images([str(root)], fail)
    with staged_file(out) as staged, open(staged, "w", encoding="utf-8") as file:
        for pair in tqdm(pairs, unit="image", disable=None):
            try:
                text = read_caption(pair).text
                name = Path(pair.image).relative_to(out.parent).as_posix()
                name.encode()
            except (OSError, ValueError) as error:
                fail(pair.image, describe(error))
                continue
            file.write(json.dumps({"file_name": name, args.caption_key: text}, ensure_ascii=False) + "\n")
            counts["captions"] += 1
            counts["empty"] += not text
            counts["from file names"] += pair.caption_file is None
        if not counts["captions"]:
            raise ValueError(f"{root}: holds no image with a caption that can be read; no list is written")
    print_failures(failures)
    notes = ", ".join(f"{counts[key]:,} {key}" for key in ("empty", "from file names", "failed") if counts[key])
    print(f"{out}: {counted(counts['captions'], 'caption')}{f' ({notes})' if notes else ''}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    cli.run(main)
