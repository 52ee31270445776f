"""How far the tensors of two safetensors files are apart."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from cachetrain.caching.inspect.rows import is_row, read_header, read_sidecar
from cachetrain.data.sidecar import Header
from cachetrain.log import counted

if TYPE_CHECKING:
    import torch

# Values that are held in float64 at once.
_PIECE = 1 << 22


class Difference(NamedTuple):
    """Of one tensor in two files.

    Attributes:
        cosine: cosine similarity of the values, nan if undefined.
        relative_l2: |A - B| / |A|; nan if undefined: other shapes, or values that are not finite.
    """

    name: str
    cosine: float
    relative_l2: float
    remark: str = ""
    same_shape: bool = True

    @property
    def severity(self) -> float:
        """The relative L2, infinite if it is undefined; to sort by."""
        return math.inf if math.isnan(self.relative_l2) else self.relative_l2

    def __str__(self) -> str:
        cosine = "n/a" if math.isnan(self.cosine) else f"{self.cosine:.8f}"
        relative_l2 = "n/a" if math.isnan(self.relative_l2) else f"{self.relative_l2:.3g}"
        return f"{self.name}: cosine {cosine}, relative L2 {relative_l2}" + (self.remark and f", {self.remark}")


def compare_files(path_a: str, path_b: str) -> list[Difference]:
    """Returns the Difference of every tensor name that either file has.

    Raises:
        ValueError, OSError: one of them cannot be read, or does not match its own hash.
    """
    from safetensors import SafetensorError

    differences = []
    try:
        (get_a, header_a), (get_b, header_b) = _open_tensors(path_a), _open_tensors(path_b)
        for name in sorted(header_a.shapes.keys() | header_b.shapes.keys()):
            a, b = header_a.shapes.get(name), header_b.shapes.get(name)
            if a != b:
                remark = "only in A" if b is None else "only in B" if a is None else f"shape {a} against {b}"
                differences.append(Difference(name, math.nan, math.nan, remark, same_shape=False))
                continue
            a, b = header_a.dtypes[name], header_b.dtypes[name]
            remark = "" if a == b else f"dtype {a} against {b}"
            differences.append(compare_tensors(name, get_a(name), get_b(name), remark))
    except (SafetensorError, NotImplementedError) as error:  # NotImplementedError: of a dtype that torch only stores
        raise ValueError(f"{path_a} or {path_b}: {error}") from error
    return differences


def _open_tensors(path) -> tuple[Callable, Header]:
    """Returns (function that gives the tensor of a name, Header).

    Files of other programs may be big and have no hash to verify: their tensors are read only when asked for.
    """
    header = read_header(path)
    if not header.foreign or is_row(path):
        return read_sidecar(path)[0].__getitem__, header
    from safetensors import safe_open

    return safe_open(path, framework="pt").get_tensor, header


def compare_tensors(name: str, a: "torch.Tensor", b: "torch.Tensor", remark: str = "") -> Difference:
    """Difference of two tensors of one shape and any dtypes, with sums in float64."""
    dot = aa = bb = dd = 0.0
    num_not_finite = 0
    for x, y in zip(a.flatten().split(_PIECE), b.flatten().split(_PIECE), strict=True):
        x, y = x.double(), y.double()
        d = x - y
        d[x == y] = 0  # inf - inf is nan
        dot, aa, bb, dd = dot + (x @ y).item(), aa + (x @ x).item(), bb + (y @ y).item(), dd + (d @ d).item()
        num_not_finite += (~(x.isfinite() & y.isfinite())).sum().item()
    if num_not_finite:
        remark = ", ".join(filter(None, (remark, f"{counted(num_not_finite, 'value')} not finite")))
    if dd == 0:
        return Difference(name, 1.0, 0.0, remark)
    if num_not_finite:
        return Difference(name, math.nan, math.nan, remark)
    cosine = dot / math.sqrt(aa) / math.sqrt(bb) if aa and bb else math.nan
    return Difference(name, cosine, math.sqrt(dd / aa) if aa else math.inf, remark)
