"""Lists the pairs of sidecars in folders: which files belong together, how often they come up, what is not used."""

from __future__ import annotations

import argparse
import codecs
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cachetrain import cli
from cachetrain.data.links import Links
from cachetrain.data.many_files import PackedStrings
from cachetrain.data.shard_set import folder_suffix, shard_folders
from cachetrain.data.sidecar import NULL_STEM
from cachetrain.data.unused import MULTIPLY, is_numbered, repeats_in_name
from cachetrain.data.walk import Folder, image_stems, is_image, list_folder, traverse
from cachetrain.log import warn
from cachetrain.reading import read_bytes

_MULTIPLE = cli.Number(float, 0, cli.repeats.most)


class Listed(NamedTuple):
    """What a folder holds, whatever was listed before it.

    Attributes:
        folder: Folder; without names, if it comes from an index file.
        subfolders: sorted names.
        stems: those that have all sidecars, sorted, as the file system encodes them.
        has_multiple: whether it holds a multiply.txt.
        num_unpaired: number of sidecars without a partner.
        num_images, num_with_image: number of images, and of pairs that have one.
        times: when its list of files last changed, (mtime_ns, ctime_ns); None: not to be relied on.
        first: place of its first pair in the index file; None: it does not come from one.
    """

    folder: Folder
    subfolders: list[str]
    stems: list[bytes]
    has_multiple: bool
    num_unpaired: int
    num_images: int
    num_with_image: int
    times: tuple[int, int] | None = None
    first: int | None = None


class Pairs(NamedTuple):
    """The pairs of a folder that count.

    Attributes:
        multiple: number from multiply.txt.
        listed: Listed.
        stems: of the pairs; all of those listed, but for pairs that were listed before.
    """

    multiple: float
    listed: Listed
    stems: list[bytes]


class Folders:
    """Lists data directories one after the other; a folder that lies in several belongs to the first of them.

    Args:
        image_suffixes: of the image sidecars of a pair.
        text_suffix: of its text sidecar; None: one text sidecar serves all images.
        kohya_repeats: a folder like 10_name without a multiply.txt has its number as if it were in one.

    Attributes:
        links: Links.
        numbered_folders: PackedStrings of folders like 10_name without a multiply.txt.
        num_unpaired, num_without_image, num_alone, num_without_pair: as of PairIndex.
    """

    def __init__(self, image_suffixes: Sequence[str], text_suffix: str | None, kohya_repeats: bool):
        self.links = Links(image_suffixes[0], text_suffix or "")
        self.numbered_folders = PackedStrings()
        self.num_unpaired = self.num_without_image = self.num_alone = self.num_without_pair = 0
        self._suffixes = (*image_suffixes, *([] if text_suffix is None else [text_suffix]))
        self._one_text = text_suffix is None
        self._kohya_repeats = kohya_repeats
        self._visited = set()  # real paths of folders

    def add_directory(self, directory: str) -> bool:
        """Notes a directory that is listed by other means; returns whether it has been listed already."""
        real_path = os.path.realpath(directory)
        return real_path in self._visited or self._visited.add(real_path)

    def pairs_in(
        self,
        directory: str,
        saved: Callable[[str], Listed | None] = lambda _: None,
        times_of: Callable[[str], tuple[int, int] | None] = lambda _: None,
    ) -> Iterator[Pairs]:
        """Yields Pairs of each folder not listed yet. Counts sidecars without a partner, and pairs without an image.

        Args:
            saved: returns what an index file says of a folder; None: the folder is listed.
            times_of: returns Listed.times of a folder that is going to be listed.

        Raises:
            ValueError: there is no such directory, a multiply.txt holds no number, or a shard set lies in it.
            OSError: a multiply.txt cannot be read.
        """
        if not Path(directory).is_dir():
            if Path(directory).exists():
                raise ValueError(f"{directory}: is a file; expected a directory, or a set's freeze-*.safetensors")
            raise ValueError(f"{directory}: no such directory")
        multiples = {}  # folder -> number that applies in and below the folder, where not 1
        num_without_image, has_images = 0, False

        def list_one(path):
            listed = saved(path) or self._list(path, times_of(path))
            return listed, listed.subfolders

        for listed in traverse(directory, self._visited, list_one):
            folder = listed.folder.path
            _check_no_shards(folder, directory)
            multiple = multiples.get(os.path.dirname(folder), 1.0)
            if listed.has_multiple:
                multiple = _read_multiple(os.path.join(folder, MULTIPLY))
            numbered = not listed.has_multiple and is_numbered(folder)
            if numbered and self._kohya_repeats:
                multiple = repeats_in_name(folder)
            if multiple != 1.0:
                multiples[os.path.dirname(os.path.join(folder, ""))] = multiple
            self.num_unpaired += listed.num_unpaired
            has_images = has_images or listed.num_images > 0
            num_without_image += len(listed.stems) - listed.num_with_image
            self.num_without_pair += listed.num_images - listed.num_with_image
            stems = listed.stems
            if not self._one_text:
                stems = self.links.without_repeated(listed.folder, stems, self._visited)
            if stems and numbered and (self._kohya_repeats or multiple == 1.0):
                self.numbered_folders.append(folder)
            yield Pairs(multiple, listed, stems)
        if has_images:
            self.num_without_image += num_without_image
        else:
            self.num_alone += num_without_image

    def _list(self, path, times):
        folder, subfolders = list_folder(path, self._keep, _warn_of_skipped_folder)
        names = folder.names
        stems = [{name.removesuffix(suffix) for name in names if name.endswith(suffix)} for suffix in self._suffixes]
        paired = set.intersection(*stems) - {NULL_STEM}
        images = image_stems(names) - {NULL_STEM}
        fixed = folder.settled and not any(name.endswith(self._suffixes) for name in folder.links)
        return Listed(
            folder=folder,
            subfolders=subfolders,
            stems=list(map(os.fsencode, sorted(paired))),
            has_multiple=MULTIPLY in names,
            num_unpaired=sum(len(of_suffix - paired - {NULL_STEM}) for of_suffix in stems),
            num_images=len(images),
            num_with_image=len(images & paired),
            times=times if fixed else None,
        )

    def _keep(self, name):
        return name.endswith(self._suffixes) or is_image(name) or name == MULTIPLY


def overlaps(directory: str, others: Sequence[str]) -> bool:
    """Whether a directory is the same as one of the others, or lies in it, or it in the directory."""
    real_path, *real_paths = (os.path.join(os.path.realpath(path), "") for path in (directory, *others))
    return any(real_path.startswith(other) or other.startswith(real_path) for other in real_paths)


def _check_no_shards(folder, directory):
    """Refuses a folder of shards inside a directory that is listed for its sidecars."""
    shard_set, name = os.path.split(os.path.abspath(folder))
    if (suffix := folder_suffix(name)) and shard_folders(shard_set, suffix):
        raise ValueError(
            f"{folder}: is part of the shard set {shard_set}, which is not read as part of {directory}; give the "
            "set as a directory of its own, or move it elsewhere"
        )


def _warn_of_skipped_folder(folder, reason):
    warn(f"{folder}: {reason}; sidecars in this folder are not used")


def _read_multiple(path):
    content = read_bytes(path)
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as Windows' editors and shells write it
    text = content.decode("utf-16" if utf16 else "utf-8-sig", errors="replace").strip()
    try:
        return _MULTIPLE(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(
            f"{path}: {text[:40]!r}; expected one number {_MULTIPLE.range}: how often the images of this folder come "
            "up in an epoch"
        ) from error
