"""The format of index files: a safetensors file like a sidecar, whose hashes cover all of it.

An array `shape_ids` and so on has an element for each sample or pair, `times` and `counts` a row for each folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from errno import EFBIG
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cachetrain.atomic import atomic_write
from cachetrain.data.folders import Listed
from cachetrain.data.headers import OF_PAIRS, OF_SAMPLES
from cachetrain.data.sidecar import MAX_FILE, SidecarError, read_verified, sidecar_bytes
from cachetrain.reading import json_object

if TYPE_CHECKING:
    from cachetrain.data.headers import Contents
    from cachetrain.data.index import PairIndex

FORMAT = "1"

# Of Listed, in the order of the columns of `counts`, after the number of pairs.
_COUNTS = ("has_multiple", "num_unpaired", "num_images", "num_with_image")

# What making sense of a file raises whose hashes are right, but which was not written here.
_MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)


class Known(NamedTuple):
    """What an index file says of M pairs, with `sizes` image sidecars each.

    Attributes:
        identities: of PairIndex.identities.
        widths: of the text sidecars; {} where one serves all images.
        shapes: latent shapes; sources: tuples of suffixes of caption files.
        shape_ids, image_bytes, masked: arrays [M * sizes].
        tokens, all_tokens, source_ids, foreign: arrays [M].
    """

    identities: list[tuple[str, ...]]
    widths: dict[str, int]
    shapes: list[tuple[int, ...]]
    sources: list[tuple[str, ...]]
    shape_ids: np.ndarray
    image_bytes: np.ndarray
    masked: np.ndarray
    tokens: np.ndarray
    all_tokens: np.ndarray
    source_ids: np.ndarray
    foreign: np.ndarray

    def fits(self, index: PairIndex, number: int) -> bool:
        """Whether the sidecars of directory `number` are those of which the headers were read."""
        widths = {} if index.one_text else index.text_widths
        alike = self.identities == index.identities(number) and self.widths == widths
        return alike and len(self.shape_ids) == len(self.tokens) * index.sizes

    def check(self, count: int) -> None:
        """Checks that the arrays of a file with so many pairs fit together; raises ValueError if they do not."""
        for of_all, size in ((OF_SAMPLES, len(self.shape_ids)), (OF_PAIRS, count)):
            for name, dtype in of_all.items():
                array = getattr(self, name)
                if array.dtype != dtype or array.shape != (size,):
                    raise ValueError(name)
        for ids, values in ((self.shape_ids, self.shapes), (self.source_ids, self.sources)):
            if ids.size and ids.max() >= len(values):
                raise ValueError("ids")


class Saved(NamedTuple):
    """A folder to save.

    Attributes:
        path: in the data directory.
        listed: Listed, with times.
        joined: its stems, NUL between them.
        start, count: number of its first pair in the index, and of its pairs.
    """

    path: str
    listed: Listed
    joined: bytes
    start: int
    count: int


def write_index_file(
    path: Path, folders: Sequence[Saved], suffixes: Sequence[str], index: PairIndex, contents: Contents, number: int
) -> None:
    """Writes some folders of directory `number` of an index, and what their headers say; raises OSError."""
    pairs = np.concatenate([np.arange(0), *(np.arange(one.start, one.start + one.count) for one in folders)])
    samples = index.samples_of(pairs)
    arrays = {name: getattr(contents, name)[samples] for name in OF_SAMPLES}
    arrays |= {name: getattr(contents, name)[pairs] for name in OF_PAIRS}
    arrays["shapes"] = np.array(contents.shapes, np.int64).reshape(-1, 3)
    arrays["times"] = np.array([one.listed.times for one in folders], np.int64).reshape(-1, 2)
    counts = [[one.count, *(getattr(one.listed, name) for name in _COUNTS)] for one in folders]
    arrays["counts"] = np.array(counts, np.int64).reshape(-1, 1 + len(_COUNTS))
    strings = {
        "folders": [os.fsencode(one.path) for one in folders],
        "subfolders": [b"/".join(map(os.fsencode, one.listed.subfolders)) for one in folders],
        "stems": [one.joined for one in folders],
    }
    for name, values in strings.items():
        arrays[name] = np.frombuffer(bytearray().join(values), np.uint8)
        arrays[f"{name}_ends"] = np.cumsum([0, *map(len, values)], dtype=np.int64)
    fields = {
        "format": FORMAT,
        "suffixes": list(suffixes),
        "identities": index.identities(number),
        "widths": {} if index.one_text else index.text_widths,
        "sources": contents.sources,
    }
    import torch

    tensors = {name: torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in arrays.items()}
    data = sidecar_bytes(tensors, {"kind": "index", "index": json.dumps(fields)})
    if len(data) > MAX_FILE:
        raise OSError(EFBIG, "too many pairs for an index file; pack them into shards")
    atomic_write(path, data)


def read_index_file(path: Path, suffixes: Sequence[str]) -> tuple[Known, dict[str, Listed]]:
    """Reads and verifies an index file.

    Returns:
        (Known, {path of a folder in the data directory: Listed, with its stems joined and no Folder}).

    Raises:
        SidecarError: it is damaged.
        ValueError: it is of another version, or of sidecars with other suffixes.
        OSError: it cannot be read.
    """
    from safetensors.numpy import load

    data, header = read_verified(path)
    if header.foreign or header.metadata.get("kind") != "index":
        raise SidecarError(f"{path}: no index file")
    fields = json_object(path, header.metadata.get("index", ""))
    if fields.get("format") != FORMAT:
        raise ValueError(f"of format {fields.get('format')}, this version reads {FORMAT}")
    if fields.get("suffixes") != list(suffixes):
        raise ValueError(f"of sidecars with other suffixes: {fields.get('suffixes')}")
    try:
        arrays = load(data)
        folders = _folders(arrays)
        known = Known(
            identities=[tuple(identity) for identity in fields["identities"]],
            widths=fields["widths"],
            shapes=[tuple(shape) for shape in arrays["shapes"].tolist()],
            sources=[tuple(one) for one in fields["sources"]],
            **{name: arrays[name] for name in (*OF_SAMPLES, *OF_PAIRS)},
        )
        known.check(int(arrays["counts"][:, 0].sum()))
    except _MALFORMED as error:
        raise SidecarError(f"{path}: no index file") from error
    return known, folders


def _folders(arrays):
    names = [
        [bytes(arrays[name][a:b]) for a, b in pairwise(arrays[f"{name}_ends"].tolist())]
        for name in ("folders", "subfolders", "stems")
    ]
    folders, first = {}, 0
    for path, subfolders, joined, times, (count, *counts) in zip(
        *names, arrays["times"].tolist(), arrays["counts"].tolist(), strict=True
    ):
        subfolders = list(map(os.fsdecode, split_names(subfolders, b"/")))
        num_stems = joined.count(b"\0") + 1 if joined else 0
        if num_stems != count or b"/" in joined or any(name.startswith(".") for name in subfolders):
            raise ValueError(path)
        folders[os.fsdecode(path)] = Listed(
            folder=None,
            subfolders=subfolders,
            stems=joined,
            times=tuple(times),
            first=first,
            **dict(zip(_COUNTS, counts, strict=True)),
        )
        first += count
    return folders


def split_names(joined: bytes, separator: bytes = b"\0") -> list[bytes]:
    return joined.split(separator) if joined else []
