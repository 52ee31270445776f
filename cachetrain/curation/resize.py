"""Copies an image at a largest size, with its captions and its mask."""

import io
import os
import warnings
from argparse import Namespace
from collections.abc import Iterable

from PIL import Image

from cachetrain.atomic import atomic_write
from cachetrain.caching.pixels import open_image, orientation, to_rgb, upright
from cachetrain.data.captions import Pair
from cachetrain.data.masks import mask_file
from cachetrain.data.unused import MULTIPLY
from cachetrain.data.walk import MAX_IMAGE
from cachetrain.log import describe
from cachetrain.reading import read_bytes

_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}


def copy_pair(pair: Pair, args: Namespace) -> tuple[str, str | None]:
    """Copies a pair to the same relative path; never raises.

    Args:
        args: data_root, out, max_side, quality, dry_run.

    Returns:
        (outcome "resized", "turned upright", "copied", "kept" or "failed"; the reason if it failed).
    """
    try:
        data = _read(pair.image)
        data, suffix, outcome = resized(data, args.max_side, args.quality)
        target = os.path.join(args.out, os.path.relpath(pair.image, args.data_root))
        target = os.path.splitext(target)[0] + suffix if suffix else target
        if os.path.lexists(target):
            outcome = "kept"
        elif not args.dry_run:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            # First, so that an image that is there has its captions and its mask, which may be larger.
            for path in filter(None, (*pair.caption_files, mask_file(pair.image))):
                _copy(path, args)
            atomic_write(target, data)
        return outcome, None
    except Exception as error:  # Pillow's plugins raise almost anything on malformed input
        return "failed", f"{pair.image}: {describe(error)}"


def copy_multiples(pairs: Iterable[Pair], seen: set[str], args: Namespace) -> list[str]:
    """Copies the multiply.txt of the folders that hold the pairs, and of those above; returns what failed.

    Args:
        seen: the folders done so far, relative to data_root; those of the pairs are added.
        args: as of `copy_pair`.
    """
    failures = []
    for pair in pairs:
        folder = os.path.dirname(os.path.relpath(pair.image, args.data_root))
        while folder not in seen:
            seen.add(folder)
            path = os.path.join(args.data_root, folder, MULTIPLY)
            try:
                if os.path.lexists(path) and not args.dry_run:
                    _copy(path, args)
            except OSError as error:
                failures.append(describe(error))
            folder = os.path.dirname(folder)  # in the end "", which is data_root
    return failures


def resized(data: bytes, max_side: int, quality: int) -> tuple[bytes, str | None, str]:
    """Reduces the image in a file's bytes; returns (bytes, suffix that the copy needs or None, outcome)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_image(data) as image:
            kind = {"MPO": "JPEG"}.get(image.format, image.format)
            image.load()
            turn = orientation(image)
            if max(image.size) <= max_side and turn == 1:
                return data, None, "copied"
            outcome = "resized" if max(image.size) > max_side else "turned upright"
            profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "L") else None
            if image.mode in ("P", "LA", "PA") and image.has_transparency_data:
                image = image.convert("RGBA")  # which to_rgb would put on white
            pixels = image if image.mode in ("RGB", "RGBA", "L") else to_rgb(image, image)
            pixels = upright(pixels, turn)
            pixels.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    kind = kind if kind in _SUFFIXES else "PNG"
    file, options = io.BytesIO(), {} if kind == "PNG" else {"quality": quality}
    pixels.save(file, kind, icc_profile=profile, exif=Image.Exif(), **options)
    return file.getvalue(), _SUFFIXES[kind], outcome


def _copy(path, args):
    """Copies a file as it is, unless there is one."""
    copy = os.path.join(args.out, os.path.relpath(path, args.data_root))
    if not os.path.lexists(copy):
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        atomic_write(copy, _read(path))


def _read(path):
    return read_bytes(path, MAX_IMAGE)
