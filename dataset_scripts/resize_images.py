#!/usr/bin/env -S python3 -P
"""Copies a folder of images and captions, with images reduced to a largest side; none is enlarged.

    dataset_scripts/resize_images.py --data_root /data --out /data_1024 --max_side 1024

Images are turned upright by their EXIF data. One that is upright and small enough is copied as it is. JPEG, PNG and
WEBP keep their format, others become PNG. Captions, masks and each multiply.txt are copied, too. Files that exist in
--out are kept: a second run continues the first.
The exit code is 1 if some image failed (each is named), 2 on any other error.
"""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

try:
    from tqdm import tqdm

    from cachetrain import cli, outputs
    from cachetrain.curation.messages import print_failures
    from cachetrain.data.walk import find_images
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)

WINDOW = 1024  # images handed to the threads at a time


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--data_root", required=True, metavar="DIR", help="folder of images, with all subfolders")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, outside of --data_root")
    parser.add_argument("--max_side", type=cli.pixels, required=True, help="longer side in pixels")
    parser.add_argument("--quality", type=cli.Number(int, 1, 100), default=95, help="of JPEG and WEBP")
    parser.add_argument(
        "--num_workers", type=cli.Number(int, 1, 1024), default=cli.available_cores(), help="images resized at a time"
    )
    parser.add_argument("--dry_run", action="store_true", help="write nothing, only count")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from cachetrain.curation.resize import copy_multiples, copy_pair

    outputs.check_apart("--out", args.out, args.data_root)
    counts, failures, folders = Counter(), [], set()
    pairs = find_images([args.data_root], lambda *error: failures.append(": ".join(error)), all_captions=True)
    with ThreadPoolExecutor(args.num_workers) as pool, tqdm(unit="image", disable=None) as progress:
        while window := list(islice(pairs, WINDOW)):
            failures += copy_multiples(window, folders, args)
            for outcome, reason in pool.map(lambda pair: copy_pair(pair, args), window):
                counts[outcome] += 1
                if reason:
                    failures.append(reason)
                progress.update()
    if not counts and not failures:
        raise ValueError(f"no images under {args.data_root}")
    print_failures(failures)
    parts = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items() if outcome != "failed")
    print(f"{args.out}: {parts or 'nothing'}, {len(failures):,} failed{' (dry run)' if args.dry_run else ''}")
    return 1 if failures else 0


if __name__ == "__main__":
    cli.run(main)
