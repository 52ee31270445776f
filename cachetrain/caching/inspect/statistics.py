"""Mean and std over the tensors of many sidecars: one pass, constant memory, float64, with standard errors."""

import argparse
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cachetrain import cli
from cachetrain.caching.arguments import add_subset_arguments
from cachetrain.caching.inspect.rows import find_sidecars, read_sidecar
from cachetrain.caching.messages import print_line
from cachetrain.data.sidecar import SUFFIXES, Header

PATH_HELP = "sidecar, or folder searched with all sub-folders; row (00012-5be2c0d1.tar#a), shard, or shard set"


class Estimate(NamedTuple):
    """A measured value and its standard error, nan if that is unknown."""

    value: float
    error: float

    @property
    def rounded(self) -> str:
        """The value as text, down to the second significant digit of its error."""
        return format(self.value, self._format())

    def __str__(self) -> str:
        return f"{self.rounded} ± {'n/a' if math.isnan(self.error) else format(self.error, self._format())}"

    def _format(self):
        return f".{max(0, 1 - math.floor(math.log10(self.error)))}f" if self.error > 0 else ".5g"

    def distance(self, expected: float) -> str:
        """How far the value lies from `expected`, in words."""
        if not self.error > 0:
            return "distance in standard errors n/a"
        errors = (self.value - expected) / self.error
        return f"measured {abs(errors):.1f} standard errors {'above' if errors > 0 else 'below'} it"


class Statistics(NamedTuple):
    """Mean and standard deviation (ddof 0)."""

    mean: Estimate
    std: Estimate

    @property
    def inverse_std(self) -> Estimate:
        """1/std, the factor that gives unit variance.

        Raises:
            ValueError: all values are the same.
        """
        if self.std.value <= 1e-12 * abs(self.mean.value):  # what rounding leaves of 0
            raise ValueError(
                f"all values are {self.mean.value:g}: their std is 0, so no factor gives unit variance; "
                "check what these caches were made from"
            )
        return Estimate(1 / self.std.value, self.std.error / self.std.value**2)


class Moments:
    """Mean and std, row by row, of values that come in groups: those of one image, or of one caption.

    The standard errors are s / sqrt(number of groups), where s is the standard deviation, over the groups, of a
    group's own mean or std: the values of one group are alike, so their number says nothing about the error.
    """

    def __init__(self):
        self.num_groups = 0

    def add(self, values: np.ndarray) -> None:
        """Adds one group: float64 [rows, n]; n may differ from group to group."""
        n, mean, variance = values.shape[1], values.mean(axis=1), values.var(axis=1)
        of_group = np.stack([mean, np.sqrt(variance)])
        if self.num_groups == 0:
            self._num_values = 0
            self._mean, self._squares = np.zeros_like(mean), np.zeros_like(mean)
            self._group_mean, self._group_squares = np.zeros_like(of_group), np.zeros_like(of_group)
        # Of all values: pooled mean and sum of squared deviations (Chan, Golub & LeVeque 1979).
        num_values = self._num_values + n
        delta = mean - self._mean
        self._mean = self._mean + delta * n / num_values
        self._squares = self._squares + n * variance + delta**2 * self._num_values * n / num_values
        self._num_values = num_values
        # Of the groups' means and stds (Welford 1962).
        self.num_groups += 1
        delta = of_group - self._group_mean
        self._group_mean = self._group_mean + delta / self.num_groups
        self._group_squares = self._group_squares + delta * (of_group - self._group_mean)

    def statistics(self) -> list[Statistics]:
        """Returns one Statistics per row, after at least one group was added."""
        k = self.num_groups
        mean_error, std_error = np.sqrt(self._group_squares / (k * (k - 1))) if k > 1 else self._group_mean * math.nan
        columns = (self._mean, mean_error, np.sqrt(self._squares / self._num_values), std_error)
        rows = np.stack(columns, axis=1).tolist()
        return [Statistics(Estimate(*row[:2]), Estimate(*row[2:])) for row in rows]


def parser(doc: str, kinds: Iterable[str]) -> argparse.ArgumentParser:
    """Parser of a tool that measures sidecars of these kinds."""
    suffixes = [SUFFIXES[kind] for kind in kinds]
    parser = cli.parser(doc)
    parser.add_argument("paths", nargs="+", metavar="PATH", help=PATH_HELP)
    parser.add_argument(
        "--cache_suffix",
        metavar="SUFFIX",
        help=f"suffix of the sidecars in folders; default: {' and '.join(suffixes)}",
    )
    add_subset_arguments(parser, 0)
    parser.set_defaults(suffixes=suffixes)
    return parser


def find_paths(args: argparse.Namespace) -> Iterator[str]:
    """Yields the paths of the sidecars that the command line names."""
    return find_sidecars(args.paths, [args.cache_suffix] if args.cache_suffix else args.suffixes)


def check_measured(num_measured: int, args: argparse.Namespace, skipped: list[str]) -> None:
    """Raises a ValueError if nothing was measured."""
    if not num_measured:
        raise ValueError(
            f"{', '.join(args.paths)}: no sidecars ({args.cache_suffix or ' or '.join(args.suffixes)}) that can be "
            f"measured, {len(skipped)} left out; run the cache scripts first, or pass another --cache_suffix"
        )


def read_tensors(
    paths: Iterable[str], name: str, num_dims: int, identity: Callable[[Header], dict], skipped: list[str]
) -> Iterator[tuple[str, np.ndarray, Header]]:
    """Reads one tensor of each sidecar; those that cannot be used are named on stderr and left out.

    Args:
        name, num_dims: of the tensor: "latent" and 3, or "emb" and 2. Variants of a caption, `emb.1` and so on, are
            joined to it along the tokens.
        identity: returns what all sidecars must agree on.
        skipped: list to which the paths left out are appended.

    Yields:
        (path, float64 array, Header).

    Raises:
        ValueError: two sidecars do not agree; both are named.
    """
    first_path = first = None
    for path in tqdm(paths, unit="sidecar", disable=None):
        try:
            values, header = _read_tensor(path, name, num_dims)
        except (OSError, ValueError) as error:
            skipped.append(path)
            print_line(str(error))
            continue
        this = identity(header)
        if first is None:
            first_path, first = path, this
        for key in first:
            if this[key] != first[key]:
                raise ValueError(
                    f"mixed caches: {first_path} and {path} differ in {key}: {first[key]} against {this[key]}; "
                    "measure one kind at a time (--cache_suffix)"
                )
        yield path, values, header


def _read_tensor(path, name, num_dims):
    tensors, header = read_sidecar(path)
    shape = header.shapes.get(name, ())
    if len(shape) != num_dims or 0 in shape:
        raise ValueError(f"{path}: expected a tensor {name!r} of {num_dims} dimensions, found {header.shapes}")
    names = [name, *sorted(other for other in tensors if re.fullmatch(rf"{name}\.[0-9]+", other))]
    if any(header.shapes[other][1:] != shape[1:] or len(header.shapes[other]) != num_dims for other in names):
        raise ValueError(f"{path}: the variants of {name!r} differ in width: {header.shapes}")
    values = np.concatenate([tensors[other].double().numpy() for other in names])
    num_not_finite = np.count_nonzero(~np.isfinite(values))
    if num_not_finite:
        raise ValueError(
            f"{path}: {num_not_finite} of {values.size} values of {name!r} are not finite; delete it and "
            "encode it again with --dtype fp32"
        )
    return values, header
