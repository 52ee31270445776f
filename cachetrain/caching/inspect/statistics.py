"""Statistics over the tensors of many sidecars: one pass, constant memory, float64, and with standard errors."""

import math
import sys
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cachetrain import cli
from cachetrain.caching.arguments import add_choice_arguments
from cachetrain.data.scan import find_sidecars
from cachetrain.data.sidecar import SUFFIXES, read_sidecar


class Estimate(NamedTuple):
    """A measured value and its standard error, nan where that is unknown."""

    value: float
    error: float

    @property
    def rounded(self):
        """The value as text, down to the second significant digit of its error."""
        return format(self.value, self._format())

    def __str__(self):
        return f"{self.rounded} ± {'n/a' if math.isnan(self.error) else format(self.error, self._format())}"

    def _format(self):
        return f".{max(0, 1 - math.floor(math.log10(self.error)))}f" if self.error > 0 else ".5g"

    def distance(self, expected):
        """How far the value lies from `expected`, in words."""
        if not self.error > 0:
            return "distance in standard errors n/a"
        errors = (self.value - expected) / self.error
        return f"measured {abs(errors):.1f} standard errors {'above' if errors > 0 else 'below'} it"


class Statistics(NamedTuple):
    """Mean and standard deviation (ddof 0), each an Estimate."""

    mean: Estimate
    std: Estimate

    @property
    def inverse_std(self):
        """1/std, the factor that gives unit variance.

        Raises:
            ValueError: all values are the same.
        """
        if self.std.value <= 1e-12 * abs(self.mean.value):  # what rounding leaves of 0
            raise ValueError(
                f"all values are {self.mean.value:g}: std is 0, so that no factor gives unit variance; "
                "check what these caches were made from"
            )
        return Estimate(1 / self.std.value, self.std.error / self.std.value**2)


class Moments:
    """Mean and std, row by row, of values that come in groups: those of one image, or of one caption.

    Values of one group are alike, so their number says nothing about the error; groups are taken as independent, and
    the standard error comes from the variance between them. With n values in a group, s = sum(x - c) and
    q = sum((x - c)^2), the pooled moments are ratios of sums over the k groups:

        m = sum(s) / sum(n)        mean = c + m        variance = sum(q) / sum(n) - m^2

    Linearised around them (delta method for ratio estimators: Cochran, Sampling Techniques, 3rd ed. 1977, chapter 6),
    a group moves the mean by u and the variance by w, both of which are zero on average:

        u = (s - m n) / average(n)        w = (q - 2 m s + (m^2 - variance) n) / average(n)

        error(mean)^2 = sum(u^2) / (k (k - 1))        error(variance)^2 = sum(w^2) / (k (k - 1))
        error(std) = error(variance) / (2 std)        error(1/std) = error(std) / variance

    u and w are linear in (n, s, q), so the running mean and covariance of these three (Welford 1962) hold all that is
    needed. c is the first group's mean: sums of squares far from zero would lose their digits. Of few groups, below
    about thirty, the errors themselves are rough; of one they are nan.
    """

    def __init__(self):
        self.num_groups = 0

    def add(self, values):
        """Adds one group: float64 [rows, n], with n free to differ from group to group."""
        if self.num_groups == 0:
            self._origin = values.mean(axis=1, keepdims=True)
            self._average, self._comoment = np.zeros((len(values), 3)), np.zeros((len(values), 3, 3))
        values = values - self._origin
        n = np.full(len(values), float(values.shape[1]))
        sums = np.stack([n, values.sum(axis=1), np.square(values).sum(axis=1)], axis=1)
        self.num_groups += 1
        delta = sums - self._average
        self._average += delta / self.num_groups
        self._comoment += delta[:, :, None] * (sums - self._average)[:, None, :]

    def statistics(self):
        """Returns a list of one Statistics per row, after at least one group was added."""
        n, s, q = self._average.T
        m = s / n
        variance = np.maximum(q / n - m**2, 0)
        mean_error = self._error(np.stack([-m, np.ones_like(m), np.zeros_like(m)], axis=1) / n[:, None])
        variance_error = self._error(np.stack([m**2 - variance, -2 * m, np.ones_like(m)], axis=1) / n[:, None])
        std = np.sqrt(variance)
        std_error = np.divide(variance_error, 2 * std, out=np.full_like(std, np.nan), where=std > 0)
        columns = (self._origin[:, 0] + m, mean_error, std, std_error)
        rows = np.stack(columns, axis=1).tolist()
        return [Statistics(Estimate(*row[:2]), Estimate(*row[2:])) for row in rows]

    def _error(self, coefficients):
        """Standard error of the average over groups of coefficients [rows, 3] times (n, s, q)."""
        k = self.num_groups
        if k < 2:
            return np.full(len(coefficients), np.nan)
        squares = np.einsum("ri,rij,rj->r", coefficients, self._comoment, coefficients)
        return np.sqrt(np.maximum(squares, 0) / (k * (k - 1)))


def parser(doc, kinds):
    """Command line of a script that measures sidecars of these kinds."""
    suffixes = [SUFFIXES[kind] for kind in kinds]
    parser = cli.parser(doc)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folder, sub-folders included, or sidecar")
    parser.add_argument("--cache_suffix", help=f"of the sidecars in folders; default: {' and '.join(suffixes)}")
    add_choice_arguments(parser, 0)
    parser.set_defaults(suffixes=suffixes)
    return parser


def find_paths(args):
    """Yields the paths of the sidecars that the command line names."""
    return find_sidecars(args.paths, [args.cache_suffix] if args.cache_suffix else args.suffixes)


def check_measured(num_measured, args, failures):
    """Raises a ValueError if nothing was measured."""
    if not num_measured:
        raise ValueError(
            f"{', '.join(args.paths)}: no sidecars ({args.cache_suffix or ' or '.join(args.suffixes)}) that can be "
            f"measured, {len(failures)} left out; run the cache scripts first, or pass another --cache_suffix"
        )


def read_tensors(paths, name, rank, same, failures):
    """Reads one tensor of each sidecar; what cannot be used is named on stderr and left out.

    Args:
        name, rank: of the tensor: "latent" and 3, or "emb" and 2.
        same: function of a Header that gives a dict of what all sidecars must agree on.
        failures: list to which the paths left out are appended.

    Yields:
        (path, float64 array, Header).

    Raises:
        ValueError: two sidecars do not agree; both are named.
    """
    first_path = first = None
    for path in tqdm(paths, unit="sidecar", disable=None):
        try:
            values, header = _read_tensor(path, name, rank)
        except (OSError, ValueError) as error:
            failures.append(path)
            tqdm.write(str(error), file=sys.stderr)
            continue
        here = same(header)
        if first is None:
            first_path, first = path, here
        for key in first:
            if here[key] != first[key]:
                raise ValueError(
                    f"mixed caches: {first_path} and {path} differ in {key}: {first[key]} against {here[key]}; "
                    "measure one kind at a time (--cache_suffix)"
                )
        yield path, values, header


def _read_tensor(path, name, rank):
    tensors, header = read_sidecar(path)
    shape = header.shapes.get(name, ())
    if len(shape) != rank or 0 in shape:
        raise ValueError(f"{path}: expected a tensor {name!r} of {rank} dimensions, found {header.shapes}")
    values = tensors[name].double().numpy()
    not_finite = np.count_nonzero(~np.isfinite(values))
    if not_finite:
        raise ValueError(f"{path}: {not_finite} of {values.size} values of {name!r} are not finite; delete it and "
                         "encode it again with --dtype fp32")  # fmt: skip
    return values, header
