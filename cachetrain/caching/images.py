"""Decodes image files to the pixels that the VAE sees. Runs in worker processes; needs only Pillow and numpy."""

import hashlib
import math
import warnings
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from cachetrain.caching.buckets import nearest_size
from cachetrain.caching.metadata import with_less_metadata
from cachetrain.caching.pixels import FORMATS, open_image, orientation, stored_rows, to_rgb, upright
from cachetrain.data.walk import MAX_IMAGE, Pairs
from cachetrain.log import describe
from cachetrain.reading import read_with_stat

# What `decode` always does; part of the settings in every image sidecar, so that a change makes old sidecars stale.
POLICY = {"resample": "bicubic", "alpha": "white", "exif": "transpose", "color": "sRGB"}

NOT_AN_IMAGE = f"not an image in one of the formats {', '.join(FORMATS)}"

# JPEGs are decoded at a reduced scale, but never below this many times the target size, so that the antialiased
# resize that follows still determines the pixels.
_DRAFT_MARGIN = 2

# Pixels that are converted at a time, and how many pixels to each side the filter sees, where it enlarges.
_BAND_PIXELS, _BICUBIC_SUPPORT = 2**24, 2


class Decoded(NamedTuple):
    """One image: uint8 pixels [height, width, 3], and the fields of its sidecar's header."""

    path: str
    pixels: np.ndarray
    fields: dict[str, str]


class ImageFiles:
    """Map-style dataset over pairs: item i is a Decoded, or (path, reason) for an image that cannot be read.

    Args:
        sizes: list of (width, height); each image takes the one nearest to it in aspect ratio.
    """

    def __init__(self, pairs: Pairs, sizes: list[tuple[int, int]]):
        self.pairs = pairs
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Decoded | tuple[str, str]:
        path = self.pairs[index].image
        try:
            return decode_file(path, self.sizes)
        except UnidentifiedImageError:
            return path, NOT_AN_IMAGE
        # Pillow's plugins raise almost anything on malformed input, and one bad image must not stop the run.
        except Exception as error:
            return path, getattr(error, "strerror", None) or describe(error)


def decode_file(path: str, sizes: list[tuple[int, int]]) -> Decoded:
    """Reads a file once, so that the header fields describe exactly the bytes that were decoded.

    Raises:
        OSError, ValueError and whatever Pillow raises on malformed input.
    """
    data, stat = read_with_stat(path, MAX_IMAGE)
    pixels, original_size, crop_box = decode(data, sizes)
    height, width = pixels.shape[:2]
    fields = {
        "source_size": str(stat.st_size),
        "source_mtime_ns": str(stat.st_mtime_ns),
        "source_sha256": hashlib.sha256(data).hexdigest(),
        "width": str(width),
        "height": str(height),
        "original_width": str(original_size[0]),
        "original_height": str(original_size[1]),
        "crop_box": ",".join(f"{edge:g}" for edge in crop_box),
    }
    return Decoded(path, pixels, fields)


def decode(
    data: bytes, sizes: list[tuple[int, int]]
) -> tuple[np.ndarray, tuple[int, int], tuple[float, float, float, float]]:
    """Decodes an image file's bytes: upright, sRGB, on white, cover-resized and center-cropped.

    Metadata that cannot be read is ignored.

    Args:
        data: content of the file; of an animation, the first frame is taken.
        sizes: list of (width, height) in pixels; the nearest in aspect ratio is taken.

    Returns:
        (uint8 array [height, width, 3],
         (width, height) of the upright original,
         crop box (left, top, right, bottom) in its pixels).
    """
    with warnings.catch_warnings():
        # About odd metadata and about large images (twice that size is an error): neither changes the pixels.
        warnings.simplefilter("ignore")
        try:
            return _decode(data, sizes)
        # Pillow's plugins raise almost anything on malformed input.
        except Exception:
            for less in with_less_metadata(data):
                with suppress(Exception):
                    return _decode(less, sizes)
            raise


def _decode(data, sizes):
    with open_image(data) as image:
        if image.format not in ("JPEG", "MPO"):
            image.load()  # turns a TIFF upright, and finds the EXIF data of a PNG that follows the pixels
        stored_size, turn = image.size, orientation(image)
        swapped = turn > 4
        original_size = stored_size[::-1] if swapped else stored_size
        width, height = nearest_size(original_size, sizes)
        goal = (height, width) if swapped else (width, height)
        if min(stored_size[0] / goal[0], stored_size[1] / goal[1]) > _DRAFT_MARGIN:
            image.draft(None, (goal[0] * _DRAFT_MARGIN, goal[1] * _DRAFT_MARGIN))
        reduction = round(stored_size[0] / image.size[0])
        crop_box = cover_box(original_size, width, height)
        # The reduced size is rounded up, so the box is computed in the original and then scaled.
        box = tuple(edge / reduction for edge in crop_box)
        return _resized(image, turn, (width, height), box), original_size, crop_box


def _resized(image, turn, size, box):
    """Returns the upright image in RGB, resized from `box` (left, top, right, bottom) to `size` (width, height).

    Large images are converted in bands of rows, as a whole copy in RGB and its intermediate steps would take several
    times the memory of the image. The bands overlap by what the filter sees, so that the pixels are the same.
    """
    (width, height), (left, top, right, bottom) = size, box
    num_rows = image.size[0] if turn > 4 else image.size[1]  # upright
    step = height * _BAND_PIXELS // (image.size[0] * image.size[1])
    if step >= height:
        return np.array(upright(to_rgb(image, image), turn).resize(size, Image.Resampling.BICUBIC, box=box))
    scale, step, bands = (bottom - top) / height, max(step, 1), []
    margin = math.ceil(_BICUBIC_SUPPORT * max(scale, 1)) + 1
    for start in range(0, height, step):
        end = min(start + step, height)
        upper, lower = top + start * scale, top + end * scale
        first, last = max(0, math.floor(upper) - margin), min(num_rows, math.ceil(lower) + margin)
        band = upright(to_rgb(image.crop(stored_rows(image.size, turn, first, last)), image), turn)
        part = (left, upper - first, right, min(lower, num_rows) - first)
        bands.append(np.asarray(band.resize((width, end - start), Image.Resampling.BICUBIC, box=part)))
    return np.concatenate(bands)


def cover_box(size: tuple[int, int], width: int, height: int) -> tuple[float, float, float, float]:
    """The largest centered box of the ratio width:height in an image of `size` (width, height).

    Returns:
        (left, top, right, bottom) in pixels.
    """
    scale = min(size[0] / width, size[1] / height)
    left, top = (size[0] - width * scale) / 2, (size[1] - height * scale) / 2
    # max: Pillow refuses a box that rounding has moved outside of the image.
    left, top = max(left, 0.0), max(top, 0.0)
    return left, top, size[0] - left, size[1] - top


def collate(items: list[Decoded | tuple[str, str]]) -> tuple[list, list[tuple[str, str]]]:
    """Groups the decoded images of one batch by size, and separates those that failed.

    Arrays, not tensors: workers send them through a pipe, and need no shared memory.

    Returns:
        (list of (uint8 array [b, height, width, 3], list of b (path, header fields)), list of (path, reason)).
    """
    decoded, failures = {}, []
    for item in items:
        if isinstance(item, Decoded):
            decoded.setdefault(item.pixels.shape, []).append(item)
        else:
            failures.append(item)
    groups = [
        (np.stack([item.pixels for item in group]), [(item.path, item.fields) for item in group])
        for group in decoded.values()
    ]
    return groups, failures
