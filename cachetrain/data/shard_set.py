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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cachetrain.data.shards import Shard, ShardIndex
from cachetrain.data.sidecar import RUN_KEYS, Header, SidecarError, header_of

if TYPE_CHECKING:
    import torch

    from cachetrain.data.near import Near

_SHARD = re.compile(r"(?P<number>[0-9]{5,})-[0-9a-f]{8}\.tar")
_MAX_OPEN = 128  # shards that a process keeps open
_MAX_MAPPED = 16_384  # whose indexes it keeps mapped; Linux allows 65,530 mappings


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
        names: for each number, the shards of its halves, as `img_sdxl-1f0c2a9e/00012-5be2c0d1.tar`.
        num_unpaired: number of rows without a partner in the other halves.
    """

    def __init__(
        self,
        directory: str,
        suffixes: Sequence[str],
        names: Iterable[str] | None = None,
        near: Near | None = None,
        sizes: Mapping[str, int] | None = None,
    ):
        """Lists the shards.

        Args:
            suffixes: of the sidecars of a pair.
            names: of the shards to read, and of those of other suffixes; default: all in the directory.
            near: brings the shards into the directory; default: they are there.
            sizes: {name of a shard: bytes}, with `near`.

        Raises:
            ValueError: there are no shards of a suffix, or several sets of them.
        """
        self.directory = directory
        self.suffixes = tuple(suffixes)
        self.num_unpaired = 0
        self._near = near
        self._sizes = sizes or {}
        self._renewed = set()  # names of shards that were fetched again, since the copy was damaged
        names = list(shards_in(directory) if names is None else names)
        listed = [_numbered(directory, names, suffix) for suffix in suffixes]
        numbers = sorted(set.intersection(*map(set, listed)))
        if not numbers:
            raise ValueError(f"{directory}: *{' and *'.join(suffixes)} have no number in common; cache or pack both")
        self.names = [[of_half[number] for of_half in listed] for number in numbers]
        common = set(numbers)
        self._alone = [name for of_half in listed for number, name in of_half.items() if number not in common]
        self._ends = []  # of the pairs of each number
        self._rows = {}  # place of a number whose rows do not match one by one -> the rows in each half, once known
        self._seals = None  # of the shards, if they were not read and verified at the start
        self._shards = OrderedDict()  # (place of a number, half) -> Shard, the last used ones at the end
        self._open = OrderedDict()  # those whose files are open

    def matched(self) -> Iterator[tuple[list[Shard], list[np.ndarray]]]:
        """Yields (the halves, the rows of the pairs in each) of each number.

        Raises:
            SidecarError: a shard is damaged, or not of the set.
        """
        firsts = None
        self.num_unpaired = sum(len(self._mapped(name)) for name in self._alone)
        for place, names in enumerate(self.names):
            halves = [self._mapped(name) for name in names]
            firsts = firsts or halves
            for first, shard in zip(firsts, halves, strict=True):
                check_alike(first, shard)
            rows = self._match(place, halves)
            self.num_unpaired += sum(len(shard) - len(of_half) for shard, of_half in zip(halves, rows, strict=True))
            yield halves, rows

    def read_indexes(self, sizes: int, add_name: Callable[[bytes], None]) -> Columns:
        """Reads all indexes; before that, no pair can be read.

        Args:
            sizes: number of image sidecars of a pair; the first suffixes are theirs.
            add_name: called with the name of each pair, as the file system encodes it.

        Raises:
            SidecarError: a shard is damaged, or not of the set.
        """
        columns, codes, ends, sources, item_bytes = {}, {}, [], set(), 0
        for halves, rows in self.matched():
            names = halves[0].names()
            for row in rows[0].tolist():
                add_name(names[row])
            ends.append(len(rows[0]))
            for name, array in _columns(halves, rows, sizes, codes).items():
                columns.setdefault(name, []).append(array)
            text = halves[-1].fields
            sources.update(text["sources"])
            item_bytes = max(item_bytes, text["item_bytes"])
        self._ends = np.cumsum(np.array(ends, np.int64)).tolist()
        columns = {name: np.concatenate(arrays) for name, arrays in columns.items()}
        present, first = np.unique(columns["shape_ids"], return_index=True)
        present = present[np.argsort(first)]
        shapes, new_ids = list(codes), np.zeros(len(codes), np.uint16)
        new_ids[present] = np.arange(len(present))
        columns["shape_ids"] = new_ids[columns["shape_ids"]]
        return Columns(
            shapes=[shapes[code] for code in present],
            widths=text["widths"],
            item_bytes=item_bytes,
            sources=sources,
            **columns,
        )

    @property
    def ends(self) -> np.ndarray:
        """int64 array, where the pairs of each number end."""
        return np.array(self._ends, np.int64)

    def assume(self, rows: Sequence[int], unequal: Iterable[int], seals: np.ndarray) -> None:
        """Takes what a freeze file says in place of `read_indexes`; an index is then read when one of its rows is.

        Args:
            rows: number of pairs of each number.
            unequal: places of the numbers whose rows do not match one by one.
            seals: uint64 [numbers, halves], of the indexes.
        """
        self._ends = np.cumsum(np.array(rows, np.int64)).tolist()
        self._rows = dict.fromkeys(unequal)
        self._seals = seals

    def read(self, pair: int, half: int) -> bytes:
        """The bytes of a sidecar, verified; raises like Shard.read."""
        return bytes(self._read(Shard.read, pair, half))

    def header(self, pair: int, half: int) -> Header:
        """The Header of a sidecar, verified; raises like Shard.read."""
        return header_of(self.read(pair, half))

    def tensors(self, pair: int, half: int) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
        """As Shard.tensors."""
        return self._read(Shard.tensors, pair, half)

    def where(self, pair: int, half: int) -> str:
        """Where the sidecar is, for messages; see Shard.where."""
        place, row = self._place_of(pair, half)
        return self._shard(place, half).where(row)

    def name(self, pair: int) -> str:
        """The name of a pair, relative to the directory."""
        place, row = self._place_of(pair, 0)
        return self._shard(place, 0).name(row)

    def of_rows(self, name: str, pairs: np.ndarray, half: int) -> Iterator[tuple[np.ndarray, np.ndarray, Shard]]:
        """Yields (places in `pairs`, their values in an array of the index, the shard) for each shard of a half.

        Args:
            name: of the array.
            pairs: int array.
        """
        places = np.searchsorted(self._ends, pairs, side="right")
        for place in np.unique(places).tolist():
            chosen = np.flatnonzero(places == place)
            rows = pairs[chosen] - (self._ends[place - 1] if place else 0)
            shard = self._shard(place, half)
            if place in self._rows:
                rows = self._rows_of(place)[half][rows]
            yield chosen, shard.arrays[name][rows], shard

    def names_of(self, pair: int) -> list[str]:
        """The shards that hold a pair."""
        return self.names[bisect_right(self._ends, pair)]

    @property
    def waited_s(self) -> float:
        """Seconds that this process has waited for shards."""
        return self._near.waited_s if self._near else 0.0

    @property
    def is_fetched(self) -> bool:
        """Whether the shards come from object storage."""
        return self._near is not None

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
        self._rows[place] = rows
        return rows

    def _rows_of(self, place):
        if self._rows[place] is None:
            self._match(place, [self._shard(place, half) for half in range(len(self.suffixes))])
        return self._rows[place]

    def _place_of(self, pair, half):
        """(place of the number, row) of a pair in a half."""
        place = bisect_right(self._ends, pair)
        row = pair - (self._ends[place - 1] if place else 0)
        return place, int(self._rows_of(place)[half][row]) if place in self._rows else row

    def _read(self, read, pair, half):
        """Calls a method of a shard that reads a row; if the near copy is damaged, once more with a new one."""
        shard, row = self._opened_at(pair, half)
        try:
            return read(shard, row)
        except SidecarError:
            place, _ = self._place_of(pair, half)
            if not self._renew(self.names[place][half]):
                raise
        del self._shards[place, half]
        self._open.pop((place, half)).close()
        renewed, _ = self._opened_at(pair, half)
        if renewed.seal != shard.seal:
            raise SidecarError(f"{shard.path}: has changed since the run started; start a new run")
        return read(renewed, row)

    def _renew(self, name):
        """Removes the near copy of a shard, so that it is fetched again; returns False if it was removed before."""
        if self._near is None or name in self._renewed:
            return False
        self._renewed.add(name)
        self._near.remove(name)
        return True

    def _opened_at(self, pair, half):
        place, row = self._place_of(pair, half)
        shard, key = self._shard(place, half), (place, half)
        if self._near and key not in self._open:
            self._near.open(shard, self.names[place][half])
            for other in [other for other, opened in self._open.items() if opened.is_deleted()]:
                self._open.pop(other).close()
        self._open[key] = shard
        self._open.move_to_end(key)
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        return shard, row

    def _shard(self, place, half):
        key = place, half
        if key not in self._shards:
            seal = None if self._seals is None else self._seals.item(place, half)
            self._shards[key] = self._mapped(self.names[place][half], self._seals is not None, seal)
        self._shards.move_to_end(key)
        if len(self._shards) > _MAX_MAPPED:
            oldest, shard = self._shards.popitem(last=False)
            self._open.pop(oldest, None)
            shard.close()
        return self._shards[key]

    def _mapped(self, name, verify=True, seal=None):
        """The Shard of a name. `seal`: that it should have; None: any."""
        path, near = os.path.join(self.directory, name), self._near
        try:
            index, where = (near.index_of(name), near.where(name)) if near else (None, None)
            shard = Shard(path, verify, index, self._sizes.get(name), where)
            if seal not in (None, shard.seal):
                raise SidecarError(f"{shard.path}: has another content than the freeze file says; make a new one")
            return shard
        except SidecarError:
            if not self._renew(name):
                raise
        return self._mapped(name, verify, seal)

    def __getstate__(self) -> dict:
        # Files are opened anew in another process.
        return self.__dict__ | {"_shards": OrderedDict(), "_open": OrderedDict()}


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


@lru_cache(64)
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


def shards_in(directory: str | os.PathLike) -> list[str]:
    """The names of all shards of a set in a directory, as `img_sdxl-1f0c2a9e/00012-5be2c0d1.tar`."""
    folders = [folder for of_suffix in folders_of(directory).values() for folder in of_suffix]
    names = (f"{os.path.basename(folder)}/{entry.name}" for folder in folders for entry in _entries(folder))
    return [name for name in names if shard_number(name.rpartition("/")[2]) is not None]


def _numbered(directory, names, suffix):
    """{number: name of its shard} of a suffix.

    Raises:
        ValueError: there are none, of several folders, or two of one number.
    """
    of_suffix = [name for name in names if folder_suffix(name.partition("/")[0]) == suffix]
    folders = sorted({name.partition("/")[0] for name in of_suffix})
    if not folders:
        raise ValueError(f"{directory}: no shards of *{suffix}; pack a folder with cache/pack_shards.py")
    if len(folders) > 1:
        paths = " and ".join(os.path.join(directory, folder) for folder in folders)
        raise ValueError(f"{paths} hold *{suffix} of other models or settings; move all but one away")
    numbered = {}
    for name in of_suffix:
        number = shard_number(name.partition("/")[2])
        if number in numbered:
            paths = " and ".join(os.path.join(directory, other) for other in (numbered[number], name))
            raise ValueError(f"{paths} hold another content under one number; delete the older one")
        numbered[number] = name
    return numbered
