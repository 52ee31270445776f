"""Freeze files: the shards of a set that a run is to read, and what a run must know of them before it reads one.

    set/freeze-5be2c0d1.safetensors

A run on a freeze file starts without a look at any shard, and shards that come later do not change it. The file has
some 60 bytes of each number, of which a set has B; its sidecars are H halves: S sizes of images, and the captions.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cachetrain.data.shard_set import ShardSet
from cachetrain.data.shards import NOT_SEALED, Shard, sealed, unsealed
from cachetrain.data.sidecar import Header, SidecarError, header_of, layout_of

FORMAT = "1"

_DTYPES = {
    "numbers": np.uint32,
    "contents": np.uint32,
    "sizes": np.uint64,
    "index_ends": np.uint32,
    "seals": np.uint64,
    "rows": np.uint32,
    "counts": np.uint32,
    "visits": np.float64,
    "image_bytes": np.uint64,
    "tokens": np.uint64,
    "longest": np.uint16,
    "masks": np.uint32,
    "variants": np.uint32,
    "never": np.uint32,
    "repeated": np.uint8,
    "unequal": np.uint8,
}
_NAME = re.compile(r"freeze-[0-9a-f]{8}\.safetensors")


class Freeze(NamedTuple):
    """What a freeze file says.

    Attributes:
        numbers: uint32 [B], of the shards.
        contents: uint32 [B, H], the hash in the name of each shard.
        sizes: uint64 [B, H], bytes of each shard.
        index_ends: uint32 [B, H], where the index of each shard ends in it.
        seals: uint64 [B, H], the beginning of the SHA-256 of each index, which covers the hashes of all rows.
        rows: uint32 [B], pairs of each number.
        counts: uint32 [B, K], image sidecars of each latent shape.
        visits: float64 [B, K], how often they come up in an epoch, on average.
        image_bytes: uint64 [B], of the tensors of image sidecars.
        tokens: uint64 [B], of all captions.
        longest: uint16 [B], tokens of the longest caption.
        masks: uint32 [B], image sidecars with a mask.
        variants: uint32 [B], pairs whose caption has variants.
        never: uint32 [B], pairs that never come up.
        repeated: uint8 [B], whether some pairs come up in other numbers than once an epoch.
        unequal: uint8 [B], whether the halves have other rows, or in another order, so that they are to be matched.
        common: what all shards agree on: `suffixes` and `folders` of the halves, latent `shapes`, `widths`,
            `item_bytes` and `sources` of captions, and `headers` of the first row of each half.
    """

    numbers: np.ndarray
    contents: np.ndarray
    sizes: np.ndarray
    index_ends: np.ndarray
    seals: np.ndarray
    rows: np.ndarray
    counts: np.ndarray
    visits: np.ndarray
    image_bytes: np.ndarray
    tokens: np.ndarray
    longest: np.ndarray
    masks: np.ndarray
    variants: np.ndarray
    never: np.ndarray
    repeated: np.ndarray
    unequal: np.ndarray
    common: dict

    @property
    def file_name(self) -> str:
        """`freeze-5be2c0d1.safetensors`, with a hash of which shards it lists."""
        digest = hashlib.sha256(json.dumps(self.common["folders"]).encode())
        for array in (self.numbers, self.contents):
            digest.update(np.ascontiguousarray(array).tobytes())
        return f"freeze-{digest.hexdigest()[:8]}.safetensors"

    def shard(self, place: int, half: int) -> str:
        """`img_sdxl-1f0c2a9e/00012-5be2c0d1.tar`."""
        number, content = self.numbers.item(place), self.contents.item(place, half)
        return f"{self.common['folders'][half]}/{number:05d}-{content:08x}.tar"

    def shards(self) -> list[list[str]]:
        """For each number, the names of its shards."""
        halves = range(len(self.common["folders"]))
        return [[self.shard(place, half) for half in halves] for place in range(len(self.numbers))]

    def header(self, half: int) -> Header:
        """The Header of the first row of a half."""
        text = self.common["headers"][half].encode()
        return header_of(len(text).to_bytes(8, "little") + text)


def is_freeze(path: str | os.PathLike) -> bool:
    """Whether a path or an address is that of a freeze file, by its name."""
    return bool(_NAME.fullmatch(os.path.basename(str(path))))


def freeze_of(shard_set: ShardSet, first_row: Callable[[Shard], bytes] = lambda shard: shard.read(0)) -> Freeze:
    """Lists the shards of a set, and reads their indexes.

    Args:
        first_row: gives the verified bytes of the first sidecar of a shard.

    Raises:
        SidecarError: a shard is damaged, or not of the set.
    """
    num_sizes = len(shard_set.suffixes) - 1
    shapes, headers, ids_of, sources, item_bytes, columns = {}, None, [], set(), 0, {}
    for halves, rows in tqdm(
        shard_set.matched(), total=len(shard_set.names), desc="indexes", unit="shard", disable=None
    ):
        headers = headers or [_header_text(first_row(shard)) for shard in halves]
        ids_of.append(_shape_ids(halves[:num_sizes], rows, shapes))
        for name, value in _of_number(halves, rows, num_sizes).items():
            columns.setdefault(name, []).append(value)
        sources.update(halves[-1].fields["sources"])
        item_bytes = max(item_bytes, halves[-1].fields["item_bytes"])
        widths = halves[-1].fields["widths"]
    names = [[name.rpartition("/") for name in of_number] for of_number in shard_set.names]
    columns |= {
        "numbers": [int(of_number[0][2].partition("-")[0]) for of_number in names],
        "contents": [[int(base[-12:-4], 16) for _, _, base in of_number] for of_number in names],
        "counts": [np.bincount(ids, None, len(shapes)) for ids in ids_of],
        "visits": [
            np.bincount(ids, np.tile(repeats, num_sizes), len(shapes))
            for ids, repeats in zip(ids_of, columns.pop("repeats"), strict=True)
        ],
    }
    common = {
        "suffixes": list(shard_set.suffixes),
        "folders": [folder for folder, _, _ in names[0]],
        "shapes": list(shapes),
        "widths": widths,
        "item_bytes": item_bytes,
        "sources": sorted(sources),
        "headers": headers,
    }
    return Freeze(**{name: np.array(columns[name], dtype) for name, dtype in _DTYPES.items()}, common=common)


def freeze_bytes(freeze: Freeze) -> bytes:
    """The content of a freeze file."""
    arrays = {name: getattr(freeze, name) for name in _DTYPES}
    return sealed(arrays, {"freeze_format": FORMAT, **freeze.common})


def read_freeze(where: str | os.PathLike, data: bytes) -> Freeze:
    """What the bytes of a freeze file say.

    Args:
        where: names the file in messages.

    Raises:
        SidecarError: it is no freeze file, or damaged.
    """
    try:
        arrays, common = unsealed(data)
        found = common["freeze_format"]
        freeze = Freeze(**{name: arrays[name] for name in _DTYPES}, common=common)
    except NOT_SEALED as error:
        raise SidecarError(f"{where}: is no freeze file, or damaged; make it again with cache_status.py") from error
    if found != FORMAT:
        raise SidecarError(f"{where}: has format {found}, this version reads {FORMAT}")
    return freeze


def _header_text(data):
    """The JSON text of the header of a sidecar."""
    return bytes(data[8 : layout_of(data)[0]]).decode()


def _shape_ids(images, rows, shapes):
    """The places of the latent shapes in `shapes` {shape: place}, which grows; of each size after the other."""
    ids = []
    for shard, selected in zip(images, rows, strict=False):
        own = [shapes.setdefault(tuple(shape), len(shapes)) for shape in shard.fields["shapes"]]
        ids.append(np.array(own)[shard.arrays["shape"][selected]])
    return np.concatenate(ids)


def _of_number(halves, rows, num_sizes):
    """The values of one number in the arrays of Freeze, and `repeats`, float32 [rows]."""
    images = list(zip(halves[:num_sizes], rows, strict=False))
    text = {name: halves[-1].arrays[name][rows[-1]] for name in ("tokens", "all_tokens")}
    repeats = halves[0].arrays["repeats"][rows[0]]
    return {
        "sizes": [shard.size for shard in halves],
        "index_ends": [shard.index_end for shard in halves],
        "seals": [shard.seal for shard in halves],
        "rows": len(rows[0]),
        "image_bytes": sum(int(shard.arrays["num_bytes"][of_half].sum(dtype=np.int64)) for shard, of_half in images),
        "tokens": int(text["all_tokens"].sum(dtype=np.int64)),
        "longest": int(text["tokens"].max(initial=0)),
        "masks": sum(int(shard.arrays["masked"][of_half].sum()) for shard, of_half in images),
        "variants": int((text["all_tokens"] > text["tokens"]).sum()),
        "never": int((repeats == 0).sum()),
        "repeated": bool((repeats != 1).any()),
        "unequal": any(
            not np.array_equal(of_half, np.arange(len(shard))) for shard, of_half in zip(halves, rows, strict=True)
        ),
        "repeats": repeats,
    }
