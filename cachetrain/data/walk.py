"""The one walk of data directories, in caching and training, and what it finds: images with captions, sidecars.

Folders come depth first, each before its sub-folders, names sorted. Hidden files and folders are skipped, symbolic
links are followed, and a folder that several paths lead to is visited once. Memory and time are linear in the number
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

# Called with the path of a file or folder that is skipped, and the reason.
OnError = Callable[[str, str], None]


class Folder(NamedTuple):
    """One folder of a walk: its path, and the sorted names of the files that are of interest."""

    path: str
    names: list[str]


class Pairs:
    """An append-only list of Pair that takes little more memory than the bytes of the paths."""

    def __init__(self):
        self._images = PackedStrings()
        self._captions = bytearray()  # index into CAPTION_SUFFIXES; its length where there is no caption file

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
    """Yields the folders under `root`, itself first, in the order that the module describes.

    Args:
        visited: real paths of the folders visited so far, which are skipped; the walk adds its own.
        keep: whether a file of this name is of interest.
        on_error: called for each folder that cannot be read; None: the OSError is raised.
        remove_abandoned: delete temporary files that killed runs have left.
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
    """Yields one Pair per image under `roots`; also removes temporary files that killed cache runs have left.

    Args:
        on_error: called for each folder that cannot be read, and for an image that would share its sidecar with
            another one.

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
    """Yields a Pair per image of one folder; `_null_caption.*` is none. `on_error`: as in `find_images`."""
    captions = {name for name in folder.names if name.endswith(CAPTION_SUFFIXES)}
    image_of_stem = {}
    for name in folder.names:
        stem, extension = os.path.splitext(name)
        if extension.lower() not in IMAGE_SUFFIXES or stem == NULL_STEM:
            continue
        path = os.path.join(folder.path, name)
        if stem in image_of_stem:
            on_error(path, f"would share its sidecar with {image_of_stem[stem]} beside it; rename one of the two")
            continue
        image_of_stem[stem] = name
        caption = next((stem + suffix for suffix in CAPTION_SUFFIXES if stem + suffix in captions), None)
        yield Pair(path, caption and os.path.join(folder.path, caption))


def null_pair(root: str | os.PathLike) -> Pair:
    """The Pair of the unconditional embedding: the file name gives it an empty caption."""
    return Pair(os.path.join(root, NULL_STEM), None)


def find_sidecars(paths: Iterable[str], suffixes: Iterable[str]) -> Iterator[str]:
    """Yields the paths of sidecars.

    Args:
        paths: sidecars, which are taken as they are, and folders to search.
        suffixes: of the sidecars in folders.

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
        pass  # another run has removed it, or the folder is read-only: no harm done
