"""What lies in a shard set: its folders and shards, which of two is the newer one, and the content of each shard."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from threading import Event
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cachetrain.data.set_files import Bucket, Directory, Entry, read_index
from cachetrain.data.shard_set import folder_suffix, shard_number
from cachetrain.data.shards import INDEX, INDEX_START, ShardIndex, index_size, member_header
from cachetrain.data.sidecar import NULL_STEM

# A request of object storage takes 50 ms, whatever it reads; verifying computes, and holds pieces of 10 MB.
_READERS, _VERIFIERS = 32, 16


class Folder:
    """A folder of shards.

    Attributes:
        name: as `img_sdxl-1f0c2a9e`.
        suffix: of the sidecars.
        shards: {number: list of Entry, the newest first}, sorted.
        null: Entry of the null caption, or None.
    """

    def __init__(self, name: str, entries: Iterable[Entry]):
        self.name = name
        self.suffix = folder_suffix(name)
        self.null = None
        found = {}
        for entry in sorted(entries, key=lambda entry: (-entry.modified, entry.name)):
            base = entry.name.rpartition("/")[2]
            if (number := shard_number(base)) is not None:
                found.setdefault(number, []).append(entry)
            elif base == NULL_STEM + self.suffix:
                self.null = entry
        self.shards = dict(sorted(found.items()))

    @property
    def entries(self) -> list[Entry]:
        """All shards."""
        return [entry for entries in self.shards.values() for entry in entries]


def folders_among(entries: Iterable[Entry]) -> list[list[Folder]]:
    """The folders of a set of these files: a list for each suffix, with the one first whose newest shard is the
    newest."""
    of_folder, of_suffix = {}, {}
    for entry in entries:
        folder = entry.name.rpartition("/")[0]
        if folder_suffix(folder):
            of_folder.setdefault(folder, []).append(entry)
    for name, found in of_folder.items():
        folder = Folder(name, found)
        if folder.shards:
            of_suffix.setdefault(folder.suffix, []).append(folder)
    return [sorted(folders, key=lambda one: -written(one.entries)[1]) for _, folders in sorted(of_suffix.items())]


def written(entries: Iterable[Entry]) -> tuple[float, float]:
    """When the oldest and the newest of some files were written."""
    times = [entry.modified for entry in entries]
    return min(times), max(times)


def time_text(*times: float) -> str:
    """`2026-11-20 10:00:05`, or two of them with ` to ` between, in local time."""
    texts = [datetime.fromtimestamp(one).strftime("%Y-%m-%d %H:%M:%S") for one in times]
    return " to ".join(dict.fromkeys(texts))


class Inspected(NamedTuple):
    """A shard that was read.

    Attributes:
        index: None if it cannot be read.
        problems: what is wrong, a line each.
    """

    index: ShardIndex | None
    problems: list[str]


def inspect_shards(
    files: Directory | Bucket, entries: list[Entry], verify: bool, quiet: bool = False
) -> Iterator[tuple[Entry, Inspected]]:
    """Yields (entry, Inspected) of shards, in order; reads them in threads.

    Args:
        verify: read all of each shard, once, and compare each row with its SHA-256; else the indexes only.
        quiet: show no progress.
    """
    stopped, threads = Event(), _VERIFIERS if verify else _READERS
    total = sum(entry.size for entry in entries) if verify else len(entries)
    unit = {"desc": "verifying", "unit": "B", "unit_scale": True} if verify else {"desc": "reading", "unit": "shard"}
    running, waiting = deque(), iter(entries)
    with (
        tqdm(total=total, disable=quiet or None, leave=False, **unit) as progress,
        ThreadPoolExecutor(threads) as pool,
    ):

        def submit():
            for entry in waiting:
                running.append((entry, pool.submit(_inspected, files, entry, verify, progress, stopped)))
                return

        try:
            for _ in range(2 * threads):
                submit()
            while running:
                entry, result = running.popleft()
                yield entry, result.result()
                submit()
        finally:
            stopped.set()  # after an error or a signal, the others end at their next piece


def _inspected(files, entry, verify, progress, stopped):
    problems = []
    try:
        if verify:
            return Inspected(_verify(files, entry, problems, progress, stopped), problems)
        index = None if stopped.is_set() else read_index(files, entry)
        _advance(progress, 1)
        return Inspected(index, problems)
    except (ValueError, OSError) as error:
        return Inspected(None, [*problems, str(error)])


def _advance(progress, number):
    with progress.get_lock():
        progress.update(number)


def _verify(files, entry, problems, progress, stopped):
    """Reads a shard once, from its beginning to its end; returns its index and adds what is wrong to `problems`."""

    def chunks():
        for chunk in files.chunks(entry.name):
            if stopped.is_set():
                return
            _advance(progress, len(chunk))
            yield chunk

    path, stream = files.path(entry.name), _Stream(chunks())
    head = stream.read(INDEX_START)
    size = index_size(path, head)
    index = ShardIndex(path, stream.read(size), entry.size)
    if head != member_header(INDEX, size):
        problems.append(f"{path}: its first tar header is damaged; copy or pack the shard again")
    offsets, lengths = index.arrays["offset"].tolist(), index.arrays["length"].tolist()
    for row in np.argsort(index.arrays["offset"], kind="stable").tolist():
        between = index.before(row, stream.position)
        if stream.read(offsets[row] - stream.position) != between:
            problems.append(f"{index.where(row)}: its tar header is damaged; copy or pack the shard again")
        sha256 = hashlib.sha256()
        for piece in stream.pieces(lengths[row]):
            sha256.update(piece)
        try:
            index.check(row, sha256.digest())
        except ValueError as error:
            problems.append(str(error))
    if any(map(any, stream.pieces(entry.size - stream.position))):
        problems.append(f"{path}: its end is damaged; copy or pack the shard again")
    return index


class _Stream:
    """Reads pieces of given sizes from chunks of any sizes, each of which is valid until the next.

    Attributes:
        position: number of bytes read.
    """

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._rest = memoryview(b"")
        self.position = 0

    def pieces(self, size: int) -> Iterator[memoryview]:
        """Yields the next `size` bytes, fewer at the end."""
        while size > 0 and (self._rest or self._next()):
            piece, self._rest = self._rest[:size], self._rest[size:]
            size -= len(piece)
            self.position += len(piece)
            yield piece

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        data = bytearray()
        for piece in self.pieces(size):
            data += piece
        return bytes(data)

    def _next(self):
        self._rest = memoryview(next(self._chunks, b""))
        return len(self._rest) > 0
