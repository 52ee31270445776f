"""Finds images and their captions. Memory and time are linear in the number of files; no file is opened here."""

import hashlib
import os
from typing import NamedTuple

from cachetrain.atomic import is_abandoned
from cachetrain.data.many_files import PackedStrings
from cachetrain.data.sidecar import NULL_STEM

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jfif .jpe .png .webp .bmp .gif .tif .tiff .avif .jp2 .ppm .pgm .tga".split())
CAPTION_SUFFIXES = (".txt", ".caption")


class Pair(NamedTuple):
    """An image and the file that holds its caption (None: the caption is the image's file name)."""

    image: str
    caption_file: str | None


class Pairs:
    """An append-only list of Pair, in little more memory than its paths' bytes."""

    def __init__(self):
        self._images, self._captions = PackedStrings(), bytearray()

    def append(self, pair):
        self._images.append(pair.image)
        extension = os.path.splitext(pair.caption_file or "")[1]
        self._captions.append(CAPTION_SUFFIXES.index(extension) if extension else len(CAPTION_SUFFIXES))

    def __len__(self):
        return len(self._captions)

    def __getitem__(self, index):
        image, caption = self._images[index], self._captions[index]
        if caption == len(CAPTION_SUFFIXES):
            return Pair(image, None)
        return Pair(image, os.path.splitext(image)[0] + CAPTION_SUFFIXES[caption])


class Caption(NamedTuple):
    """A caption as it is encoded, with the state of its source as the header keeps it."""

    text: str
    size: str
    mtime_ns: str

    @property
    def sha256(self):
        return hashlib.sha256(self.text.encode()).hexdigest()


def scan(roots, fail):
    """Yields one Pair per image under `roots`, sorted within each folder, sub-folders after their parent's files.

    Hidden files and folders and `_null_caption.*` are no images. Symbolic links are followed, each folder is
    visited once. Temporary files that killed runs left are removed.

    Args:
        roots: directories.
        fail: called as fail(path, reason) for folders that cannot be read, and for the second of two images that
            would share a sidecar.

    Raises:
        ValueError: a root is not a directory.
    """
    visited = set()
    for root in roots:
        if not os.path.isdir(root):
            raise ValueError(f"--data_root {root}: no such directory")
        for folder, names in walk_folders(root, visited, is_source, fail, remove_abandoned=True):
            yield from pair_up(folder, names, fail)


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


def find_sidecars(paths, suffixes):
    """Yields the paths (str) of sidecars, sorted within each folder; nothing is opened.

    Args:
        paths: sidecar files, which are taken as they are, and folders, searched to any depth.
        suffixes: what a sidecar's name ends with, one or several of them.

    Raises:
        ValueError: a path does not exist.
        OSError: a folder cannot be read.
    """
    visited = set()
    for path in paths:
        if os.path.isfile(path):
            yield os.fspath(path)
        elif not os.path.isdir(path):
            raise ValueError(f"{path}: no such file or directory")
        else:
            for folder, names in walk_folders(path, visited, lambda name: name.endswith(tuple(suffixes))):
                yield from (os.path.join(folder, name) for name in names)


def is_source(name):
    """Whether a file of this name is an image or a caption."""
    extension = os.path.splitext(name)[1].lower()
    return extension in IMAGE_SUFFIXES or extension in CAPTION_SUFFIXES


def walk_folders(root, visited, keep, fail=None, remove_abandoned=False):
    """Yields (folder, sorted names of those files that `keep` says), depth first.

    Args:
        visited: real paths of folders seen so far; grows.
        fail: called as fail(folder, reason) for one that cannot be read; None raises.
        remove_abandoned: temporary files that killed runs left.
    """
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
                        if remove_abandoned:
                            _remove_if_abandoned(entry.path)
                    elif entry.is_dir():
                        subfolders.append(entry.name)
                    elif keep(entry.name):
                        names.append(entry.name)
        except OSError as error:
            if fail is None:
                raise
            fail(folder, f"cannot be read: {error.strerror}")
        names.sort()
        yield folder, names
        stack.extend(os.path.join(folder, name) for name in sorted(subfolders, reverse=True))


def pair_up(folder, names, fail):
    """Yields a Pair per image among the sorted `names` of a folder's files; `fail` as in `scan`."""
    captions = {name for name in names if name.endswith(CAPTION_SUFFIXES)}
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
        caption = next((stem + suffix for suffix in CAPTION_SUFFIXES if stem + suffix in captions), None)
        yield Pair(path, caption and os.path.join(folder, caption))


def _remove_if_abandoned(path):
    try:
        if is_abandoned(path):
            os.unlink(path)
    except OSError:
        pass  # another run removed it, or the folder is read-only: it harms nobody
