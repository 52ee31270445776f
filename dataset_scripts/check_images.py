#!/usr/bin/env -S python3 -P
"""Finds images that spoil training: damaged, misnamed, too small, of one color, duplicates, blurred or grainy ones.

    dataset_scripts/check_images.py --data_root /data --html images.html
    dataset_scripts/check_images.py --data_root /data --findings duplicate near-duplicate --move_to /data_duplicates

Near duplicates have about the same colors, and perceptual hashes (imagehash's phash) that differ in few of their 64
bits. Of duplicates, --move_to keeps the first, of near duplicates the largest and sharpest. The most blurred and most
grainy images are listed, whatever they are like: look at them.
The exit code is 1 if there are findings, 2 on any error.
"""

import os
import sys

try:
    from tqdm import tqdm

    from cachetrain import cli, outputs
    from cachetrain.curation.messages import print_failures
    from cachetrain.data.walk import find_images
    from cachetrain.log import counted, printable
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)

DUPLICATES = ("duplicate", "near-duplicate")
FAULTS = ("unreadable", "truncated", "wrong-extension", "too-small", "extreme-aspect", "grayscale", "one-color")


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--data_root", required=True, metavar="DIR", help="folder of images, with all subfolders")
    parser.add_argument(
        "--findings",
        nargs="+",
        choices=FAULTS + DUPLICATES,
        default=FAULTS + DUPLICATES,
        metavar="NAME",
        help="report and move only these; default: all of " + ", ".join(FAULTS + DUPLICATES),
    )
    parser.add_argument("--min_side", type=cli.positive_int, default=256, help="least shorter side in pixels")
    parser.add_argument(
        "--max_aspect",
        type=cli.Number(float, 1, 1000),
        default=3.0,
        help="largest ratio of the sides",
    )
    parser.add_argument(
        "--distance",
        type=cli.Number(int, 0, 15),
        default=4,
        metavar="BITS",
        help="most bits that differ",
    )
    parser.add_argument("--top", type=cli.count, default=20, metavar="N", help="length of each list")
    parser.add_argument(
        "--html", type=outputs.page, metavar="FILE", help="write a page of thumbnails, a section per finding"
    )
    parser.add_argument(
        "--move_to",
        metavar="DIR",
        help="move images with findings there, with their captions; outside of --data_root",
    )
    parser.add_argument("--dry_run", action="store_true", help="move nothing, only say how many")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        import imagehash  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("needs the package ImageHash; run `pip install -e .[tools]`") from None
    from cachetrain.curation.image_findings import Findings, move_pair

    if args.move_to:
        outputs.check_apart("--move_to", args.move_to, args.data_root)
    failures, findings = [], Findings(args)
    pairs = find_images([args.data_root], lambda *error: failures.append(": ".join(error)), all_captions=True)
    for pair in tqdm(pairs, unit="image", disable=None):
        findings.add(pair)
    if not findings.num_images and not failures:
        raise ValueError(f"no images under {args.data_root}")
    findings.find_duplicates()
    print_table(findings, args)
    if args.html:
        findings.write_page(args.html)
    bad, num_moved = findings.to_move(), 0
    for pair in bad if args.move_to else ():
        try:
            move_pair(pair, args.data_root, args.move_to, args.dry_run)
            num_moved += 1
        except (OSError, ValueError) as error:
            failures.append(str(error))
    print_failures(failures)
    moved = f", {num_moved:,} moved{' (dry run)' if args.dry_run else ''}" if args.move_to else ""
    print(f"{counted(findings.num_images, 'image')}, {len(bad):,} with findings{moved}, {len(failures):,} failed")
    return 1 if bad or failures else 0


def print_table(findings, args):
    for name, entries in findings.lists().items():
        print(f"{name}: {len(entries):,}")
        for path, remark in entries[: args.top]:
            print(f"  {printable(os.path.relpath(path, args.data_root))}  {printable(remark)}")
        if len(entries) > args.top:
            print(f"  ... and {len(entries) - args.top:,} more")


if __name__ == "__main__":
    cli.run(main)
