"""Compares two sidecars, or two trees of them, tensor by tensor: cosine and relative L2, |A - B| / |A|.

    cache/compare_tensorfiles.py photos_fp32/ photos_bf16/ --cache_suffix .img_sdxl --tolerance 0.01

Files of two trees pair by their path relative to A and B. A shard is a tree of its rows; a row is called
00012-5be2c0d1.tar#a. Any .safetensors file can be compared, of a model too. Values are compared whatever their
dtypes. Headers do not count; for two files, the header fields that differ are shown. The exit code is 1 if a tensor
exceeds --tolerance, if shapes or names differ, or if a file is damaged or missing on one side; 2 on any other error.
"""

import heapq
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial

from tqdm import tqdm

from cachetrain import cli
from cachetrain.caching.inspect import rows
from cachetrain.caching.inspect.differences import Difference, compare_files
from cachetrain.caching.messages import print_line, say
from cachetrain.data.objects import is_url
from cachetrain.data.sidecar import SUFFIXES
from cachetrain.log import counted

# States of a pair; the first two leave the exit code at 0.
_STATES = (
    "identical",
    "within tolerance",
    "different",
    "of other shapes or names",
    "damaged",
    "only in A",
    "only in B",
)
_MAX_LISTED = 10


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("a", metavar="A", help="the reference: file or folder, or row or shard of a shard set")
    parser.add_argument("b", metavar="B", help="what to compare with it: file or folder, or row or shard")
    parser.add_argument(
        "--tolerance",
        type=cli.not_negative,
        default=0.0,
        help="largest relative L2 that is accepted; 0: values must be equal",
    )
    parser.add_argument(
        "--cache_suffix",
        metavar="SUFFIX",
        help="suffix of the files to compare in folders; default: all sidecars and .safetensors",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if is_tree(args.a) and is_tree(args.b):
        return compare_two_trees(args)
    if rows.exists(args.a) and rows.exists(args.b):
        return compare_two_files(args)
    raise ValueError(f"{args.a} and {args.b}: expected two files or rows, or two folders or shards, that exist")


def is_tree(path: str) -> bool:
    """Whether a path is that of a folder, or of a shard."""
    return os.path.isdir(path) or (rows.is_shard(path) and (is_url(path) or os.path.exists(path)))


def compare_two_files(args: Namespace) -> int:
    """Prints the difference of every tensor, and the header fields that differ; returns the exit code."""
    try:
        differences = compare_files(args.a, args.b)
        headers = [rows.read_header(path).metadata for path in (args.a, args.b)]
    except (OSError, ValueError) as error:
        print_line(str(error))
        return 1
    say(*differences)
    for key in sorted(headers[0].keys() | headers[1].keys()):
        a, b = (header.get(key) for header in headers)
        if a != b:
            say(f"header {key}: {a} against {b}")
    return 0 if all(difference.relative_l2 <= args.tolerance for difference in differences) else 1


def compare_two_trees(args: Namespace) -> int:
    """Prints the worst tensors and the number of pairs by state; returns the exit code."""
    suffixes = [args.cache_suffix] if args.cache_suffix else [*SUFFIXES.values(), ".safetensors"]
    counts, only_in_a, only_in_b = Counter(), [], []
    differing = differing_tensors(args, suffixes, counts, only_in_a)
    worst = heapq.nlargest(_MAX_LISTED, differing, key=lambda item: item[1].severity)
    for relative in relative_paths(args.b, suffixes):
        if not rows.exists(rows.path_in(args.a, relative)):
            count_unpaired(relative, "only in B", counts, only_in_b)
    if not counts:
        raise ValueError(f"no files ({', '.join(suffixes)}) in {args.a} and {args.b}; pass --cache_suffix")
    print_list("worst", [f"{relative} {difference}" for relative, difference in worst], len(worst))
    print_list("only in A", only_in_a, counts["only in A"])
    print_list("only in B", only_in_b, counts["only in B"])
    num_pairs = sum(counts[state] for state in _STATES[:5])
    say(f"{counted(num_pairs, 'pair')}: {', '.join(f'{counts[state]} {state}' for state in _STATES)}")
    return 1 if any(counts[state] for state in _STATES[2:]) else 0


def relative_paths(root: str, suffixes: Iterable[str]) -> Iterator[str]:
    return (rows.name_in(root, path) for path in rows.find_sidecars([root], suffixes))


def differing_tensors(
    args: Namespace, suffixes: Iterable[str], counts: Counter, only_in_a: list[str]
) -> Iterator[tuple[str, Difference]]:
    """Yields (relative path, Difference) of tensors that are not equal, and counts the pairs by state."""
    for relative in tqdm(relative_paths(args.a, suffixes), unit="pair", disable=None):
        a, b = rows.path_in(args.a, relative), rows.path_in(args.b, relative)
        if not rows.exists(b):
            count_unpaired(relative, "only in A", counts, only_in_a)
            continue
        try:
            differences = compare_files(a, b)
        except (OSError, ValueError) as error:
            print_line(str(error))
            counts["damaged"] += 1
            continue
        counts[state_of(differences, args.tolerance)] += 1
        yield from ((relative, difference) for difference in differences if difference.severity > 0)


def state_of(differences: list[Difference], tolerance: float) -> str:
    if not all(difference.same_shape for difference in differences):
        return "of other shapes or names"
    largest = max((difference.severity for difference in differences), default=0)
    return "identical" if largest == 0 else "within tolerance" if largest <= tolerance else "different"


def count_unpaired(relative: str, state: str, counts: Counter, names: list[str]) -> None:
    counts[state] += 1
    if len(names) < _MAX_LISTED:
        names.append(relative)


def print_list(title: str, lines: list[str], number: int) -> None:
    if lines:
        lines += [f"and {number - len(lines)} more"] if number > len(lines) else []
        say(f"{title}:", *(f"  {line}" for line in lines))


run = partial(cli.run, main)  # the console script
