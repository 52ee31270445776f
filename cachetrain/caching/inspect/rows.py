"""Sidecars for the tools that inspect them: files, and rows of shards, as `00012-5be2c0d1.tar#a.img_sdxl`.

The name of a row may lack the suffix. Shards may be in object storage, of which single rows are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from cachetrain.data import sidecar, walk
from cachetrain.data.objects import is_url
from cachetrain.data.set_files import Bucket, RemoteShard
from cachetrain.data.shard_set import folder_suffix, shard_number, shards_in
from cachetrain.data.shards import Shard, name_key
from cachetrain.data.sidecar import Header
from cachetrain.log import counted

if TYPE_CHECKING:
    import torch

_ROW = re.compile(r"(?P<shard>.+?\.tar)#(?P<name>.+)", re.DOTALL)
_TAR = ".tar"


def is_row(path: str) -> bool:
    """Whether a path is that of a row, by its form."""
    return _ROW.fullmatch(path) is not None and not os.path.exists(path)


def is_shard(path: str) -> bool:
    """Whether a path or an address is that of a tar, by its name."""
    return path.endswith(_TAR) and not os.path.isdir(path)


def find_sidecars(paths: Iterable[str], suffixes: Iterable[str]) -> Iterator[str]:
    """Yields sidecars and rows.

    Args:
        paths: sidecars, rows and shards; and folders, sets and folders of sets, to search.
        suffixes: of what is searched for.

    Raises:
        ValueError: a path does not exist, or a shard is damaged.
        OSError: a folder or a shard cannot be read.
    """
    suffixes = tuple(suffixes)
    for path in paths:
        if is_row(path):
            yield path
        elif is_shard(path):
            yield from _rows_of(path)
        elif shards := shards_under(path):
            for shard in shards:
                if shard_suffix(shard) in suffixes:
                    yield from _rows_of(shard)
        elif is_url(path):
            raise ValueError(f"{path}: holds no shards")
        else:
            yield from walk.find_sidecars([path], suffixes)


def shards_under(path: str) -> list[str]:
    """The shards of a set or of one of its folders, in a directory or in object storage; [] if it is neither."""
    root = path.rstrip("/")
    if is_url(path):
        names = [entry.name for entry in Bucket(path).entries()]
    elif os.path.isdir(path):
        of_folder = sorted(os.listdir(path)) if folder_suffix(os.path.basename(os.path.abspath(path))) else []
        names = shards_in(path) or of_folder
    else:
        names = []
    return [f"{root}/{name}" for name in names if shard_suffix(f"{os.path.abspath(root)}/{name}")]


def shard_suffix(path: str) -> str | None:
    """The suffix of the sidecars in a shard, by the name of its folder; None if it is not the name of a shard."""
    folder, name = os.path.split(path if is_url(path) else os.path.abspath(path))
    return folder_suffix(os.path.basename(folder)) if shard_number(name) is not None else None


def as_path(path: str) -> str:
    """The path of a sidecar; of a row, as if its shard were a folder of this name without `.tar`."""
    if is_row(path):
        return path.replace(f"{_TAR}#", "/", 1)
    return path.removesuffix(_TAR) if is_shard(path) else path


def name_in(root: str, path: str) -> str:
    """The name of a sidecar below a folder, or of a row in a shard."""
    return path[len(root) + 1 :] if is_shard(root) else os.path.relpath(path, root)


def path_in(root: str, name: str) -> str:
    """The sidecar of this name below a folder, or the row in a shard."""
    return f"{root}#{name}" if is_shard(root) else os.path.join(root, name)


def name_of(path: str) -> str:
    """The name of a row without the suffix; of a file, its path without the suffix."""
    if not is_row(path):
        return os.path.splitext(path)[0]
    shard, name = _split(path)
    return name.removesuffix(_open(shard).fields["suffix"])


def exists(path: str) -> bool:
    """Whether there is such a file, or such a row; raises like `find_sidecars`."""
    if not is_row(path):
        return os.path.isfile(path)
    shard, name = _split(path)
    return (is_url(shard) or os.path.exists(shard)) and _row_number(_open(shard), name) is not None


def read_header(path: str) -> Header:
    """As sidecar.read_header."""
    return read_verified(path)[1] if is_row(path) else sidecar.read_header(path)


def read_sidecar(path: str) -> tuple[dict[str, torch.Tensor], Header]:
    """As sidecar.read_sidecar."""
    if not is_row(path):
        return sidecar.read_sidecar(path)
    data, header = read_verified(path)
    return sidecar.tensors_of(data, str, path), header


def read_verified(path: str) -> tuple[bytes, Header]:
    """The bytes of a row, and its Header.

    Raises:
        ValueError: there is no such row, or it is damaged.
        OSError: the shard cannot be read.
    """
    where, name = _split(path)
    shard = _open(where)
    if (row := _row_number(shard, name)) is None:
        raise ValueError(f"{where}: has no row {name}; it has {counted(len(shard), 'row')}, like {shard.name(0)}")
    data = bytes(shard.read(row))
    return data, sidecar.verified(path, data)


@lru_cache(maxsize=8)
def _open(where):
    return RemoteShard(where) if is_url(where) else Shard(where)


def _split(path):
    return _ROW.fullmatch(path).group("shard", "name")


def _rows_of(where):
    shard = _open(where)
    return map(shard.where, range(len(shard)))


def _row_number(shard, name):
    """The row of this name, with or without the suffix; None if there is none."""
    for candidate in dict.fromkeys((name, name.removesuffix(shard.fields["suffix"]))):
        for row in np.flatnonzero(shard.arrays["key"] == np.uint64(name_key(candidate))).tolist():
            if shard.name(row) == candidate:
                return row
    return None
