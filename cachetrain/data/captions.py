"""Where an image's caption comes from; used for caching, training and samples.

The caption of `a.jpg` is the text of `a.txt`, else of `a.caption`, else the file name up to its first underscore.
Suffixes may be in capitals. Caption files are UTF-8, with or without a byte order mark; leading and trailing white
space is stripped.
"""

import hashlib
import os
from typing import NamedTuple

from cachetrain.reading import decoded, read_with_stat

CAPTION_SUFFIXES = (".txt", ".caption")
MAX_CAPTION = 2**20  # bytes; what is longer is no caption


class Pair(NamedTuple):
    """An image and the file that holds its caption (None: the caption comes from the image's file name).

    Attributes:
        more: further files with captions of the image, as `a.caption` and `a.long.txt` beside `a.txt`, if asked for.
    """

    image: str
    caption_file: str | None
    more: tuple[str, ...] = ()

    @property
    def caption_files(self) -> tuple[str, ...]:
        return (self.caption_file, *self.more) if self.caption_file else ()

    @property
    def with_one_file(self) -> "Pair":
        """The pair as found without further files: `a.long.txt` alone is no caption of `a.jpg` then."""
        suffix = (self.caption_file or "")[len(os.path.splitext(self.image)[0]) :]
        return Pair(self.image, self.caption_file if suffix.lower() in CAPTION_SUFFIXES else None)


class Caption(NamedTuple):
    """A caption, with size and mtime of its file as stored in sidecar headers.

    A caption taken from the file name has its length in bytes as size, and mtime "0".
    """

    text: str
    size: str
    mtime_ns: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_caption(pair: Pair) -> Caption:
    """Reads the caption of a pair.

    Raises:
        OSError: the caption file cannot be read, or has more than MAX_CAPTION bytes.
        ValueError: the caption is not UTF-8 text.
    """
    if pair.caption_file is None:
        return _caption_from_name(os.path.splitext(pair.image)[0])
    data, stat = read_with_stat(pair.caption_file, MAX_CAPTION)
    return Caption(decoded(pair.caption_file, data).strip(), str(stat.st_size), str(stat.st_mtime_ns))


def caption_order(suffix: str) -> tuple:
    """Sorts the caption files of an image by suffix: .txt, .caption, then the others, as .long.txt, by name."""
    lower = suffix.lower()
    known = CAPTION_SUFFIXES.index(lower) if lower in CAPTION_SUFFIXES else len(CAPTION_SUFFIXES)
    return known, suffix.swapcase()  # a.txt before a.TXT


def all_caption_files(stem: str) -> list[str]:
    """The paths of all files that hold captions of the image `stem`.*, also `stem`.long.txt; lists the folder."""
    folder, name = os.path.split(stem)
    names = (other for other in os.listdir(folder or ".") if other.startswith(f"{name}."))
    suffixes = (other[len(name) :] for other in names if other.lower().endswith(CAPTION_SUFFIXES))
    return [stem + suffix for suffix in sorted(suffixes, key=caption_order)]


def caption_file(stem: str) -> str | None:
    """The path of the file that holds the caption of the image `stem`.*; None if there is none."""
    suffixes = (spelling for suffix in CAPTION_SUFFIXES for spelling in (suffix, suffix.upper(), suffix.title()))
    return next((stem + suffix for suffix in suffixes if os.path.exists(stem + suffix)), None)


def _caption_from_name(stem):
    # `a man riding_(1)` -> `a man riding`
    text = os.path.basename(stem).split("_")[0].strip()
    try:
        return Caption(text, str(len(text.encode())), "0")
    except UnicodeEncodeError:
        raise ValueError(f"{stem}: its name is its caption, but not UTF-8 text; write a .txt beside it") from None
