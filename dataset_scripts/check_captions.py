#!/usr/bin/env -S python3 -P
"""Finds captions that are empty, very short, too long, repeated, missing or not UTF-8, and mixtures of styles.

    dataset_scripts/check_captions.py --data_root /data --tokenizer models/t5_sd15 --html captions.html

Lengths are in tokens with --tokenizer, else in words. The exit code is 1 if there are findings, 2 on any error.
"""

import os
import sys
from collections import Counter, defaultdict

try:
    from tqdm import tqdm

    from cachetrain import cli, outputs
    from cachetrain.curation.captions import add_captions_option, is_tags, read_all
    from cachetrain.curation.page import MAX_ITEMS, Item, Section, write_page
    from cachetrain.log import counted, printable
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)

MIXED_SHARE = 0.1  # of captions in the rarer style, above which styles are mixed
BINS = 12


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--data_root", required=True, metavar="DIR", help="folder of images, with all subfolders")
    add_captions_option(parser)
    parser.add_argument("--tokenizer", metavar="DIR", help="pipeline or tokenizer directory; measures in its tokens")
    parser.add_argument("--min_length", type=cli.count, default=2, metavar="N", help="shorter ones are very short")
    parser.add_argument(
        "--max_length", type=cli.positive_int, default=77, metavar="N", help="longer captions are too long"
    )
    parser.add_argument("--top", type=cli.count, default=20, metavar="N", help="length of each list")
    parser.add_argument("--html", type=outputs.page, metavar="FILE", help="write a page, a section per finding")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    length_of, unit = (
        (token_counter(args.tokenizer), "token") if args.tokenizer else (lambda t: len(t.split()), "word")
    )
    found, unreadable, lengths, first_of = defaultdict(list), [], Counter(), {}
    styles = defaultdict(Counter)  # suffix of caption files -> style -> number
    for pair, text in tqdm(read_all(args.data_root, unreadable, args.captions), unit="caption", disable=None):
        length = length_of(text)
        lengths[length] += 1
        path = pair.caption_file if args.captions and pair.caption_file else pair.image
        first = first_of.setdefault(hash(text), path)
        suffix = path[len(os.path.splitext(pair.image)[0]) :].lower() if args.captions else ""
        styles[suffix]["tags" if is_tags(text) else "sentences"] += 1
        for name, holds in (
            ("file name as caption", pair.caption_file is None),
            ("empty", not text),
            ("very short", text and length < args.min_length),
            ("too long", length > args.max_length),
            ("repeated", text and first != path),
        ):
            if holds:
                found[name].append((path, text, counted(length, unit)))
    found["not readable"] = [(line, "", "") for line in unreadable]
    total = lengths.total()
    found["mixed styles"] = [(line, "", "") for line in mixed_styles(styles)]
    found = {name: entries for name, entries in found.items() if entries}
    print_table(found, lengths, unit, args)
    if args.html:
        write_page(args.html, f"Captions of {args.data_root}", sections(found, lengths, unit, args.data_root))
    num_findings = counted(sum(map(len, found.values())), "finding")
    print(f"{counted(total, 'caption')} read, {num_findings} of {counted(len(found), 'kind')}")
    return 1 if found else 0


def mixed_styles(styles):
    """Lines about caption files of a suffix that are of both styles; `styles`: {suffix: {style: number}}."""
    return [
        f"{counted(number, 'caption')} as {style}{suffix and f' in *{suffix}'}"
        for suffix, counts in styles.items()
        if min(counts["tags"], counts["sentences"]) > MIXED_SHARE * counts.total()
        for style, number in counts.items()
    ]


def token_counter(directory):
    """Returns a function: caption -> number of tokens, with the special ones."""
    from transformers import AutoTokenizer

    folder = os.path.join(directory, "tokenizer")
    folder = folder if os.path.isdir(folder) else directory
    if not os.path.isdir(folder):
        raise ValueError(f"--tokenizer {directory}: no such directory")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return lambda text: len(tokenizer(text, truncation=False, verbose=False).input_ids)


def histogram(lengths):
    """List of (first length, last length, number of captions), at most BINS of equal width."""
    width = max(lengths, default=0) // BINS + 1
    counts = Counter()
    for length, count in lengths.items():
        counts[length // width] += count
    return [(bin * width, bin * width + width - 1, counts[bin]) for bin in range(max(counts, default=0) + 1)]


def interval(first, last, unit):
    return counted(first, unit) if first == last else f"{first:,} to {counted(last, unit)}"


def print_table(found, lengths, unit, args):
    for first, last, count in histogram(lengths):
        print(f"{interval(first, last, unit)}: {count:,}")
    for name, entries in found.items():
        print(f"{name}: {len(entries):,}")
        for path, text, length in entries[: args.top]:
            print(f"  {printable(path)}  {printable(text[:80])}  {length}".rstrip())
        if len(entries) > args.top:
            print(f"  ... and {len(entries) - args.top:,} more")


def sections(found, lengths, unit, root):
    bins = histogram(lengths)
    most = max((count for *_, count in bins), default=0) or 1
    bars = [Item(interval(*ends, unit), value=f"{count:,}", share=count / most or None) for *ends, count in bins]
    parts = [Section("Lengths", f"Captions by their number of {unit}s", bars)]
    for name, entries in found.items():
        items = [
            Item(os.path.relpath(path, root) if text or length else path, (text,), length)
            for path, text, length in entries[:MAX_ITEMS]
        ]
        parts.append(Section(name, "", items + [Item("")] * len(entries[MAX_ITEMS:])))
    return parts


if __name__ == "__main__":
    cli.run(main)
