"""Decodes image files to the pixels that the VAE sees. Runs in worker processes; needs only Pillow and numpy."""

import hashlib
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from cachetrain.caching.buckets import nearest_size
from cachetrain.caching.metadata import with_less_metadata
from cachetrain.caching.pixels import (
    FORMATS,
    open_image,
    orientation,
    stored_rows,
    to_alpha,
    to_gray,
    to_rgb,
    upright,
)
from cachetrain.caching.samples import Samples
from cachetrain.data.masks import mask_file
from cachetrain.data.sidecar import numbered
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


# (left, top, right, bottom) in pixels of an upright image.
Box = tuple[float, float, float, float]


class Decoded(NamedTuple):
    """One image.

    Attributes:
        pixels: uint8 [crops, height, width, channels]: red, green, blue and, with masks, what is trained (255: all).
        fields: of its sidecar's header.
    """

    path: str
    pixels: np.ndarray
    fields: dict[str, str]


class ImageFiles:
    """Map-style dataset over pairs: item i is a Decoded, or (path, reason) for an image that cannot be read.

    Args:
        sizes: list of (width, height); each image takes the one nearest to it in aspect ratio.
        crops, mask: see `decode_file`.
    """

    def __init__(self, pairs: Pairs, sizes: list[tuple[int, int]], crops: int = 1, mask: str | None = None):
        self.pairs = pairs
        self.sizes = sizes
        self.crops = crops
        self.mask = mask

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Decoded | tuple[str, str]:
        path = self.pairs[index].image
        try:
            return self.decode(path)
        except UnidentifiedImageError:
            return path, NOT_AN_IMAGE
        # Pillow's plugins raise almost anything on malformed input, and one bad image must not stop the run.
        except Exception as error:
            return path, getattr(error, "strerror", None) or describe(error)

    def decode(self, path: str) -> Decoded:
        return decode_file(path, self.sizes, self.crops, self.mask)


class ImagesOfSamples(ImageFiles):
    """The same of samples in memory."""

    def __init__(self, samples: Samples, sizes: list[tuple[int, int]], crops: int = 1, mask: str | None = None):
        super().__init__(samples.pairs, sizes, crops, mask)
        self.samples = samples

    def decode(self, path: str) -> Decoded:
        mask = self.samples.mask(path) if self.mask == "files" else None
        return _decode_image(path, mask, self._read, (self.sizes, self.crops, self.mask))

    def _read(self, path):
        return self.samples.read(path), 0  # not its time: the same image in another tar gives the same sidecar


def decode_file(path: str, sizes: list[tuple[int, int]], crops: int = 1, mask: str | None = None) -> Decoded:
    """Reads a file once, so that the header fields describe exactly the bytes that were decoded.

    Args:
        sizes: as of `decode`.
        crops: number of crops, as of `crop_boxes`; their places depend on the content of the file alone.
        mask: "files": the fourth channel is the image's mask file, white where there is none; "alpha": the image's
            own opacity; None: there is none.

    Raises:
        OSError, ValueError and whatever Pillow raises on malformed input.
    """
    return _decode_image(path, mask_file(path) if mask == "files" else None, _read_file, (sizes, crops, mask))


def _read_file(path):
    data, stat = read_with_stat(path, MAX_IMAGE)
    return data, stat.st_mtime_ns


def _decode_image(path, mask_path, read, settings):
    """Decodes an image and its mask, if there is one.

    Args:
        read: function of a path that returns (bytes, mtime_ns).
        settings: (sizes, crops, mask) as of `decode_file`.
    """
    sizes, crops, mask = settings
    data, mtime_ns = read(path)
    sha256 = hashlib.sha256(data).hexdigest()
    boxes_of = partial(crop_boxes, number=crops, seed=int(sha256[:16], 16))
    channels = (to_rgb, to_alpha) if mask == "alpha" else (to_rgb,)
    pixels, original_size, boxes = _decode_leniently(_decode, data, sizes, boxes_of, channels)
    height, width = pixels.shape[1:3]
    fields = {
        "source_size": str(len(data)),
        "source_mtime_ns": str(mtime_ns),
        "source_sha256": sha256,
        "width": str(width),
        "height": str(height),
        "original_width": str(original_size[0]),
        "original_height": str(original_size[1]),
    }
    fields |= {numbered("crop_box", i): ",".join(f"{edge:g}" for edge in box) for i, box in enumerate(boxes)}
    if mask == "files":
        masks, mask_fields = _read_mask(mask_path, read, original_size, (width, height), boxes)
        pixels, fields = np.concatenate([pixels, masks], axis=-1), fields | mask_fields
    return Decoded(path, pixels, fields)


def _read_mask(path, read, original_size, size, boxes):
    """Reads a mask and crops it like its image; None: white.

    Returns:
        (uint8 array [crops, height, width, 1], header fields).
    """
    if path is None:
        return np.full((len(boxes), size[1], size[0], 1), 255, np.uint8), {}
    try:
        data, mtime_ns = read(path)
        masks = _decode_leniently(_decode_mask, data, original_size, size, boxes)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: {NOT_AN_IMAGE}") from None
    # Pillow's plugins raise almost anything on malformed input.
    except Exception as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or describe(error)}") from error
    return masks, {
        "mask_size": str(len(data)),
        "mask_mtime_ns": str(mtime_ns),
        "mask_sha256": hashlib.sha256(data).hexdigest(),
    }


def decode(data: bytes, sizes: list[tuple[int, int]]) -> tuple[np.ndarray, tuple[int, int], Box]:
    """Decodes an image file's bytes: upright, sRGB, on white, cover-resized and center-cropped.

    Metadata that cannot be read is ignored.

    Args:
        data: content of the file; of an animation, the first frame is taken.
        sizes: list of (width, height) in pixels; the nearest in aspect ratio is taken.

    Returns:
        (uint8 array [height, width, 3],
         (width, height) of the upright original,
         crop box in its pixels).
    """
    pixels, original_size, boxes = _decode_leniently(_decode, data, sizes, crop_boxes, (to_rgb,))
    return pixels[0], original_size, boxes[0]


def _decode_leniently(decode_data, data, *settings):
    """decode_data(data, *settings); if that fails, with less metadata."""
    with warnings.catch_warnings():
        # About odd metadata and about large images (twice that size is an error): neither changes the pixels.
        warnings.simplefilter("ignore")
        try:
            return decode_data(data, *settings)
        # Pillow's plugins raise almost anything on malformed input.
        except Exception:
            for less in with_less_metadata(data):
                with suppress(Exception):
                    return decode_data(less, *settings)
            raise


def _decode(
    data: bytes, sizes: list[tuple[int, int]], boxes_of: Callable, channels: tuple[Callable, ...]
) -> tuple[np.ndarray, tuple[int, int], list[Box]]:
    """Decodes an image; returns (uint8 array [crops, height, width, channels], original (width, height), boxes)."""
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
        boxes = boxes_of(original_size, width, height)
        # The reduced size is rounded up, so the boxes are computed in the original and then scaled.
        scaled = [tuple(edge / reduction for edge in box) for box in boxes]
        return _resized(image, turn, (width, height), scaled, channels), original_size, boxes


def _decode_mask(data, image_size, size, boxes):
    """Decodes a mask whose image has `image_size` (width, height): uint8 [crops, height, width, 1]."""
    with open_image(data) as image:
        image.load()
        turn = orientation(image)
        width, height = image.size[::-1] if turn > 4 else image.size
        # A smaller copy, with sides rounded to pixels, has the same shape.
        if abs(width * image_size[1] - height * image_size[0]) > max(image_size):
            expected = "{}x{}".format(*image_size)
            raise ValueError(f"is {width}x{height}, its image {expected}; expected the same aspect ratio")
        x, y = width / image_size[0], height / image_size[1]
        scaled = [
            (left * x, top * y, min(right * x, width), min(bottom * y, height)) for left, top, right, bottom in boxes
        ]
        return _resized(image, turn, size, scaled, (to_gray,))


def _resized(image, turn, size, boxes, channels):
    """Returns the parts of the upright image in `boxes`, resized to `size` (width, height).

    Large images are converted in bands of rows, as a whole copy in RGB and its intermediate steps would take several
    times the memory of the image. The bands overlap by what the filter sees, so that the pixels are the same.

    Args:
        channels: functions like to_rgb, which give the channels.

    Returns:
        uint8 array [crops, height, width, channels].
    """
    step = size[1] * _BAND_PIXELS // (image.size[0] * image.size[1])
    if step < size[1]:
        parts = [[_in_bands(image, turn, size, box, to, max(step, 1)) for to in channels] for box in boxes]
    else:
        whole = [upright(to(image, image), turn) for to in channels]
        parts = [[part.resize(size, Image.Resampling.BICUBIC, box=box) for part in whole] for box in boxes]
    return np.stack([np.dstack(crop) for crop in parts])


def _in_bands(image, turn, size, box, to, step):
    """Like upright(to(image, image), turn).resize(size, BICUBIC, box), `step` rows at a time."""
    (width, height), (left, top, right, bottom) = size, box
    num_rows = image.size[0] if turn > 4 else image.size[1]  # upright
    scale, bands = (bottom - top) / height, []
    margin = math.ceil(_BICUBIC_SUPPORT * max(scale, 1)) + 1
    for start in range(0, height, step):
        end = min(start + step, height)
        upper, lower = top + start * scale, top + end * scale
        first, last = max(0, math.floor(upper) - margin), min(num_rows, math.ceil(lower) + margin)
        band = upright(to(image.crop(stored_rows(image.size, turn, first, last)), image), turn)
        part = (left, upper - first, right, min(lower, num_rows) - first)
        bands.append(np.asarray(band.resize((width, end - start), Image.Resampling.BICUBIC, box=part)))
    return np.concatenate(bands)


def crop_boxes(size: tuple[int, int], width: int, height: int, number: int = 1, seed: int = 0) -> list[Box]:
    """Places crops of the ratio width:height in an image: the first in its center, the others at random.

    There are fewer where the image has less room, in pixels of the resized one; if it has the ratio, there is one.

    Args:
        size: (width, height) of the image.
        width, height: of the resized image.
        number: of crops, at most.
        seed: of the places, below 2**64.
    """
    center = cover_box(size, width, height)
    left, top, right, bottom = center
    room = size[0] - (right - left), size[1] - (bottom - top)
    number = min(number, 1 + int(max(room) * width / (right - left)))
    boxes = [center]
    for place in np.random.Generator(np.random.Philox(key=seed)).random(number - 1):
        x, y = float(place * room[0]), float(place * room[1])  # one of the two is 0
        boxes.append((x, y, min(x + right - left, float(size[0])), min(y + bottom - top, float(size[1]))))
    return boxes


def cover_box(size: tuple[int, int], width: int, height: int) -> Box:
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
        (list of (uint8 array [b, crops, height, width, channels], list of b (path, header fields)),
         list of (path, reason)).
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
