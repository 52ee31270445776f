"""Walks data directories and lists images with their captions, or sidecars; used by caching and training.

Folders come depth first, each before its subfolders, names sorted. Hidden files and folders are skipped, as are those
in which other programs keep thumbnails and deleted files. Symbolic links are followed, and a folder reachable by
several paths is visited once. Memory and time are linear in the number of files, and no file is opened.
"""

import os
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from errno import ELOOP
from typing import NamedTuple, TypeVar

from cachetrain.atomic import is_abandoned
from cachetrain.data.captions import CAPTION_SUFFIXES, Pair, caption_order
from cachetrain.data.many_files import PackedStrings
from cachetrain.data.masks import MASK_SUFFIX, is_mask
from cachetrain.data.sidecar import NULL_STEM
from cachetrain.data.unused import Unused

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jfif .jpe .png .webp .bmp .gif .tif .tiff .avif .jp2 .ppm .pgm .tga".split())

MAX_IMAGE = 2**30  # bytes of a file; more are not read

# For str.endswith, which takes a third of the time of os.path.splitext.
_IMAGES = tuple(IMAGE_SUFFIXES)
_SOURCES = (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES)

# Where other programs keep thumbnails, resource forks and deleted files.
SKIPPED_FOLDERS = frozenset(
    ("@eaDir", "__MACOSX", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)

# Called as on_error(path, reason) for each file or folder that is skipped.
OnError = Callable[[str, str], None]

T = TypeVar("T")


class Folder(NamedTuple):
    """One folder of a walk.

    Attributes:
        names: of the files that match, sorted.
        links: those of the names that are symbolic links.
        settled: whether all could be read, and no link leads nowhere; else the folder may hold other names at another
            time although nothing in it changes.
    """

    path: str
    names: list[str]
    links: Collection[str] = frozenset()
    settled: bool = True


class Leftovers:
    """Counts, while images are listed, the sidecars of one suffix whose image is gone, and what is not used at all.

    Args:
        suffix: of the sidecars.
        masks: whether mask files are used.

    Attributes:
        unused: Unused.
    """

    def __init__(self, suffix: str, masks: bool = False):
        self.suffix = suffix
        self.masks = masks
        self.unused = Unused()
        self._orphans = {}  # root -> how many
        self._roots_with_images = set()

    @property
    def orphans(self) -> dict[str, int]:
        """Root -> number of sidecars without an image. A root that holds no images at all has none."""
        return {root: count for root, count in self._orphans.items() if root in self._roots_with_images}

    def keep(self, name: str) -> bool:
        """Whether a walk has to list a file; counts it as unused if not."""
        if is_source(name) or name.endswith(self.suffix) or (self.masks and name.endswith(MASK_SUFFIX)):
            return True
        self.unused.add_file(name)
        return False

    def add_folder(self, root: str, folder: Folder) -> None:
        stems = image_stems(folder.names)
        if stems:
            self._roots_with_images.add(root)
        orphans = (
            name.endswith(self.suffix)
            and name.removesuffix(self.suffix) not in stems
            and name != NULL_STEM + self.suffix
            and possible_image(name, stems) is None
            for name in folder.names
        )
        if count := sum(orphans):
            self._orphans[root] = self._orphans.get(root, 0) + count
        for name in filter(is_mask, folder.names):
            if name.removesuffix(MASK_SUFFIX) not in stems:
                self.unused.add_lone_mask(name)


class Pairs:
    """An append-only list of Pair that needs little more memory than the bytes of the paths."""

    def __init__(self):
        self._images = PackedStrings()
        self._captions = array("I")  # place in _suffixes
        self._suffixes = []  # tuples of the suffixes of a pair's caption files, in the spellings found
        self._places = {}  # such a tuple -> its place in _suffixes

    def append(self, pair: Pair) -> None:
        self._images.append(pair.image)
        stem = os.path.splitext(pair.image)[0]
        suffixes = tuple(path[len(stem) :] for path in pair.caption_files)
        if suffixes not in self._places:
            self._places[suffixes] = len(self._suffixes)
            self._suffixes.append(suffixes)
        self._captions.append(self._places[suffixes])

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> Pair:
        image = self._images[index]
        stem = os.path.splitext(image)[0]
        file, *more = [stem + suffix for suffix in self._suffixes[self._captions[index]]] or [None]
        return Pair(image, file, tuple(more))


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
        keep, on_error, remove_abandoned: of `list_folder`.
    """
    return traverse(root, visited, lambda path: list_folder(path, keep, on_error, remove_abandoned))


def traverse(
    root: str | os.PathLike, visited: set[str], list_one: Callable[[str], tuple[T, Collection[str]]]
) -> Iterator[T]:
    """Yields what is listed of `root` and the folders under it, in the order described above.

    Args:
        visited: as of `walk_folders`.
        list_one: returns (what is yielded of a folder, the sorted names of its subfolders).
    """
    stack = [os.fspath(root)]
    while stack:
        path = stack.pop()
        real_path = os.path.realpath(path)
        if real_path in visited:
            continue
        visited.add(real_path)
        listed, subfolders = list_one(path)
        yield listed
        stack.extend(os.path.join(path, name) for name in reversed(subfolders))


def list_folder(
    path: str, keep: Callable[[str], bool], on_error: OnError | None = None, remove_abandoned: bool = False
) -> tuple[Folder, list[str]]:
    """Lists one folder; returns (Folder, sorted names of its subfolders).

    Args:
        keep: whether to list a file with this name.
        on_error: called for each file or folder that cannot be read; None: the OSError is raised. The files of a
            folder that can be read only in part are not listed: images would lose their captions.
        remove_abandoned: delete temporary files left behind by killed runs.
    """
    names, subfolders, links, settled = [], [], set(), True

    def fail(*error):
        nonlocal settled
        settled = False
        on_error(*error)

    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    if remove_abandoned:
                        _remove_if_abandoned(entry.path)
                elif _is_dir(entry, on_error and fail):
                    if entry.name not in SKIPPED_FOLDERS:
                        subfolders.append(entry.name)
                elif keep(entry.name):
                    names.append(entry.name)
                    if entry.is_symlink():
                        links.add(entry.name)
                elif settled and entry.is_symlink():
                    settled = os.path.exists(entry.path)  # else it may lead to a folder at another time
    except OSError as error:
        if on_error is None:
            raise
        fail(path, f"cannot be read: {error.strerror}")
        names = []
    return Folder(path, sorted(names), links, settled), sorted(subfolders)


def find_images(
    roots: Iterable[str], on_error: OnError, leftovers: Leftovers | None = None, all_captions: bool = False
) -> Iterator[Pair]:
    """Yields one Pair per image under `roots`; also removes temporary files left behind by killed cache runs.

    Args:
        on_error: called for each file or folder that cannot be read, and for each image whose sidecar name is already
            taken by another image.
        leftovers: counts what else is found.
        all_captions: see `pair_up`.

    Raises:
        ValueError: a root is not a directory.
    """
    visited, keep = set(), is_source if leftovers is None else leftovers.keep
    for root in roots:
        if not os.path.isdir(root):
            raise ValueError(f"--data_root {root}: no such directory")
        for folder in walk_folders(root, visited, keep, on_error, remove_abandoned=True):
            yield from pair_up(folder, on_error, leftovers and leftovers.unused, all_captions)
            if leftovers is not None:
                leftovers.add_folder(root, folder)


def pair_up(
    folder: Folder, on_error: OnError, unused: Unused | None = None, all_captions: bool = False
) -> Iterator[Pair]:
    """Yields one Pair per image of a folder, except `_null_caption.*`.

    Args:
        on_error: see `find_images`.
        unused: counts what is not used.
        all_captions: find all caption files of an image, `a.long.txt` too, and fill Pair.more.
    """
    captions = {}  # stem -> name
    for suffix in reversed(CAPTION_SUFFIXES):
        captions |= {name[: -len(suffix)]: name for name in folder.names if name.lower().endswith(suffix)}
    more = _all_captions(folder.names, captions) if all_captions else {}
    image_of_stem = {}
    for name in folder.names:
        if not is_image(name):
            continue
        if (stem := name[: name.rindex(".")]) == NULL_STEM:
            if unused is not None:
                unused.add_reserved(name)
            continue
        path = os.path.join(folder.path, name)
        if stem in image_of_stem:
            on_error(path, f"would share its sidecar with {image_of_stem[stem]}; rename one of the two images")
            continue
        image_of_stem[stem] = name
        caption = captions.pop(stem, None)
        pair = Pair(path, caption and os.path.join(folder.path, caption))
        if stem in more:
            first, *others = (os.path.join(folder.path, name) for name in more[stem])
            pair = Pair(path, first, tuple(others))
        if unused is not None:
            unused.add_pair(pair)
        yield pair
    if unused is not None:
        unused.add_folder(folder.path, captions.values(), folder.names if image_of_stem else ())


def _all_captions(names, captions):
    """Returns stem of an image -> its caption files: .txt, .caption, then the others by name.

    Args:
        names: of the images and captions in a folder.
        captions: stem -> name of a caption; those that belong to an image of another stem, as `a.long.txt` to
            `a.jpg`, are removed.
    """
    stems, files = image_stems(names), {}
    for name in names:
        suffix = next((suffix for suffix in CAPTION_SUFFIXES if name.lower().endswith(suffix)), None)
        stem = own = name[: -len(suffix)] if suffix else ""
        while stem and stem not in stems:
            stem = stem.rpartition(".")[0]
        if stem:
            files.setdefault(stem, []).append(name[len(stem) :])
            if stem != own and captions.get(own) == name:
                del captions[own]
    return {stem: [stem + one for one in sorted(of_stem, key=caption_order)] for stem, of_stem in files.items()}


def has_images(root: str | os.PathLike) -> bool:
    """Whether there is an image in or below a folder; looks no further than the first folder with one."""
    return any(folder.names for folder in walk_folders(root, set(), is_image, lambda *_: None))


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
    """Whether a file of this name is an image; masks are none."""
    return name.lower().endswith(_IMAGES) and not is_mask(name)


def image_stems(names: Iterable[str]) -> set[str]:
    """Names of the images among some files, without their suffixes."""
    return {name[: name.rindex(".")] for name in names if is_image(name)}


def possible_image(name: str, stems: Collection[str]) -> str | None:
    """The stem of an image that a sidecar of this name may belong to: `a.256.img_sdxl` to `a`, as to `a.256`."""
    return next((name[:i] for i, character in enumerate(name) if character == "." and name[:i] in stems), None)


def is_source(name: str) -> bool:
    """Whether a file of this name is an image or a caption."""
    return name.lower().endswith(_SOURCES) and not is_mask(name)


def _is_dir(entry, on_error):
    try:
        return entry.is_dir()
    except OSError as error:  # a mount whose server is gone; a link that leads to itself is as good as none
        if error.errno != ELOOP:
            if on_error is None:
                raise
            on_error(entry.path, f"cannot be read: {error.strerror}")
        return False


def _remove_if_abandoned(path):
    try:
        if is_abandoned(path):
            os.unlink(path)
    except OSError:
        pass  # another run was faster, or the folder is read-only: harmless
