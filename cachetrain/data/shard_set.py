"""Shard sets: directories of shards, which training reads like a folder of sidecars.

    set/img_sdxl-1f0c2a9e/00012-5be2c0d1.tar       the image sidecars of some pairs
    set/txt_t5cache-88d1f3aa/00012-0c77e1f2.tar    the text sidecars of the same pairs
    set/txt_t5cache-88d1f3aa/_null_caption.txt_t5cache

The name of a folder is the suffix of its sidecars and a hash of what they agree on, RUN_KEYS; that of a shard is its
number and a hash of its content. Shards of the same number hold the same pairs, which are matched by name where one
half lacks some.
"""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cachetrain.data.shards import Shard, ShardIndex
from cachetrain.data.sidecar import RUN_KEYS, Header, SidecarError, header_of

if TYPE_CHECKING:
    import torch

_SHARD = re.compile(r"(?P<number>[0-9]{5,})-[0-9a-f]{8}\.tar")
_MAX_OPEN = 128  # shards that a process keeps open


class Columns(NamedTuple):
    """What the indexes of a set say about its M pairs, which have `sizes` image sidecars each.

    Attributes:
        shapes: distinct latent shapes, in the order in which pairs have them.
        shape_ids: places in `shapes`; like image_bytes and masked an int array [M * sizes].
        tokens, all_tokens: int arrays [M], as of PairIndex; 0 without text sidecars.
        repeats: float32 [M].
        widths, item_bytes, sources: of the text sidecars.
    """

    shapes: list[tuple[int, ...]]
    shape_ids: np.ndarray
    image_bytes: np.ndarray
    masked: np.ndarray
    tokens: np.ndarray
    all_tokens: np.ndarray
    repeats: np.ndarray
    widths: dict[str, int]
    item_bytes: int
    sources: set[str]


class ShardSet:
    """The pairs of a directory of shards, numbered from 0.

    Attributes:
        num_unpaired: number of rows without a partner in the other halves.
    """

    def __init__(self, directory: str, suffixes: Sequence[str]):
        """Lists the shards.

        Args:
            suffixes: of the sidecars of a pair.

        Raises:
            ValueError: there are no shards of a suffix, or several sets of them.
        """
        self.directory = directory
        self.suffixes = tuple(suffixes)
        self.num_unpaired = 0
        self._folders = [_folder_of(directory, suffix) for suffix in suffixes]
        listed = [numbered_shards(folder) for folder in self._folders]
        numbers = sorted(set.intersection(*map(set, listed)))
        self._paths = [[of_half[number] for of_half in listed] for number in numbers]
        for of_half in listed:
            self.num_unpaired += sum(len(Shard(path)) for number, path in of_half.items() if number not in numbers)
        self._ends = []  # of the pairs of each number
        self._rows = {}  # place of a number whose rows do not match one by one -> the rows in each half
        self._shards = {}  # (place of a number, half) -> Shard
        self._open = OrderedDict()  # those whose files are open, the last used ones at the end

    def read_indexes(self, sizes: int, add_name: Callable[[bytes], None]) -> Columns:
        """Reads all indexes; before that, no pair can be read.

        Args:
            sizes: number of image sidecars of a pair; the first suffixes are theirs.
            add_name: called with the name of each pair, as the file system encodes it.

        Raises:
            SidecarError: a shard is damaged, or not of the set.
        """
        columns, codes, firsts = {}, {}, None
        ends = []
        for place, paths in enumerate(self._paths):
            halves = [Shard(path) for path in paths]
            firsts = firsts or halves
            for first, shard in zip(firsts, halves, strict=True):
                check_alike(first, shard)
            rows = self._match(place, halves)
            names = halves[0].names()
            for row in rows[0].tolist():
                add_name(names[row])
            ends.append(len(rows[0]))
            for name, array in _columns(halves, rows, sizes, codes).items():
                columns.setdefault(name, []).append(array)
        self._ends = np.cumsum(np.array(ends, np.int64)).tolist()
        columns = {name: np.concatenate(arrays) for name, arrays in columns.items()}
        present, first = np.unique(columns["shape_ids"], return_index=True)
        present = present[np.argsort(first)]
        shapes, new_ids = list(codes), np.zeros(len(codes), np.uint16)
        new_ids[present] = np.arange(len(present))
        columns["shape_ids"] = new_ids[columns["shape_ids"]]
        text = firsts[-1].fields
        return Columns(
            shapes=[shapes[code] for code in present],
            widths=text["widths"],
            item_bytes=text["item_bytes"],
            sources=set(text["sources"]),
            **columns,
        )

    @property
    def ends(self) -> np.ndarray:
        """int64 array, where the pairs of each number end."""
        return np.array(self._ends, np.int64)

    def read(self, pair: int, half: int) -> bytes:
        """The bytes of a sidecar, verified; raises like Shard.read."""
        shard, row = self._at(pair, half)
        return bytes(shard.read(row))

    def header(self, pair: int, half: int) -> Header:
        """The Header of a sidecar, verified; raises like Shard.read."""
        return header_of(self.read(pair, half))

    def tensors(self, pair: int, half: int) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
        """As Shard.tensors."""
        shard, row = self._at(pair, half)
        return shard.tensors(row)

    def where(self, pair: int, half: int) -> str:
        """Where the sidecar is, for messages; see Shard.where."""
        shard, row = self._at(pair, half)
        return shard.where(row)

    def _match(self, place, halves):
        """For each half, the rows of the pairs that all halves have, in the order of the first half."""
        keys = [shard.arrays["key"] for shard in halves]
        if all(np.array_equal(keys[0], other) for other in keys[1:]):
            return [np.arange(len(keys[0]))] * len(halves)
        common = keys[0]
        for other in keys[1:]:
            common = common[np.isin(common, other)]
        rows = []
        for of_half in keys:
            order = np.argsort(of_half, kind="stable")
            rows.append(order[np.searchsorted(of_half, common, sorter=order)])
            self.num_unpaired += len(of_half) - len(common)
        self._rows[place] = rows
        return rows

    def _at(self, pair, half):
        place = bisect_right(self._ends, pair)
        row = pair - (self._ends[place - 1] if place else 0)
        if place in self._rows:
            row = int(self._rows[place][half][row])
        return self._shard(place, half), row

    def _shard(self, place, half):
        key = place, half
        if key not in self._shards:
            self._shards[key] = Shard(self._paths[place][half], verify_index=False)  # read_indexes has done it
        shard = self._shards[key]
        self._open[key] = shard
        self._open.move_to_end(key)
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        return shard

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_shards": {}, "_open": OrderedDict()}  # files are opened anew in another process


def _columns(halves, rows, sizes, codes):
    """The arrays of Columns of the shards of one number. `codes`: {latent shape: its place}, which grows."""
    of_images = {"shape": [], "num_bytes": [], "masked": []}
    for shard, selected in zip(halves[:sizes], rows, strict=False):
        own = [codes.setdefault(tuple(shape), len(codes)) for shape in shard.fields["shapes"]]
        of_images["shape"].append(np.array(own, np.uint16)[shard.arrays["shape"][selected]])
        for name in ("num_bytes", "masked"):
            of_images[name].append(shard.arrays[name][selected])
    shape_ids, image_bytes, masked = (np.stack(arrays, 1).ravel() for arrays in of_images.values())
    text, selected = halves[-1].arrays, rows[-1]
    return {
        "shape_ids": shape_ids,
        "image_bytes": image_bytes,
        "masked": masked,
        "tokens": text["tokens"][selected],
        "all_tokens": text["all_tokens"][selected],
        "repeats": halves[0].arrays["repeats"][rows[0]],
    }


def check_alike(first: ShardIndex, other: ShardIndex) -> None:
    """Checks that two shards of one folder hold sidecars of one run.

    Raises:
        SidecarError: they do not.
    """
    for key in (*RUN_KEYS, "suffix", "widths"):
        if first.fields[key] != other.fields[key]:
            raise SidecarError(f"{other.path}: differs in {key} from {first.path}; pack the folder again")


def folders_of(directory: str | os.PathLike) -> dict[str, list[str]]:
    """{suffix: the folders of its shards} of a directory; {} if it is no shard set."""
    found = {}
    for entry in _entries(directory):
        suffix = folder_suffix(entry.name)
        if suffix and _is_folder_of(entry, suffix):
            found.setdefault(suffix, []).append(entry.path)
    return found


def shard_folders(directory: str | os.PathLike, suffix: str) -> list[str]:
    """The folders of a directory that hold shards of sidecars of this suffix."""
    return folders_of(directory).get(suffix, [])


def folder_name(suffix: str, run_identity: Sequence[str]) -> str:
    """`img_sdxl-1f0c2a9e`: the folder of shards of this suffix, of sidecars with these values of RUN_KEYS."""
    return f"{suffix[1:]}-{_short_hash(run_identity)}"


def folder_suffix(folder: str) -> str | None:
    """`.img_sdxl` of `img_sdxl-1f0c2a9e`; None if it is not the name of a folder of shards."""
    match = re.fullmatch(r"([^/]+)-[0-9a-f]{8}", folder)
    return f".{match[1]}" if match else None


def shard_name(number: int, content: Sequence[str]) -> str:
    """`00012-5be2c0d1.tar`, with a hash of what says which content the shard has."""
    return f"{number:05d}-{_short_hash(content)}.tar"


def shard_number(name: str) -> int | None:
    """12 of `00012-5be2c0d1.tar`; None if it is not the name of a shard."""
    match = _SHARD.fullmatch(name)
    return int(match["number"]) if match else None


def _short_hash(texts):
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _entries(directory):
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _is_folder_of(entry, suffix):
    if folder_suffix(entry.name) != suffix or not entry.is_dir():
        return False
    return any(shard_number(other.name) is not None for other in _entries(entry.path))


def _folder_of(directory, suffix):
    folders = shard_folders(directory, suffix)
    if not folders:
        raise ValueError(f"{directory}: no shards of *{suffix}; pack a folder with cache/pack_shards.py")
    if len(folders) > 1:
        raise ValueError(
            f"{directory}: {' and '.join(folders)} hold *{suffix} of other models or settings; move all but one away"
        )
    return folders[0]


def numbered_shards(folder: str) -> dict[int, str]:
    """{number: path of its shard} of a folder.

    Raises:
        ValueError: a number has two.
    """
    paths = {}
    for entry in _entries(folder):
        if (number := shard_number(entry.name)) is not None:
            if number in paths:
                raise ValueError(
                    f"{paths[number]} and {entry.path} hold another content under one number; delete the older one"
                )
            paths[number] = entry.path
    return paths
