"""Lists the pairs of sidecars in folders: which files belong together, how often they come up, what is not used."""

from __future__ import annotations

import argparse
import codecs
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cachetrain import cli
from cachetrain.data.links import Links
from cachetrain.data.many_files import PackedStrings
from cachetrain.data.shard_set import folder_suffix, shard_folders
from cachetrain.data.sidecar import NULL_STEM
from cachetrain.data.unused import MULTIPLY, is_numbered, repeats_in_name
from cachetrain.data.walk import image_stems, is_image, walk_folders
from cachetrain.log import warn
from cachetrain.reading import read_bytes

_MULTIPLE = cli.Number(float, 0, cli.repeats.most)


class Folders:
    """Lists data directories one after the other; a folder that lies in several belongs to the first of them.

    Args:
        image_suffixes: of the image sidecars of a pair.
        text_suffix: of its text sidecar.
        one_text: whether one text sidecar serves all images, so that those beside the images do not count.
        kohya_repeats: a folder like 10_name without a multiply.txt has its number as if it were in one.

    Attributes:
        links: Links.
        numbered_folders: PackedStrings of folders like 10_name without a multiply.txt.
        num_unpaired, num_without_image, num_alone, num_without_pair: as of PairIndex.
    """

    def __init__(self, image_suffixes: Sequence[str], text_suffix: str, one_text: bool, kohya_repeats: bool):
        self.links = Links(image_suffixes[0], text_suffix)
        self.numbered_folders = PackedStrings()
        self.num_unpaired = self.num_without_image = self.num_alone = self.num_without_pair = 0
        self._image_suffixes = tuple(image_suffixes)
        self._text_suffix = text_suffix
        self._one_text = one_text
        self._kohya_repeats = kohya_repeats
        self._visited = set()  # real paths of folders

    def add_directory(self, directory: str) -> bool:
        """Notes a directory that is listed by other means; returns whether it has been listed already."""
        real_path = os.path.realpath(directory)
        self.links.num_repeated += real_path in self._visited
        return real_path in self._visited or self._visited.add(real_path)

    def pairs_in(self, directory: str) -> Iterator[tuple[float, list[str]]]:
        """Yields (number from multiply.txt, sorted stems that have all sidecars) for each folder not listed yet.

        Counts sidecars without a partner, and pairs without an image.

        Raises:
            ValueError: there is no such directory, a multiply.txt holds no number, or a shard set lies in it.
            OSError: a multiply.txt cannot be read.
        """
        if not Path(directory).is_dir():
            raise ValueError(f"{directory}: no such directory")
        suffixes = (*self._image_suffixes, self._text_suffix)
        multiples = {}  # folder -> number that applies in and below the folder, where not 1
        num_without_image, has_images = 0, False

        def keep(name):
            return name.endswith(suffixes) or is_image(name) or name == MULTIPLY

        for found in walk_folders(directory, self._visited, keep, _warn_of_skipped_folder):
            folder, names, _ = found
            _check_no_shards(folder, directory)
            multiple = multiples.get(os.path.dirname(folder), 1.0)
            if MULTIPLY in names:
                multiple = _read_multiple(os.path.join(folder, MULTIPLY))
            numbered = MULTIPLY not in names and is_numbered(folder)
            if numbered and self._kohya_repeats:
                multiple = repeats_in_name(folder)
            if multiple != 1.0:
                multiples[os.path.dirname(os.path.join(folder, ""))] = multiple
            stems = self._paired(names)
            images = image_stems(names)
            has_images = has_images or bool(images)
            num_with_image = sum(stem in images for stem in stems)
            num_without_image += len(stems) - num_with_image
            self.num_without_pair += len(images) - num_with_image - (NULL_STEM in images)
            if not self._one_text:
                stems = self.links.without_repeated(found, stems, self._visited)
            if stems and numbered and (self._kohya_repeats or multiple == 1.0):
                self.numbered_folders.append(folder)
            yield multiple, [os.path.join(folder, stem) for stem in stems]
        if has_images:
            self.num_without_image += num_without_image
        else:
            self.num_alone += num_without_image

    def _paired(self, names):
        """The sorted stems that have all sidecars."""
        suffixes = self._image_suffixes if self._one_text else (*self._image_suffixes, self._text_suffix)
        stems = [{name.removesuffix(suffix) for name in names if name.endswith(suffix)} for suffix in suffixes]
        paired = set.intersection(*stems) - {NULL_STEM}
        self.num_unpaired += sum(len(of_suffix - paired - {NULL_STEM}) for of_suffix in stems)
        return sorted(paired)


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
