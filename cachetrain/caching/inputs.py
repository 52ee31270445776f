"""Lists the tars and parquet files of samples in a directory or in object storage, and reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple
from urllib.parse import unquote

from cachetrain.caching import parquet
from cachetrain.caching.samples import MAX_INPUT, Samples
from cachetrain.caching.tars import OpenTar
from cachetrain.data import objects
from cachetrain.data.shard_set import folder_suffix, shard_number
from cachetrain.data.walk import walk_folders
from cachetrain.log import info
from cachetrain.reading import read_with_stat

# `00012.tar`, `cc3m-00012.tar`, and of Hugging Face `train-00012-of-00041.parquet`, some with a hash at the end.
_INPUT = re.compile(
    r"(?:.*?[^0-9])?(?P<number>[0-9]+)(?:-of-[0-9]+(?:-[0-9a-f]{16})?)?\.(?P<kind>tar|parquet)"
    r"(?P<packed>\.(?:gz|xz|bz2|zst))?"
)
_FOOTER = 2**20  # bytes at the end of a parquet file that are read to know its columns


class Input(NamedTuple):
    """A tar or parquet file in a listing.

    Attributes:
        name: its path below the directory or address.
        where: its path or address.
        state: its ETag, or size and modification time: another one counts as another content.
        size: in bytes.
    """

    number: int
    name: str
    where: str
    state: str
    size: int = 0

    @property
    def content(self) -> tuple[str, str]:
        """What says which content the input has, for the name of its shard."""
        return self.name, self.state

    @property
    def is_parquet(self) -> bool:
        return self.name.endswith(".parquet")


class Inputs:
    """The tars and parquet files in a directory or in object storage, in folders below it, too.

    Attributes:
        inputs: list of Input, sorted by number.

    Raises:
        ValueError: there are none, two of one number, or one that is compressed; or pyarrow is not installed.
        OSError: they cannot be listed.
    """

    def __init__(self, where: str):
        where = _local_path(where)
        self.store = objects.open_store(where) if objects.is_url(where) else None
        root = where.rstrip("/")
        self.inputs = []
        for name, state, size in sorted((_remote_files if self.store else _local_files)(self.store or root)):
            match = _INPUT.fullmatch(os.path.basename(name))
            if match is None or _is_shard(name):
                continue
            if match["packed"]:
                raise ValueError(f"{root}/{name}: is compressed; unpack it to {name.removesuffix(match['packed'])}")
            self.inputs.append(Input(int(match["number"]), name, f"{root}/{name}", state, size))
        if not self.inputs:
            raise ValueError(
                f"{where}: no tars like 00000.tar, nor 00000.parquet; omit --out to cache a folder of images"
            )
        self.inputs = _one_of_each_number(self._without_lists())
        if any(one.is_parquet for one in self.inputs):
            parquet.check_installed(where)

    def open(self, one: Input) -> Samples:
        """Reads an input.

        Raises:
            OSError: it cannot be read, or has changed since it was listed.
            ValueError: it is damaged, not whole, or holds no images.
        """
        if self.store is None:
            data, stat = read_with_stat(one.where, MAX_INPUT)
            state = _file_state(stat)
        else:
            data, entry = objects.read(self.store, one.name)
            state = _object_state(entry)
        if state != one.state:
            raise OSError(f"{one.where}: has changed since it was listed; run again")
        return parquet.OpenParquet(one.where, data, one.number) if one.is_parquet else OpenTar(one.where, data)

    def _without_lists(self):
        """The inputs without the parquet files that img2dataset writes beside tars, which list their URLs.

        One of them is looked at: if it holds images, so may the others, and all remain.
        """
        tars = {one.name.removesuffix(".tar") for one in self.inputs if not one.is_parquet}
        lists = [one for one in self.inputs if one.is_parquet and one.name.removesuffix(".parquet") in tars]
        if not lists or self._has_images(lists[0]):
            return self.inputs
        info(f"{lists[0].where}: taken for the list of URLs of its tar, and not read, as all files like it")
        return [one for one in self.inputs if one not in set(lists)]

    def _has_images(self, one):
        if self.store is None:
            footer = read_with_stat(one.where, MAX_INPUT)[0]
        else:
            length = min(one.size, _FOOTER)
            footer = objects.read_range(self.store, one.name, one.size - length, length)
        try:
            return parquet.has_images(one.where, footer)
        except ValueError:  # damaged, or pyarrow is not installed: the tars do not need it
            return False


def _local_path(where):
    """The path that a `file://` address names, so that both give the same shards; other addresses as they are."""
    if not where.startswith("file://"):
        return where
    path = where.removeprefix("file://").removeprefix("localhost")
    if not path.startswith("/"):
        raise ValueError(f"{where}: names another machine; give a path, as file:///data")
    return unquote(path)


def _one_of_each_number(inputs):
    inputs = sorted(inputs)
    for _, same in groupby(inputs, lambda one: one.number):
        first, *others = same
        if others:
            raise ValueError(f"{first.where} and {others[0].where} have one number; give each file its own")
    return inputs


def _local_files(root) -> Iterator[tuple[str, str, int]]:
    """Yields (path below root, state, size) of the files that may be inputs."""
    for folder in walk_folders(root, set(), _INPUT.fullmatch):
        for name in folder.names:
            path = os.path.join(folder.path, name)
            stat = os.stat(path)
            yield os.path.relpath(path, root), _file_state(stat), stat.st_size


def _remote_files(store):
    for entry in objects.entries_in(store):
        if not any(part.startswith(".") for part in entry["path"].split("/")):
            yield entry["path"], _object_state(entry), entry["size"]


def _is_shard(name):
    """Whether this is a shard of a set, which may lie below its inputs."""
    folder, _, base = name.rpartition("/")
    return shard_number(base) is not None and folder_suffix(os.path.basename(folder)) is not None


def _file_state(stat):
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _object_state(entry):
    return entry["e_tag"] or f"{entry['size']} {entry['last_modified'].isoformat()}"
