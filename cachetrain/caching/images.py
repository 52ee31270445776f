"""From an image file to the pixels that the VAE sees. Runs in worker processes; needs Pillow and numpy only."""

import hashlib
import io
import os
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cachetrain.caching.buckets import nearest_size

# What `decode` does beyond its arguments: part of every image sidecar's settings.
POLICY = {"resample": "bicubic", "alpha": "white", "exif": "transpose"}

# JPEGs are decoded at a reduced scale only while at least this many times the target remains, so that the final
# antialiased resize still decides what the pixels are.
_DRAFT_MARGIN = 2


class Decoded(NamedTuple):
    """One image: uint8 pixels [height, width, 3], and the fields of its sidecar's header."""

    path: str
    pixels: np.ndarray
    fields: dict[str, str]


class ImageFiles:
    """Map-style dataset over Pairs: item i is a Decoded, or (path, reason) for an image that cannot be read.

    Args:
        pairs: scan.Pairs.
        sizes: list of (width, height); each image takes the one nearest to it in aspect ratio.
    """

    def __init__(self, pairs, sizes):
        self.pairs, self.sizes = pairs, sizes

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        path = self.pairs[index].image
        try:
            return decode_file(path, self.sizes)
        except UnidentifiedImageError:
            return path, "not an image that Pillow can identify"
        # Pillow's plugins raise nearly anything on malformed input, and one bad image must not stop the rest.
        except Exception as error:
            return path, f"{type(error).__name__}: {error}"


def decode_file(path, sizes):
    """Reads a file once and returns it as Decoded; its header fields describe exactly the bytes decoded.

    Raises:
        OSError, ValueError and whatever Pillow raises on malformed input.
    """
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        data = file.read()
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


def decode(data, sizes):
    """Decodes an image file's bytes: upright, RGB, on white, cover-resized and centre-cropped.

    Args:
        data: content of the file; of an animation the first frame counts.
        sizes: list of (width, height) in pixels, of which the nearest in aspect ratio is taken.

    Returns:
        (uint8 array [height, width, 3],
         (width, height) of the upright original,
         crop box (left, top, right, bottom) in its pixels).
    """
    with warnings.catch_warnings():
        # Metadata quirks, and "large image" (twice that size is an error): neither spoils the pixels.
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            stored_size, swapped = image.size, image.getexif().get(0x0112) in (5, 6, 7, 8)
            original_size = stored_size[::-1] if swapped else stored_size
            width, height = nearest_size(original_size, sizes)
            goal = (height, width) if swapped else (width, height)
            if min(stored_size[0] / goal[0], stored_size[1] / goal[1]) > _DRAFT_MARGIN:
                image.draft(None, (goal[0] * _DRAFT_MARGIN, goal[1] * _DRAFT_MARGIN))
            reduction = round(stored_size[0] / image.size[0])
            rgb = to_rgb(ImageOps.exif_transpose(image))
    crop_box = cover_box(original_size, width, height)
    # A reduced size is rounded up, so the box is placed in the original and scaled.
    box = tuple(edge / reduction for edge in crop_box)
    return np.array(rgb.resize((width, height), Image.Resampling.BICUBIC, box=box)), original_size, crop_box


def cover_box(size, width, height):
    """The largest centred box of the ratio width:height in an image of `size` (width, height)."""
    scale = min(size[0] / width, size[1] / height)
    left, top = (size[0] - width * scale) / 2, (size[1] - height * scale) / 2
    # max: rounding must not put the box outside of the image, which Pillow refuses.
    left, top = max(left, 0.0), max(top, 0.0)
    return left, top, size[0] - left, size[1] - top


def to_rgb(image):
    """Converts any Pillow image to mode RGB; transparency shows white, 16 bits are scaled to 8.

    Raises:
        ValueError: floating-point pixels, whose range the file does not tell.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit gray at 255.
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def collate(items):
    """Joins what one batch of workers' items holds by size.

    Returns:
        (list of (uint8 tensor [b, height, width, 3], list of b (path, header fields)), list of (path, reason)).
    """
    import torch

    decoded, failures = {}, []
    for item in items:
        if isinstance(item, Decoded):
            decoded.setdefault(item.pixels.shape, []).append(item)
        else:
            failures.append(item)
    groups = [
        (torch.from_numpy(np.stack([item.pixels for item in group])), [(item.path, item.fields) for item in group])
        for group in decoded.values()
    ]
    return groups, failures
