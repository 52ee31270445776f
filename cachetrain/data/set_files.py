"""The files of a shard set, in a directory or in object storage: list, read ranges, stream, delete.

A directory is read without obstore.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from cachetrain.atomic import atomic_write
from cachetrain.data import objects
from cachetrain.data.many_files import in_threads
from cachetrain.data.shards import INDEX_START, ShardIndex, index_size
from cachetrain.data.sidecar import SidecarError
from cachetrain.reading import named_errors, open_regular

_CHUNK = 2**20
_FIRST_READ = 2**18  # holds the index of 2,500 rows
_MAX_DELETED = 1000  # objects that one request deletes


class Entry(NamedTuple):
    """A file of a set.

    Attributes:
        name: relative to the set, with `/`.
        modified: when it was written, in seconds since 1970.
    """

    name: str
    size: int
    modified: float


class Directory:
    """The files in a directory and in its folders; `where` is its path."""

    def __init__(self, where: str | os.PathLike):
        self.where = os.fspath(where)

    def entries(self) -> list[Entry]:
        """All files, sorted by name.

        Raises:
            OSError: they cannot be listed.
        """
        return sorted(self._entries(self.where, "", folders=True))

    def _entries(self, directory, prefix, folders):
        with os.scandir(directory) as found:
            for entry in found:
                if entry.is_file():
                    stat = entry.stat()
                    yield Entry(prefix + entry.name, stat.st_size, stat.st_mtime)
                elif folders and entry.is_dir():
                    yield from self._entries(entry.path, f"{entry.name}/", folders=False)

    def path(self, name: str) -> str:
        """Where a file is, for messages."""
        return os.path.join(self.where, name)

    def read(self, name: str, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, or to the end of the file.

        Raises:
            OSError: they cannot be read.
        """
        with open_regular(self.path(name)) as file, named_errors(self.path(name)):
            return os.pread(file.fileno(), end - start, start)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yields the bytes of a file in pieces, each valid until the next; raises like `read`."""
        piece = memoryview(bytearray(_CHUNK))
        with open_regular(self.path(name)) as file, named_errors(self.path(name)):
            while size := file.readinto(piece):
                yield piece[:size]

    def put_new(self, name: str, data: bytes) -> bool:
        """Writes a file whole, unless there is one of this name; returns whether it did.

        Raises:
            OSError: it cannot be written.
        """
        if os.path.exists(self.path(name)):
            return False
        atomic_write(self.path(name), data)
        return True

    def delete(self, names: Sequence[str]) -> Iterator[int]:
        """Deletes files, those that are gone already too, and folders that are empty then; yields how many so far.

        Raises:
            OSError: one cannot be deleted.
        """
        for number, name in enumerate(names, 1):
            with suppress(FileNotFoundError):
                os.unlink(self.path(name))
            yield number
        for folder in {os.path.dirname(self.path(name)) for name in names}:
            with suppress(OSError):  # it holds something else
                os.rmdir(folder)


class Bucket:
    """The same of object storage; `where` is its address.

    Raises:
        ValueError: of objects.open_store.
    """

    def __init__(self, where: str):
        self.where = where.rstrip("/")
        self._store = objects.open_store(where)

    def entries(self) -> list[Entry]:
        found = objects.entries_in(self._store)
        return sorted(Entry(one["path"], one["size"], one["last_modified"].timestamp()) for one in found)

    def path(self, name: str) -> str:
        return f"{self.where}/{name}"

    def read(self, name: str, start: int, end: int) -> bytes:
        return objects.read_range(self._store, name, start, end - start)

    def chunks(self, name: str) -> Iterator[bytes]:
        return objects.pieces_of(self._store, name)[1]

    def entry(self, name: str) -> Entry:
        """The Entry of one object.

        Raises:
            OSError: there is none.
        """
        found = objects.entry(self._store, name)
        return Entry(name, found["size"], found["last_modified"].timestamp())

    def put_new(self, name: str, data: bytes) -> bool:
        return objects.put_new(self._store, name, data)

    def delete(self, names: Sequence[str]) -> Iterator[int]:
        for first in range(0, len(names), _MAX_DELETED):
            some = list(names[first : first + _MAX_DELETED])
            objects.delete(self._store, some)
            yield first + len(some)


def open_files(where: str) -> Directory | Bucket:
    """The files of the set at a path or an address."""
    return Bucket(where) if objects.is_url(where) else Directory(where)


def read_index(files: Directory | Bucket, entry: Entry) -> ShardIndex:
    """Reads and verifies the index of a shard, mostly by one read.

    Raises:
        SidecarError: it is no shard, or its index is damaged.
        OSError: it cannot be read.
    """
    return ShardIndex(files.path(entry.name), _index_bytes(files, entry), entry.size)


def read_indexes(
    files: Directory | Bucket, entries: Iterable[Entry]
) -> Iterator[tuple[Entry, ShardIndex | SidecarError]]:
    """Yields (entry, its ShardIndex, or the error of a shard that is cut off or damaged), in order; reads in threads.

    Raises:
        OSError: a shard cannot be read.
    """

    def read(entry):
        try:
            return read_index(files, entry)
        except SidecarError as error:
            return error

    return in_threads(read, entries)


def _index_bytes(files, entry):
    data = files.read(entry.name, 0, min(entry.size, INDEX_START + _FIRST_READ)) if entry.size else b""
    end = INDEX_START + index_size(files.path(entry.name), data)
    if len(data) < end <= entry.size:
        data += files.read(entry.name, len(data), end)
    return memoryview(data)[INDEX_START:end]


def read_row(files: Directory | Bucket, name: str, index: ShardIndex, row: int) -> bytes:
    """The bytes of a row of the shard of this name and index, verified; raises like Shard.read."""
    start = index.arrays["offset"].item(row)
    data = files.read(name, start, start + index.arrays["length"].item(row))
    index.check(row, hashlib.sha256(data).digest())
    return data


class RemoteShard(ShardIndex):
    """A shard in object storage, of which single rows are read; raises like `read_index`."""

    def __init__(self, address: str):
        folder, _, self._name = address.rpartition("/")
        self._files = Bucket(folder)
        entry = self._files.entry(self._name)
        super().__init__(address, _index_bytes(self._files, entry), entry.size)

    def read(self, row: int) -> bytes:
        """The bytes of a sidecar, verified; raises like Shard.read."""
        return read_row(self._files, self._name, self, row)
