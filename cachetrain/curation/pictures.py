"""Looks at image files: what is wrong with them, how sharp and grainy they are, and which are near duplicates."""

import hashlib
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image

from cachetrain.caching.metadata import with_less_metadata
from cachetrain.caching.pixels import open_image, orientation, to_rgb, upright
from cachetrain.curation.page import thumbnail
from cachetrain.data.walk import MAX_IMAGE
from cachetrain.reading import read_bytes

FAULTS = ("unreadable", "truncated", "wrong extension", "too small", "extreme aspect", "grayscale", "one color")
_PIXELS = 256  # side of the picture that is measured
_SAME_LEVELS, _ONE_COLOR_SHARE = 3, 0.9
_GRAIN_SCALE = math.sqrt(math.pi / 2) / 6  # Immerkaer 1996, "Fast noise variance estimation"


class Picture(NamedTuple):
    """What one image file is like.

    Attributes:
        faults: fault -> remark.
        size: (width, height) upright, (0, 0) if unreadable.
        sha256: of the file; "" if it cannot be read.
        phash: 64 bits; None if unreadable.
        sharpness: variance of the Laplacian of its gray, at most 256 pixels a side.
        grain: standard deviation of its noise, of 255 levels.
        small: RGB, at most 256 pixels a side.
    """

    path: str
    faults: dict[str, str]
    size: tuple[int, int] = (0, 0)
    sha256: str = ""
    phash: int | None = None
    sharpness: float = math.inf
    grain: float = 0.0
    small: Image.Image | None = None


def look_at(path: str, min_side: int, max_aspect: float) -> Picture:
    """Measures one image file; a bad one is a finding, never an error."""
    try:
        data = read_bytes(path, MAX_IMAGE)
    except OSError as error:
        return Picture(path, {"unreadable": str(error.strerror)})
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        rgb, kind = load_rgb(data)
    except Exception as error:  # Pillow's plugins raise almost anything on malformed input
        fault = "truncated" if "truncated" in str(error) else "unreadable"
        return Picture(path, {fault: str(error).split(" <_io")[0]}, sha256=sha256)
    faults, (width, height) = {}, rgb.size
    suffix = os.path.splitext(path)[1].lower()
    expected = Image.registered_extensions().get(suffix)
    if expected != {"MPO": "JPEG"}.get(kind, kind):
        faults["wrong extension"] = f"is a {kind}"
    if min(rgb.size) < min_side:
        faults["too small"] = f"{width}x{height}"
    if max(rgb.size) > max_aspect * min(rgb.size):
        faults["extreme aspect"] = f"{width}x{height}"
    rgb.thumbnail((_PIXELS, _PIXELS))
    pixels = np.asarray(rgb).astype(int)
    if np.ptp(pixels, axis=2).max() <= _SAME_LEVELS:
        faults["grayscale"] = "red, green and blue are equal"
    bins = np.unique((pixels // 16) @ (256, 16, 1), return_counts=True)[1]
    if bins.max() >= _ONE_COLOR_SHARE * bins.sum():
        faults["one color"] = f"{bins.max() / bins.sum():.0%} of its pixels"
    import imagehash

    phash = int(str(imagehash.phash(rgb)), 16)
    return Picture(path, faults, (width, height), sha256, phash, *sharpness_and_grain(pixels.mean(2)), rgb)


def load_rgb(data: bytes) -> tuple[Image.Image, str]:
    """Decodes a file's bytes as caching does, in full size; returns (upright sRGB image, format). Raises anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _decoded(data)
        except Exception:
            for less in with_less_metadata(data):
                with suppress(Exception):
                    return _decoded(less)
            raise


def _decoded(data):
    with open_image(data) as image:
        image.load()
        return upright(to_rgb(image, image), orientation(image)), image.format


def sharpness_and_grain(gray: np.ndarray) -> tuple[float, float]:
    """(variance of the Laplacian, standard deviation of the noise) of gray levels, float [H, W]."""
    if min(gray.shape) < 3:
        return 0.0, 0.0
    rows = gray[:-2] + gray[2:] - 2 * gray[1:-1]  # second differences
    columns = gray[:, :-2] + gray[:, 2:] - 2 * gray[:, 1:-1]
    laplacian = rows[:, 1:-1] + columns[1:-1]
    mixed = rows[:, :-2] + rows[:, 2:] - 2 * rows[:, 1:-1]
    return float(laplacian.var()), float(np.abs(mixed).mean() * _GRAIN_SCALE)


def _count_bits(words):
    """Number of ones in each uint64 of an array [N]."""
    return np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)


def near_groups(hashes: Sequence[int], distance: int) -> Iterator[list[int]]:
    """Yields groups of at least two indices whose 64-bit hashes differ in at most `distance` bits, link by link.

    Two such hashes agree in one of distance + 1 bands of bits, so that only hashes that share a band are compared.
    """
    unique, inverse = np.unique(np.array(hashes, np.uint64), return_inverse=True)
    parent = list(range(len(unique)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    edges = [64 * band // (distance + 1) for band in range(distance + 2)]
    for start, end in pairwise(edges):
        keys = (unique >> np.uint64(start)) & np.uint64(2 ** (end - start) - 1)
        order = np.argsort(keys, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            for place, i in enumerate(bucket[:-1]):
                others = bucket[place + 1 :]
                for j in others[_count_bits(unique[others] ^ unique[i]) <= distance]:
                    parent[root(int(j))] = root(int(i))
    groups = defaultdict(list)
    for index, i in enumerate(inverse):
        groups[root(int(i))].append(index)
    yield from (group for group in groups.values() if len(group) > 1)


def thumbnail_of(path: str) -> str | None:
    """A thumbnail of an image file as a data: URL; None if it cannot be decoded."""
    try:
        return thumbnail(load_rgb(read_bytes(path, MAX_IMAGE))[0])
    except Exception:  # Pillow's plugins raise almost anything on malformed input
        return None
