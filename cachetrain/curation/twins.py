"""Writes the captions in lists to a .txt beside each image, and accounts for every row."""

import os
from collections import Counter

from cachetrain.atomic import atomic_write
from cachetrain.curation.lists import Row
from cachetrain.data.captions import caption_file
from cachetrain.data.walk import IMAGE_SUFFIXES, is_image
from cachetrain.log import describe
from cachetrain.reading import read_bytes

_SPELLINGS = sorted({*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES)})
# Outcomes of a row that leave an image of the list without its caption.
LOST = ("no such image", "outside of the folder", "not text", "repeated", "failed")


class Importer:
    """Writes the rows of lists as `.txt` beside their images, and counts every row.

    Args:
        root: folder to which the names in lists are relative, and which no caption leaves.
        overwrite: replace captions that exist.
        dry_run: write nothing.

    Attributes:
        counts: number of rows by outcome: "written", "same", "kept", "empty", and those of LOST.
    """

    def __init__(self, root: str, overwrite: bool = False, dry_run: bool = False):
        self.root = os.path.abspath(root)
        self.overwrite = overwrite
        self.dry_run = dry_run
        self.counts = Counter()
        self._seen = {}  # stem of an image -> hash of its caption

    def add(self, row: Row) -> tuple[str, str]:
        """Handles one row; returns (outcome, the path or reason that explains it)."""
        outcome, detail = self._outcome(row)
        self.counts[outcome] += 1
        return outcome, detail

    def _outcome(self, row):
        if row.fault:
            return "not text", row.fault
        if row.image is None or row.caption is None or "\0" in row.image + row.caption:
            return "not text", "expected the name of an image and its caption, both texts"
        path = os.path.normpath(os.path.join(self.root, row.image))
        if not path.startswith(os.path.join(self.root, "")):
            return "outside of the folder", row.image
        stem = _stem_of_image(path)
        if stem is None:
            return "no such image", path
        text = row.caption.strip()
        if not text:
            return "empty", path
        if stem in self._seen:
            return ("same" if self._seen[stem] == hash(text) else "repeated"), path
        self._seen[stem] = hash(text)
        try:
            return self._write(stem, text.encode())
        except (OSError, UnicodeEncodeError) as error:
            return "failed", describe(error)

    def _write(self, stem, data):
        found = caption_file(stem)
        target = found if found and found.lower().endswith(".txt") else f"{stem}.txt"
        if found or os.path.lexists(target):
            if found and _content(found).strip() == data:
                return "same", found
            if not self.overwrite:
                return "kept", found or target
        if not self.dry_run:
            atomic_write(target, data + b"\n")
        return "written", target


def _content(path):
    return read_bytes(path).removeprefix(b"\xef\xbb\xbf")


def _stem_of_image(path):
    """The path of an image without its suffix, which lists of kohya may omit; None if there is no such image."""
    try:
        if is_image(path) and os.path.isfile(path):
            return path[: path.rindex(".")]
        return path if any(os.path.isfile(path + suffix) for suffix in _SPELLINGS) else None
    except (OSError, ValueError):  # too long, or no text
        return None
