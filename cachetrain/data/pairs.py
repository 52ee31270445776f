"""Lists which pairs of sidecars there are, in which order, and where their sidecars lie."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cachetrain.data.folders import Folders, overlaps
from cachetrain.data.many_files import PackedStrings
from cachetrain.data.shard_set import ShardSet, shard_folders
from cachetrain.data.sidecar import NULL_STEM
from cachetrain.log import warn

FOLDER_BLOCK = 2048  # as many pairs as a shard has by default


class PairList:
    """The pairs in some directories, without a Python object per pair: the part of PairIndex that reads no headers.

    Args:
        directories, image_suffix, text_suffix, one_text: as of PairIndex.
    """

    def __init__(
        self,
        directories: Iterable[str | os.PathLike],
        image_suffix: str | Sequence[str],
        text_suffix: str,
        one_text: str | None,
    ):
        self.image_suffixes = (image_suffix,) if isinstance(image_suffix, str) else tuple(image_suffix)
        self.text_suffix = text_suffix
        self.sizes = len(self.image_suffixes)
        self.one_text = one_text
        self.directories = [os.fspath(directory) for directory in directories]
        self._stems = PackedStrings()
        self._starts = []  # for each directory, the place of its first pair in _stems
        self._positions = None  # in a subset, its samples in the whole index
        self._sets = {}  # number of a directory that is a shard set -> ShardSet
        self._columns = {}  # the same -> its Columns, until headers are read
        self._known = {}  # number of a directory with an index file -> (Known, places of its pairs), until then

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._stems) * self.sizes if self._positions is None else len(self._positions)

    @property
    def num_pairs(self) -> int:
        return len(self) // self.sizes

    @property
    def spans(self) -> list[range]:
        """For each directory, the numbers of its pairs in the whole index."""
        ends = [*self._starts[1:], len(self._stems)]
        return [range(start, end) for start, end in zip(self._starts, ends, strict=True)]

    def samples_of(self, pairs: np.ndarray) -> np.ndarray:
        """The samples of these pairs, numbered from 0; int arrays."""
        return (pairs[:, None] * self.sizes + np.arange(self.sizes)).ravel()

    def stem(self, i: int) -> str:
        """Path of sample `i` without a suffix."""
        return self._stems[self._place(i) // self.sizes]

    def relative_name(self, i: int) -> str:
        """Path of pair `i` without a suffix, relative to its data directory."""
        return self.stem(i)[len(self.directories[self._directory_of(i)]) :].lstrip(os.sep)

    def image_path(self, i: int) -> str:
        return self._image_path_at(self._place(i))

    def text_path(self, i: int) -> str:
        """Path of the text sidecar of sample `i`; for messages, as in a shard set it is no path."""
        if (packed := self._packed(i)) and not self.one_text:
            return packed[0].where(packed[1], self.sizes)
        return self.one_text or self.stem(i) + self.text_suffix

    def caption_stem(self, i: int) -> str:
        """Path without suffix of the text sidecar of pair `i`, beside which its caption lies."""
        return os.path.splitext(self.one_text)[0] if self.one_text else self.stem(i)

    def stems_checksum(self) -> int:
        """Checksum of the paths of all pairs."""
        return self._stems.checksum()

    def _list_pairs(self, repeats, kohya_repeats, index_files, sets):
        """Lists the pairs of all directories; returns float32 [N], the repeats of all samples."""
        folders = Folders(self.image_suffixes, None if self.one_text else self.text_suffix, kohya_repeats)
        of_pairs, directories = [], []
        for directory, number in zip(self.directories, repeats, strict=True):
            start, num_repeated = len(self._stems), folders.links.num_repeated
            is_set = directory in sets or shard_folders(directory, self.image_suffixes[0])
            if is_set and not folders.add_directory(directory):
                of_pairs.append(number * self._list_set(directory, len(directories), sets.get(directory)))
            else:
                file = index_files and index_files.open(directory, self._suffixes)
                of_pairs.append(number * self._list_folders(directory, folders, file))
                if file and len(self._stems) > start:
                    self._known |= index_files.listed(file, len(directories))
            if len(self._stems) > start:
                self._starts.append(start)
                directories.append(directory)
            elif folders.links.num_repeated > num_repeated or overlaps(directory, directories):
                warn(
                    f"{directory}: all of its pairs are also in a directory given before it; they count once, with "
                    "the repeats of that directory"
                )
            else:
                expected = " and ".join(f"*{suffix}" for suffix in self._suffixes)
                raise ValueError(f"{directory}: no pairs of {expected}; run the cache scripts on it first")
        self.directories = directories
        self.links, self.numbered_folders = folders.links, folders.numbered_folders
        self.num_unpaired = folders.num_unpaired + sum(one.num_unpaired for one in self._sets.values())
        self.num_without_image, self.num_alone = folders.num_without_image, folders.num_alone
        self.num_without_pair = folders.num_without_pair
        return np.concatenate(of_pairs).astype(np.float32).repeat(self.sizes)

    @property
    def _suffixes(self):
        return *self.image_suffixes, *([] if self.one_text else [self.text_suffix])

    def _list_folders(self, directory, folders, file):
        """Lists the pairs of a folder and those below it, with its IndexFile if any; returns their repeats."""
        multiples = [np.zeros(0)]
        options = {"saved": file.saved, "times_of": file.times_of} if file else {}
        for pairs in folders.pairs_in(directory, **options):
            if file:
                file.add(pairs, len(self._stems))
            self._stems.extend(os.fsencode(os.path.join(pairs.listed.folder.path, "")), pairs.stems)
            multiples.append(np.full(len(pairs.stems), pairs.multiple))
        return np.concatenate(multiples)

    def _list_set(self, directory, number, shard_set):
        """Lists the pairs of a shard set, directory `number` of those with pairs; returns their repeats."""
        shard_set = shard_set or ShardSet(directory, self._suffixes)
        root = os.fsencode(os.path.join(directory, ""))
        columns = shard_set.read_indexes(self.sizes, lambda name: self._stems.append_bytes(root + name))
        self._sets[number], self._columns[number] = shard_set, columns
        return columns.repeats

    def _list_blocks(self):
        ends = [[0]]
        for number, span in enumerate(self.spans):
            of_folder = np.arange(span.start + FOLDER_BLOCK, span.stop, FOLDER_BLOCK)
            ends += [span.start + self._sets[number].ends if number in self._sets else of_folder, [span.stop]]
        return np.unique(np.concatenate(ends)) * self.sizes

    def _packed(self, i):
        """(ShardSet, number of the pair in it) of sample `i`; None if its sidecars are files."""
        if not self._sets:
            return None
        directory = self._directory_of(i)
        if directory not in self._sets:
            return None
        return self._sets[directory], self._place(i) // self.sizes - self._starts[directory]

    def _place(self, i):
        """The number of sample `i` in the whole index, of which this may be a subset."""
        return i if self._positions is None else int(self._positions[i])

    def _directory_of(self, i):
        return self._directory_at(self._place(i))

    def _directory_at(self, place):
        """Number of the directory of a sample of the whole index."""
        return bisect_right(self._starts, place // self.sizes) - 1

    def _image_path_at(self, place):
        directory = self._directory_at(place)
        if directory in self._sets:
            pair = place // self.sizes - self._starts[directory]
            return self._sets[directory].where(pair, place % self.sizes)
        return self._stems[place // self.sizes] + self.image_suffixes[place % self.sizes]

    def first_like(self, i: int) -> str:
        """The path of the first image sidecar of the directory and size of sample `i`."""
        start = self._starts[self._directory_of(i)]
        return self._image_path_at(start * self.sizes + self._place(i) % self.sizes)


def null_caption_path(directories: Iterable[str | os.PathLike], text_suffix: str) -> Path | None:
    """Path of the first `_null_caption` sidecar found in the data directories; None if there is none."""
    folders = ([directory, *shard_folders(directory, text_suffix)] for directory in directories)
    paths = (Path(folder) / (NULL_STEM + text_suffix) for of_directory in folders for folder in of_directory)
    return next((path for path in paths if path.exists()), None)
