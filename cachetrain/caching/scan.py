"""Finds images and their captions. Memory and time are linear in the number of files; no file is opened here."""

import hashlib
import os
import re
import time
from typing import NamedTuple

from cachetrain.sidecar import NULL_STEM

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jfif .jpe .png .webp .bmp .gif .tif .tiff .avif .jp2 .ppm .pgm .tga".split())
CAPTION_SUFFIXES = (".txt", ".caption")

# What atomic_write leaves behind when its process is killed.
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_LEFTOVER_AGE_S = 3600


class Pair(NamedTuple):
    """An image and the file that holds its caption (None: the caption is the image's file name)."""

    image: str
    caption_file: str | None


class Caption(NamedTuple):
    """A caption as it is encoded, with the state of its source as the header keeps it."""

    text: str
    size: str
    mtime_ns: str

    @property
    def sha256(self):
        return hashlib.sha256(self.text.encode()).hexdigest()


def scan(roots, suffix, fail):
    """Yields one Pair per image under `roots`, sorted within each folder, sub-folders after their parent's files.

    Hidden files and folders, sidecars and `_null_caption.*` are no images. Symbolic links are followed, each folder
    is visited once.

    Args:
        roots: directories.
        suffix: of the sidecars; temporary files that killed runs left of them are removed.
        fail: called as fail(path, reason) for folders that cannot be read, and for the second of two images that
            would share a sidecar.

    Raises:
        ValueError: a root is not a directory.
    """
    visited = set()
    for root in roots:
        if not os.path.isdir(root):
            raise ValueError(f"--data_root {root}: no such directory")
        for folder, names in _folders(root, visited, suffix, fail):
            yield from _pairs(folder, names, fail)


def null_pair(root):
    """The Pair of the unconditional embedding: by the file-name rule below its caption is the empty string."""
    return Pair(os.path.join(root, NULL_STEM), None)


def read_caption(pair):
    """Reads one caption: surrounding white space removed, a byte order mark too.

    Raises:
        OSError: the caption file cannot be read.
        ValueError: it is not UTF-8.
    """
    if pair.caption_file is None:
        # `a man riding_(1).png` -> `a man riding`
        text = os.path.splitext(os.path.basename(pair.image))[0].split("_")[0].strip()
        return Caption(text, str(len(text.encode())), "0")
    with open(pair.caption_file, "rb") as file:
        stat = os.fstat(file.fileno())
        data = file.read()
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error}); save it as UTF-8") from error
    return Caption(text, str(stat.st_size), str(stat.st_mtime_ns))


def _folders(root, visited, suffix, fail):
    """Yields (folder, sorted names of its files), depth first, and removes leftovers of killed runs."""
    stack = [os.fspath(root)]
    while stack:
        folder = stack.pop()
        real = os.path.realpath(folder)
        if real in visited:
            continue
        visited.add(real)
        names, subfolders = [], []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        _remove_leftover(entry, suffix)
                    else:
                        (subfolders if entry.is_dir() else names).append(entry.name)
        except OSError as error:
            fail(folder, f"cannot be read: {error.strerror}")
        yield folder, sorted(names)
        stack.extend(os.path.join(folder, name) for name in sorted(subfolders, reverse=True))


def _pairs(folder, names, fail):
    files = set(names)
    first_of_stem = {}
    for name in names:
        stem, extension = os.path.splitext(name)
        if extension.lower() not in IMAGE_SUFFIXES or stem == NULL_STEM:
            continue
        path = os.path.join(folder, name)
        if stem in first_of_stem:
            fail(path, f"would share its sidecar with {first_of_stem[stem]} beside it; rename one of the two")
            continue
        first_of_stem[stem] = name
        caption = next((stem + suffix for suffix in CAPTION_SUFFIXES if stem + suffix in files), None)
        yield Pair(path, caption and os.path.join(folder, caption))


def _remove_leftover(entry, suffix):
    if suffix in entry.name and _LEFTOVER.fullmatch(entry.name):
        try:
            # A younger one may belong to a run that is still writing it.
            if time.time() - entry.stat(follow_symlinks=False).st_mtime > _LEFTOVER_AGE_S:
                os.unlink(entry.path)
        except OSError:
            pass  # another run removed it, or the folder is read-only: it harms nobody
