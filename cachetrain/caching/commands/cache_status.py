"""Shows the state of the caches of some folders, and what to run to complete them. Writes nothing.

    cache/cache_status.py --data_root ~/photos

A sidecar is fresh; stale: its image or caption has changed, or most others have another encoder or other settings;
corrupt; foreign: it has no header that could tell; missing; or orphaned: its image is gone. Tensors are read only
with --verify. --prune lists orphaned sidecars and deletes them once confirmed.

    cache/cache_status.py --data_root s3://bucket/photos_set --verify

Of a shard set, it shows rows, sizes and encoder of each half, rows that failed or that one half lacks, and what is
older: another folder of the same suffix, or another shard of the same number. --prune verifies the set, and deletes
what is older once confirmed.

The exit code is 0 if everything is fresh and complete, 1 if something is stale, corrupt, missing, orphaned, mixed or
cannot be read, 2 on any other error. A suffix without any sidecars counts as missing only if --cache_suffix names it.
"""

import os
import shlex
import sys
from argparse import Namespace
from functools import partial
from itertools import accumulate

from tqdm import tqdm

from cachetrain import cli
from cachetrain.caching import arguments
from cachetrain.caching.freshness import CORRUPT, FOREIGN, FRESH, MISSING, STALE
from cachetrain.caching.inspect import set_prune
from cachetrain.caching.inspect.caches import (
    IMAGE_SCRIPTS,
    ORPHANED,
    TEXT_SCRIPTS,
    TO_MAKE,
    Caches,
    Examples,
    captions_flags,
    settings_flags,
)
from cachetrain.caching.inspect.set_freeze import freeze_set
from cachetrain.caching.inspect.shard_status import SetReport, what_it_lists
from cachetrain.caching.inspect.status import Status, delete_orphans
from cachetrain.caching.messages import print_line, say
from cachetrain.data.objects import is_url
from cachetrain.data.set_files import open_files
from cachetrain.data.shard_set import folders_of
from cachetrain.log import counted

_COLUMNS = (FRESH, STALE, CORRUPT, FOREIGN, MISSING, ORPHANED)
_BAR, _NUM_BINS = 40, 6


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = cli.parser(__doc__)
    arguments.add_data_root_argument(parser, ", or shard set: a directory, or an s3://, gs:// or az:// address")
    parser.add_argument(
        "--cache_suffix",
        action="append",
        type=arguments.cache_suffix,
        metavar="SUFFIX",
        help="expect sidecars of this suffix too, and count missing ones; can be given several times. Other suffixes "
        "than the usual ones are also found, by the headers of their sidecars",
    )
    parser.add_argument("--verify", action="store_true", help="read all tensors and compare them with their SHA-256")
    parser.add_argument(
        "--prune",
        action="store_true",
        help="list orphaned sidecars, or verify a set and list its old shards; ask, and delete them",
    )
    parser.add_argument("--yes", action="store_true", help="with --prune: delete without asking")
    parser.add_argument(
        "--freeze",
        action="store_true",
        help="write a freeze file into a shard set: the list of its shards, so that later ones do not change a run; "
        "--cache_suffix names the sidecars, where there are several kinds of captions",
    )
    args = parser.parse_args(argv)
    if args.yes and not args.prune:
        parser.error("--yes needs --prune")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    sets = [root for root in args.data_root if is_url(root) or folders_of(root)]
    if sets:
        return report_sets(args, sets)
    if args.freeze:
        raise ValueError(f"--freeze {args.data_root[0]}: is no shard set; make one with cache/pack_shards.py")
    status = Status(args.data_root, args.cache_suffix or (), args.verify)
    if not status.num_images and not any(caches.counts.total() for caches in status.caches):
        raise ValueError(f"no images and no sidecars under {', '.join(args.data_root)}")
    print_table(status)
    status.unused.warn_of_file_names()
    for caches in status.caches:
        print_details(caches)
    print_examples("damaged", status.damaged)
    print_examples("cannot be used", status.unreadable)
    print_examples("orphaned, but kept by --prune", status.kept)
    print_to_do(status, args)
    num_orphans = len(status.orphans) + status.kept.count
    if args.prune:
        num_orphans -= prune(status, args.yes)
    return 0 if status.complete and not num_orphans else 1


def report_sets(args: Namespace, sets: list[str]) -> int:
    """Prints the state of shard sets; returns the exit code."""
    if len(sets) < len(args.data_root) or (args.cache_suffix and not args.freeze):
        raise ValueError(f"{sets[0]}: is a shard set; ask for folders and --cache_suffix without it")
    complete = [report_one_set(args, root) for root in sets]
    return 0 if all(complete) else 1


def report_one_set(args: Namespace, root: str) -> bool:
    """Prints the state of a shard set, and deletes what is old in it if asked to; returns whether all is well."""
    report = SetReport(open_files(root), args.verify or args.prune)
    report.print()
    found = set_prune.find_old(report)
    num_left = sum(len(old.entries) for old in found)
    deletable = [old for old in found if not old.kept]
    if found:
        set_prune.print_old(report, found)
    if deletable and not args.prune:
        say(f"  $ {shlex.join(['cache/cache_status.py', '--data_root', root, '--prune'])}")
    elif deletable and (args.yes or confirmed()):
        num_left -= set_prune.delete_old(report.files, deletable)
    elif deletable:
        say("nothing was deleted")
    elif args.prune:
        say("nothing to prune")
    if args.freeze:
        freeze_one_set(args, report)
    return report.complete and not num_left


def freeze_one_set(args: Namespace, report: SetReport) -> None:
    """Writes a freeze file into a shard set."""
    suffixes = {half.folder.suffix: half.is_text for half in report.halves}
    chosen = {suffix: suffixes.get(suffix, False) for suffix in args.cache_suffix or suffixes}
    if unknown := chosen.keys() - suffixes.keys():
        raise ValueError(f"{report.files.where}: has no *{min(unknown)}, only *{' and *'.join(suffixes)}")
    text = [suffix for suffix, is_text in chosen.items() if is_text]
    if len(text) != 1 or len(chosen) < 2:
        raise ValueError(
            f"--freeze {report.files.where}: expected image sidecars and one kind of captions, found "
            f"{', '.join(chosen)}; name them, as --cache_suffix .img_sdxl --cache_suffix .txt_t5cache"
        )
    freeze, is_new = freeze_set(report.files, [*(suffix for suffix in chosen if suffix not in text), *text])
    path = report.files.path(freeze.file_name)
    say(f"{path}: {'written' if is_new else 'there already'}, {what_it_lists(freeze)}")


def print_table(status: Status) -> None:
    captions = [f"{status.captions[suffix]:,} {suffix or 'file name'}" for suffix in (".txt", ".caption", "")]
    say(f"{', '.join(status.roots)}: {counted(status.num_images, 'image')}; captions: {', '.join(captions)}")
    if status.num_more_captions:
        more = counted(status.num_more_captions, "further caption file")
        say(f"{more}, for --captions files of the text scripts")
    if line := status.unused.line():
        say(line)
    for root in status.alone:
        say(f"{root}: no images, so whether its sidecars are up to date is not known")
    say("")
    rows = [("sidecars", *_COLUMNS, "size")] if status.caches else []
    for caches in status.caches:
        numbers = (f"{caches.counts[column]:,}" if caches.counts[column] else "-" for column in _COLUMNS)
        rows.append((caches.suffix, *numbers, file_size(caches.num_bytes)))
    width = max((len(row[0]) for row in rows), default=0)
    for name, *cells in rows:
        say(f"{name:<{width}}" + "".join(f"{cell:>11}" for cell in cells))


def print_details(caches: Caches) -> None:
    """What made the sidecars of one suffix, sizes of images, lengths of captions."""
    if not caches.first:
        return
    say("", caches.suffix)
    for number, path, metadata, differing in caches.by_run():
        say(f"  {number:,} {maker(metadata)}")
        if differing:
            say(f"    differs in {', '.join(differing)}; the first: {path}")
    if caches.mixed:
        say("  mixed: these will not train together")
    if caches.coverage.images:
        say(*caches.coverage.table())
    if caches.num_upscaled:
        say(f"  {counted(caches.num_upscaled, 'image')} upscaled")
    if caches.num_masked:
        share = caches.mask_share / caches.num_masked
        say(f"  {counted(caches.num_masked, 'image')} masked; on average {share:.1%} of them is trained in full")
    if max(caches.crops, default=1) > 1:
        say(
            "  "
            + ", ".join(f"{count:,} with {counted(crops, 'crop')}" for crops, count in sorted(caches.crops.items()))
        )
    if caches.tokens:
        print_variants(caches)
        print_tokens(caches)
    if caches.is_text:
        say(f"  null caption {', '.join(null_states(caches)) or 'in each data root'}")


def maker(metadata: dict[str, str]) -> str:
    """One line on the model and the settings in a header."""
    if not metadata:
        return "without a header that says what made them"
    model, revision = (metadata.get(key, "") for key in ("model", "revision"))
    model += f"@{revision[:7]}" if revision else ""
    parts = (f"by {model}", f"encoder {metadata.get('encoder', '')[:8]}", " ".join(settings_flags(metadata)))
    return ", ".join(filter(None, parts))


def null_states(caches: Caches) -> list[str]:
    return [f"{state} in {root}" for root, state in caches.bad_nulls.items()]


def print_variants(caches: Caches) -> None:
    """How many captions have how many variants, and with which options they were made."""
    if max(caches.num_variants) > 1:
        counts = (f"{count:,} with {number}" for number, count in sorted(caches.num_variants.items()))
        total = sum(number * count for number, count in caches.num_variants.items())
        say(f"  captions in variants: {', '.join(counts)}; {total:,} in all")
    for text, count in caches.captions.most_common() if set(caches.captions) != {""} else ():
        made = f"with {shlex.join(captions_flags(text))}" if text else "of one file each"
        say(f"  {counted(count, 'caption')} made {made}")


def print_tokens(caches: Caches) -> None:
    """Histogram of the captions' lengths."""
    tokens, lengths = caches.tokens, sorted(caches.tokens)
    running_totals = zip(lengths, accumulate(tokens[length] for length in lengths), strict=True)
    median = next(length for length, total in running_totals if 2 * total >= tokens.total())
    width = -(-(lengths[-1] - lengths[0] + 1) // _NUM_BINS)
    starts = range(lengths[0], lengths[-1] + 1, width)
    bins = [sum(tokens[length] for length in range(start, start + width)) for start in starts]
    say(f"{'tokens':>11}{'captions':>11}")
    for start, number in zip(starts, bins, strict=True):
        label = f"{start}-{start + width - 1}" if width > 1 else start
        say(f"{label:>11}{number:>11,}  {'#' * -(-_BAR * number // max(bins))}".rstrip())
    truncated = counted(caches.num_truncated, "caption")
    say(f"  {lengths[0]} to {lengths[-1]} tokens, median {median}; {truncated} truncated")


def print_examples(title: str, examples: Examples) -> None:
    if examples.count:
        say("", f"{title}: {examples.count:,}")
        say(*(f"  {line}" for line in examples.first))
        if examples.count > len(examples.first):
            say(f"  ... and {examples.count - len(examples.first):,} more")


def print_to_do(status: Status, args: Namespace) -> None:
    """The commands that would complete the caches, each with the first few files that it is for."""
    roots = [word for root in status.roots for word in ("--data_root", root)]
    lines = [line for caches in status.caches for line in to_do_of(status, caches, roots)]
    if status.orphans and not args.prune:
        lines += [f"  {len(status.orphans):,} orphaned, {file_size(status.orphan_bytes)}"]
        lines += [f"    $ {shlex.join(['cache/cache_status.py', *roots, '--prune'])}"]
    for is_text, scripts in ((False, IMAGE_SCRIPTS), (True, TEXT_SCRIPTS)):
        if status.num_images and not any(caches.is_text == is_text for caches in status.caches):
            lines += [f"  no {'text' if is_text else 'image'} sidecars yet"]
            lines += [f"    {' or '.join(scripts.values())} with {shlex.join(roots)}"]
    if lines:
        say("", "to do", *lines)
    elif status.complete and not status.kept.count:
        say("", "all fresh and complete" + ("" if args.verify else " (tensors not read; --verify reads them too)"))


def to_do_of(status: Status, caches: Caches, roots: list[str]) -> list[str]:
    """Lines on what would complete the sidecars of one suffix."""
    lines = []
    reasons = [f"    {named(status, caches, state)}" for state in TO_MAKE if caches.counts[state]]
    reasons += [f"    null caption {state}" for state in null_states(caches)]
    made_from = [root for root in status.roots if root not in status.alone]
    if reasons and not made_from:
        lines += [f"  {caches.suffix}", *reasons, "    no images here; copy these again from where the images are"]
    elif reasons:
        unknown = f"the script that made them, with {shlex.join(['--cache_suffix', caches.suffix, *roots])}"
        lines += [f"  {caches.suffix}", *reasons]
        lines += [f"    $ {line}" for line in caches.commands(made_from) or [unknown]]
    if caches.mixed and caches.counts[FOREIGN]:
        lines += [f"    {named(status, caches, FOREIGN)}; delete these first, or add --overwrite to make all again"]
    return lines


def named(status: Status, caches: Caches, state: str) -> str:
    """`3 stale: a.txt_clipl, b.txt_clipl, ...`, relative to the root if there is only one."""
    number, names = caches.counts[state], caches.examples[state].first
    if len(status.roots) == 1:
        names = [os.path.relpath(name, status.roots[0]) for name in names]
    return f"{number:,} {state}: {', '.join(names)}{', ...' if number > len(names) else ''}"


def prune(status: Status, yes: bool) -> int:
    """Lists the orphaned sidecars and, once confirmed, deletes them; returns their number."""
    orphans = status.orphans
    if not orphans:
        say("", "nothing to prune")
        return 0
    say("", "orphaned, to be deleted:")
    for path in orphans:
        say(f"  {path}")
    say(f"{counted(len(orphans), 'sidecar')}, {file_size(status.orphan_bytes)}")
    if not (yes or confirmed()):
        say("nothing was deleted")
        return 0
    number = delete_orphans(orphans, lambda path, reason: print_line(f"{path}: {reason}"))
    say(f"{number:,} deleted")
    return number


def confirmed() -> bool:
    if not sys.stdin.isatty():
        print_line("there is no terminal to ask on; run again with --yes to delete them")
        return False
    return input("Delete them? [y/N] ").strip().lower() in ("y", "yes")


def file_size(num_bytes: int) -> str:
    return tqdm.format_sizeof(num_bytes, "B") if num_bytes else "-"


run = partial(cli.run, main)  # the console script
