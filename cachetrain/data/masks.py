"""Mask files: `a.mask.png` beside `a.jpg` says by its gray levels which parts of the image are trained (white)."""

import os

MASK_SUFFIX = ".mask.png"


def is_mask(name: str) -> bool:
    """Whether a file of this name is a mask, and so no image. Only one with a suffix in small letters is used."""
    return name.lower().endswith(MASK_SUFFIX)


def mask_file(image: str) -> str | None:
    """The path of the mask of an image, also of one that is a link to nothing; None if there is none."""
    path = os.path.splitext(image)[0] + MASK_SUFFIX
    return path if os.path.lexists(path) else None
