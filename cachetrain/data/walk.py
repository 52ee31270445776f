"""Walks data directories and lists images with their captions, or sidecars; used by caching and training.

Folders come depth first, each before its subfolders, names sorted. Hidden files and folders are skipped. Symbolic
links are followed, and a folder reachable by several paths is visited once. Memory and time are linear in the number
of files, and no file is opened.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from cachetrain.atomic import is_abandoned
from cachetrain.data.captions import CAPTION_SUFFIXES, Pair
from cachetrain.data.many_files import PackedStrings
from cachetrain.data.sidecar import NULL_STEM

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jfif .jpe .png .webp .bmp .gif .tif .tiff .avif .jp2 .ppm .pgm .tga".split())

# Called as on_error(path, reason) for each file or folder that is skipped.
OnError = Callable[[str, str], None]


class Folder(NamedTuple):
    """One folder of a walk: path, and the sorted names of the files that match."""

    path: str
    names: list[str]


class Pairs:
    """An append-only list of Pair that needs little more memory than the bytes of the paths."""

    def __init__(self):
        self._images = PackedStrings()
        self._captions = bytearray()  # index into CAPTION_SUFFIXES; len(CAPTION_SUFFIXES): no caption file

    def append(self, pair: Pair) -> None:
        self._images.append(pair.image)
        extension = os.path.splitext(pair.caption_file or "")[1]
        self._captions.append(CAPTION_SUFFIXES.index(extension) if extension else len(CAPTION_SUFFIXES))

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> Pair:
        image, caption = self._images[index], self._captions[index]
        if caption == len(CAPTION_SUFFIXES):
            return Pair(image, None)
        return Pair(image, os.path.splitext(image)[0] + CAPTION_SUFFIXES[caption])


def walk_folders(
    root: str | os.PathLike,
    visited: set[str],
    keep: Callable[[str], bool],
    on_error: OnError | None = None,
    remove_abandoned: bool = False,
) -> Iterator[Folder]:
    """Yields `root` and the folders under it, in the order described above.

    Args:
        visited: real paths of the folders visited so far, which are skipped; the walk adds to this set.
        keep: whether to list a file with this name.
        on_error: called for each folder that cannot be read; None: the OSError is raised.
        remove_abandoned: delete temporary files left behind by killed runs.
    """
    stack = [os.fspath(root)]
    while stack:
        path = stack.pop()
        real_path = os.path.realpath(path)
        if real_path in visited:
            continue
        visited.add(real_path)
        names, subfolders = [], []
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        if remove_abandoned:
                            _remove_if_abandoned(entry.path)
                    elif _is_dir(entry):
                        subfolders.append(entry.name)
                    elif keep(entry.name):
                        names.append(entry.name)
        except OSError as error:
            if on_error is None:
                raise
            on_error(path, f"cannot be read: {error.strerror}")
        names.sort()
        yield Folder(path, names)
        stack.extend(os.path.join(path, name) for name in sorted(subfolders, reverse=True))


def find_images(roots: Iterable[str], on_error: OnError) -> Iterator[Pair]:
    """Yields one Pair per image under `roots`; also removes temporary files left behind by killed cache runs.

    Args:
        on_error: called for each folder that cannot be read, and for each image whose sidecar name is already taken
            by another image.

    Raises:
        ValueError: a root is not a directory.
    """
    visited = set()
    for root in roots:
        if not os.path.isdir(root):
            raise ValueError(f"--data_root {root}: no such directory")
        for folder in walk_folders(root, visited, is_source, on_error, remove_abandoned=True):
            yield from pair_up(folder, on_error)


def pair_up(folder: Folder, on_error: OnError) -> Iterator[Pair]:
    """Yields one Pair per image of a folder, except `_null_caption.*`. `on_error`: see `find_images`."""
    captions = {name for name in folder.names if name.endswith(CAPTION_SUFFIXES)}
    image_of_stem = {}
    for name in folder.names:
        stem, extension = os.path.splitext(name)
        if extension.lower() not in IMAGE_SUFFIXES or stem == NULL_STEM:
            continue
        path = os.path.join(folder.path, name)
        if stem in image_of_stem:
            on_error(path, f"would share its sidecar with {image_of_stem[stem]}; rename one of the two images")
            continue
        image_of_stem[stem] = name
        caption = next((stem + suffix for suffix in CAPTION_SUFFIXES if stem + suffix in captions), None)
        yield Pair(path, caption and os.path.join(folder.path, caption))


def null_pair(root: str | os.PathLike) -> Pair:
    """The Pair of the unconditional embedding; the caption taken from this file name is empty."""
    return Pair(os.path.join(root, NULL_STEM), None)


def find_sidecars(paths: Iterable[str], suffixes: Iterable[str]) -> Iterator[str]:
    """Yields the paths of sidecars.

    Args:
        paths: sidecars, or folders to search for sidecars.
        suffixes: suffixes of the sidecars to list in folders.

    Raises:
        ValueError: a path does not exist.
        OSError: a folder cannot be read.
    """
    visited, suffixes = set(), tuple(suffixes)
    for path in paths:
        if os.path.isfile(path):
            yield os.fspath(path)
        elif not os.path.isdir(path):
            raise ValueError(f"{path}: no such file or directory")
        else:
            for folder in walk_folders(path, visited, lambda name: name.endswith(suffixes)):
                yield from (os.path.join(folder.path, name) for name in folder.names)


def is_image(name: str) -> bool:
    """Whether a file of this name is an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_source(name: str) -> bool:
    """Whether a file of this name is an image or a caption."""
    extension = os.path.splitext(name)[1].lower()
    return extension in IMAGE_SUFFIXES or extension in CAPTION_SUFFIXES


def _is_dir(entry):
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link that leads to itself


def _remove_if_abandoned(path):
    try:
        if is_abandoned(path):
            os.unlink(path)
    except OSError:
        pass  # another run was faster, or the folder is read-only: harmless
