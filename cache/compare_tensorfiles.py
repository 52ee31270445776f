#!/usr/bin/env python3
"""Compares two sidecars, or two trees of them, tensor by tensor: cosine and relative L2, |A - B| / |A|.

    cache/compare_tensorfiles.py photos_fp32/ photos_bf16/ --cache_suffix .img_sdxl --tolerance 0.01

Files of two trees pair by their path relative to A and B. Any .safetensors will do, of models too. Values are
compared whatever their dtypes; headers do not count, but of two files the fields that differ are shown. The exit code
is 1 if a tensor exceeds --tolerance, if shapes or names differ, or if a file is damaged or missing on one side; 2 on
any other error.
"""

import heapq
import math
import os
import sys
from collections import Counter
from typing import NamedTuple

try:
    from tqdm import tqdm

    from cachetrain import cli
    from cachetrain.caching.arguments import positive_int
    from cachetrain.data.scan import find_sidecars
    from cachetrain.data.sidecar import SUFFIXES, read_header, read_sidecar
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None

# States of a pair; the first two are no reason for exit code 1.
STATES = (
    "identical",
    "within tolerance",
    "different",
    "of other shapes or names",
    "damaged",
    "only in A",
    "only in B",
)
MAX_LISTED = 10
# Values that are held in float64 at once.
PIECE = 1 << 22


class Difference(NamedTuple):
    """Of one tensor; relative_l2 is nan where there is none to tell: other shapes, values that are not finite."""

    name: str
    cosine: float
    relative_l2: float
    remark: str = ""
    same_shape: bool = True

    def __str__(self):
        cosine = "n/a" if math.isnan(self.cosine) else f"{self.cosine:.8f}"
        relative_l2 = "n/a" if math.isnan(self.relative_l2) else f"{self.relative_l2:.3g}"
        return f"{self.name}: cosine {cosine}, relative L2 {relative_l2}" + (self.remark and f", {self.remark}")


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("a", metavar="A", help="file or folder: the reference")
    parser.add_argument("b", metavar="B", help="file or folder")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest relative L2 allowed; 0: equal values")
    parser.add_argument("--cache_suffix", help="of the files in folders; default: all sidecars and .safetensors")
    parser.add_argument("--worst", type=positive_int, default=10, metavar="N", help="tensors to list, of two folders")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if os.path.isdir(args.a) and os.path.isdir(args.b):
        return compare_trees(args)
    if os.path.isfile(args.a) and os.path.isfile(args.b):
        return compare_files(args)
    raise ValueError(f"{args.a} and {args.b}: expected two files or two folders that exist")


def compare_files(args):
    """Prints every tensor's difference and the header fields that differ; returns the exit code."""
    try:
        differences = compare(args.a, args.b)
        headers = [read_header(path).metadata for path in (args.a, args.b)]
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(*differences, sep="\n")
    for key in sorted(headers[0].keys() | headers[1].keys()):
        a, b = (header.get(key) for header in headers)
        if a != b:
            print(f"header {key}: {a} against {b}")
    return 0 if all(difference.relative_l2 <= args.tolerance for difference in differences) else 1


def compare_trees(args):
    """Prints the worst tensors and how many pairs there are of each state; returns the exit code."""
    suffixes = [args.cache_suffix] if args.cache_suffix else [*SUFFIXES.values(), ".safetensors"]
    counts, only_in_a, only_in_b = Counter(), [], []
    differing = differing_tensors(args, suffixes, counts, only_in_a)
    worst = heapq.nlargest(args.worst, differing, key=lambda item: severity(item[1]))
    for relative in relative_paths(args.b, suffixes):
        if not os.path.exists(os.path.join(args.a, relative)):
            note(relative, "only in B", counts, only_in_b)
    if not counts:
        raise ValueError(f"no files ({', '.join(suffixes)}) in {args.a} and {args.b}; pass --cache_suffix")
    show("worst", [f"{relative} {difference}" for relative, difference in worst], len(worst))
    show("only in A", only_in_a, counts["only in A"])
    show("only in B", only_in_b, counts["only in B"])
    num_pairs = sum(counts[state] for state in STATES[:5])
    print(f"{num_pairs} pairs: {', '.join(f'{counts[state]} {state}' for state in STATES)}")
    return 1 if any(counts[state] for state in STATES[2:]) else 0


def relative_paths(root, suffixes):
    return (os.path.relpath(path, root) for path in find_sidecars([root], suffixes))


def differing_tensors(args, suffixes, counts, only_in_a):
    """Yields (relative path, Difference) of tensors that are not equal, and counts the pairs by their state."""
    for relative in tqdm(relative_paths(args.a, suffixes), unit="pair", disable=None):
        a, b = os.path.join(args.a, relative), os.path.join(args.b, relative)
        if not os.path.exists(b):
            note(relative, "only in A", counts, only_in_a)
            continue
        try:
            differences = compare(a, b)
        except (OSError, ValueError) as error:
            tqdm.write(str(error), file=sys.stderr)
            counts["damaged"] += 1
            continue
        counts[state_of(differences, args.tolerance)] += 1
        yield from ((relative, difference) for difference in differences if severity(difference) > 0)


def state_of(differences, tolerance):
    if not all(difference.same_shape for difference in differences):
        return "of other shapes or names"
    largest = max(map(severity, differences), default=0)
    return "identical" if largest == 0 else "within tolerance" if largest <= tolerance else "different"


def note(relative, state, counts, names):
    counts[state] += 1
    if len(names) < MAX_LISTED:
        names.append(relative)


def show(title, lines, number):
    if lines:
        print(f"{title}:", *lines, *([f"and {number - len(lines)} more"] if number > len(lines) else []), sep="\n  ")


def severity(difference):
    """What to sort by: the relative L2, infinite where there is none."""
    return math.inf if math.isnan(difference.relative_l2) else difference.relative_l2


def compare(path_a, path_b):
    """Returns the Difference of every tensor name that either file has.

    Raises:
        ValueError, OSError: one of them cannot be read, or does not match its own hash.
    """
    from safetensors import SafetensorError

    differences = []
    try:
        (get_a, header_a), (get_b, header_b) = open_tensors(path_a), open_tensors(path_b)
        for name in sorted(header_a.shapes.keys() | header_b.shapes.keys()):
            a, b = header_a.shapes.get(name), header_b.shapes.get(name)
            if a != b:
                remark = "only in A" if b is None else "only in B" if a is None else f"shape {a} against {b}"
                differences.append(Difference(name, math.nan, math.nan, remark, same_shape=False))
                continue
            a, b = header_a.dtypes[name], header_b.dtypes[name]
            remark = "" if a == b else f"dtype {a} against {b}"
            differences.append(difference_of(name, get_a(name), get_b(name), remark))
    except SafetensorError as error:
        raise ValueError(f"{path_a} or {path_b}: {error}") from error
    return differences


def open_tensors(path):
    """Returns (function that gives the tensor of a name, Header); of files other than ours, which may be big and have
    no hash to verify, a tensor is read only when it is asked for.
    """
    header = read_header(path)
    if not header.foreign:
        return read_sidecar(path)[0].__getitem__, header
    from safetensors import safe_open

    return safe_open(path, framework="pt").get_tensor, header


def difference_of(name, a, b, remark=""):
    """Difference of two tensors of one shape and any dtypes, with sums in float64."""
    dot = aa = bb = dd = 0.0
    num_not_finite = 0
    for x, y in zip(a.flatten().split(PIECE), b.flatten().split(PIECE), strict=True):
        x, y = x.double(), y.double()
        d = x - y
        d[x == y] = 0  # inf - inf is nan
        dot, aa, bb, dd = dot + (x @ y).item(), aa + (x @ x).item(), bb + (y @ y).item(), dd + (d @ d).item()
        num_not_finite += (~(x.isfinite() & y.isfinite())).sum().item()
    if num_not_finite:
        remark = ", ".join(filter(None, (remark, f"{num_not_finite} values not finite")))
    if dd == 0:
        return Difference(name, 1.0, 0.0, remark)
    if num_not_finite:
        return Difference(name, math.nan, math.nan, remark)
    cosine = dot / math.sqrt(aa) / math.sqrt(bb) if aa and bb else math.nan
    return Difference(name, cosine, math.sqrt(dd / aa) if aa else math.inf, remark)


if __name__ == "__main__":
    cli.run(main)
