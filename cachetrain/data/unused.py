"""Counts what a walk finds in data directories and does not use, so that nothing is passed over in silence."""

import os
import re
from collections import Counter
from collections.abc import Collection

from cachetrain.data.captions import Pair, read_caption
from cachetrain.data.masks import MASK_SUFFIX, is_mask
from cachetrain.data.sidecar import NULL_STEM
from cachetrain.log import counted, warn

MULTIPLY = "multiply.txt"

_MAX_KINDS, _MAX_LISTED = 100, 8
_MAX_FILE_NAME_CAPTIONS = 0.1  # share of the captions above which a warning is due
_NUMBERED = re.compile(r"[0-9]+_.+")  # folders whose number other trainers take for repeats
_SIDECAR = re.compile(r".*\.(img|txt)_[^.]+")  # the usual suffixes, and those of other --cache_suffix like .img_tiny
_LISTS = {"*.jsonl", "*.csv", "*.parquet", "*.json"}
_OURS = re.compile(rf"_upscaled\..+\.txt|{NULL_STEM}\..+|{re.escape(MULTIPLY)}|shapes\.json")


def is_numbered(folder: str) -> bool:
    """Whether a folder has a name like 10_cats, from which other trainers take repeats."""
    return _NUMBERED.fullmatch(os.path.basename(os.path.abspath(folder))) is not None


def repeats_in_name(folder: str) -> float:
    """10.0 of a folder 10_cats; only for folders that are numbered."""
    return float(os.path.basename(os.path.abspath(folder)).split("_")[0])


class Unused:
    """Counts files and folders that caching and training pass over; memory does not grow with their number.

    Attributes:
        num_pairs: number of images that are used.
        num_file_names: of these, how many have their file name as caption.
    """

    def __init__(self):
        self.num_pairs = 0
        self.num_file_names = 0
        self._first_file_name = None  # Pair
        self._counts = Counter()  # by kind
        self._first = {}  # kind -> name

    def add_pair(self, pair: Pair) -> None:
        self.num_pairs += 1
        if pair.caption_file is None:
            self.num_file_names += 1
            self._first_file_name = self._first_file_name or pair

    def add_reserved(self, name: str) -> None:
        """Counts an image whose sidecars would take the place of the null caption's."""
        self._add(f"image{{s}} named {NULL_STEM}", name)

    def add_file(self, name: str) -> None:
        """Counts a file that is neither image nor caption; sidecars, and lists that cache scripts write, are not."""
        if not _SIDECAR.fullmatch(name) and not _OURS.fullmatch(name):
            extension = MASK_SUFFIX if name.endswith(MASK_SUFFIX) else os.path.splitext(name)[1].lower()
            kind = f"*{extension}" if extension else "without extension"
            self._add(
                "mask{s} with a suffix in capitals" if is_mask(name) and extension != MASK_SUFFIX else kind, name
            )

    def add_lone_mask(self, name: str) -> None:
        """Counts a mask that is no image's."""
        self._add("mask{s} without an image", name)

    def add_folder(self, path: str, captions: Collection[str], names: Collection[str]) -> None:
        """Counts what a folder of images holds in vain: captions without an image, a number in its name.

        Args:
            captions: names of the captions without an image.
            names: of all images and captions in the folder.
        """
        for name in captions:
            if name.startswith(f"{NULL_STEM}.") or not _OURS.fullmatch(name):
                self._add("caption{s} without an image", name)
        if names and is_numbered(path) and MULTIPLY not in names:
            self._add(
                f"folder{{s}} whose number counts only in a {MULTIPLY} or with --kohya_repeats",
                os.path.basename(path),
            )

    def line(self) -> str:
        """`found and not used: 3 *.heic (phone.heic, ...), 1 *.jsonl (metadata.jsonl)`; "" if all is used."""
        parts = []
        for kind, count in self._counts.most_common(_MAX_LISTED):
            kind_of = kind.replace("{s}", "s" if count > 1 else "")
            parts.append(f"{count:,} {kind_of} ({self._first[kind]}{', ...' if count > 1 else ''})")
        rest = self._counts.total() - sum(count for _, count in self._counts.most_common(_MAX_LISTED))
        parts += [counted(rest, "other")] if rest else []
        hint = "; dataset_scripts/import_captions.py reads lists of captions" if self._counts.keys() & _LISTS else ""
        hint += "; --mask files of the image cache scripts uses masks" if f"*{MASK_SUFFIX}" in self._counts else ""
        return f"found and not used: {', '.join(parts)}{hint}" if parts else ""

    def warn_of_file_names(self) -> None:
        """Warns if more than a tenth of the captions are file names."""
        if self.num_file_names > _MAX_FILE_NAME_CAPTIONS * self.num_pairs:
            pair = self._first_file_name
            try:
                text = repr(read_caption(pair).text)
            except ValueError:
                text = "no text"
            warn(
                f"file names serve as captions of {self.num_file_names:,} of {counted(self.num_pairs, 'image')}, as "
                f"{text} of {pair.image}; "
                "if that is not intended, write each caption to a .txt of the image's name"
            )

    def _add(self, kind, name):
        if kind not in self._counts and len(self._counts) >= _MAX_KINDS:
            kind = "of other kinds"
        self._counts[kind] += 1
        self._first.setdefault(kind, name)
