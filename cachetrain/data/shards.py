"""Shards: tars of many sidecars with an index in front, so that millions of pairs are thousands of files.

A shard is an uncompressed tar. Its first member is the index, a safetensors file; the others are sidecars, byte for
byte as they lie beside an image, so that `tar xf` gives them back and other programs for tars of samples read them.

The index has of each row, int arrays [N] unless noted:
    offset, length    of the sidecar in the tar, in bytes
    start             of the tensors in the sidecar
    layout            place in the field `layouts`: {tensor: [dtype, shape, begin, end]}
    sha256            uint8 [N, 32], of the whole sidecar
    key               BLAKE2b of the row's name, which decides what --val_split holds out
    names, name_ends  uint8 [bytes], the names one after the other, and where each ends
    shape             place of the latent's shape in the field `shapes`
    tokens            text length in tokens, of the longest variant of a caption; all_tokens: of all variants
    num_bytes         of the tensors
    masked            whether there is a mask
    repeats           float32, how often the pair comes up in an epoch, on average
Its fields say what all rows agree on: RUN_KEYS, shapes, widths, suffix; and `failed`, if samples of the input of the
shard have no row in it. Reading a row takes one read and one SHA-256;
the sidecar's own header is parsed only if its fields are asked for.
"""

import hashlib
import json
import mmap
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cachetrain.data.sidecar import RUN_KEYS, Header, SidecarError, header_of, layout_of, metadata_of, tensors_of
from cachetrain.reading import named_errors, open_regular

if TYPE_CHECKING:
    import torch

SHARD_FORMAT = "1"
INDEX = "__index__/index.safetensors"

HEAD_BYTES = 2**15  # at the beginning of a shard, where its fields usually are

_BLOCK, _MAX_INDEX = 512, 2**30
_MAX_FAILED, _MAX_REASON = 100, 200  # that are named in a shard, and characters of each reason
_NO_SHA256 = "0" * 64
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "F32": np.float32}


class Row(NamedTuple):
    """One sidecar to pack.

    Attributes:
        name: path of the pair without a suffix, relative to its data directory.
        data: bytes of the sidecar.
        shape: latent shape (C, h, w); () in a text sidecar.
        tokens: number of tokens of each variant of the caption; () in an image sidecar.
        sources: where the variants of the caption come from.
    """

    name: str
    data: bytes
    header: Header
    shape: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()
    repeats: float = 1.0


def name_key(name: str) -> int:
    """The key of a name, uint64: its hash."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big")


class Failed(NamedTuple):
    """The samples of the input of a shard that have no row in it.

    Attributes:
        number: how many there are.
        first: list of [name, reason], at most _MAX_FAILED.
    """

    number: int = 0
    first: Sequence[Sequence[str]] = ()


def failed_rows(fields: Mapping) -> Failed:
    """The samples that have no row in a shard with these fields, `Shard.fields` or of `fields_in`."""
    return Failed(*fields.get("failed", ()))


def build_shard(
    rows: Sequence[Row], suffix: str, widths: dict[str, int], failed: Sequence[tuple[str, str]] = ()
) -> bytes:
    """Returns the bytes of a shard; the same arguments give the same bytes.

    Args:
        suffix: of the sidecars, added to the names of the members.
        widths: {name of a text tensor: width}; {} in shards of images.
        failed: (name, reason) of each sample without a row; the reason says nothing of time or machine.

    Raises:
        ValueError: rows differ in one of RUN_KEYS.
    """
    first = rows[0]
    for row in rows:
        for key, a, b in zip(RUN_KEYS, first.header.run_identity, row.header.run_identity, strict=True):
            if a != b:
                raise ValueError(f"{row.name}{suffix}: differs in {key} from {first.name}{suffix}")
    shapes = list(dict.fromkeys(row.shape for row in rows))
    starts_and_layouts = [layout_of(row.data) for row in rows]
    layouts = {}  # JSON of a layout -> its place
    layout = [layouts.setdefault(json.dumps(one), len(layouts)) for _, one in starts_and_layouts]
    heads = [_member_header(row.name + suffix, len(row.data)) for row in rows]
    ends = np.cumsum([len(head) + _padded(len(row.data)) for head, row in zip(heads, rows, strict=True)])
    starts = ends - [_padded(len(row.data)) for row in rows]
    names = [os.fsencode(row.name) for row in rows]
    arrays = {
        "offset": starts.astype(np.uint64),
        "length": np.array([len(row.data) for row in rows], np.uint32),
        "start": np.array([start for start, _ in starts_and_layouts], np.uint32),
        "layout": np.array(layout, np.uint16),
        "sha256": _rows_of(hashlib.sha256(row.data).digest() for row in rows),
        "key": np.array([name_key(row.name) for row in rows], np.uint64),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_ends": np.cumsum([len(name) for name in names]).astype(np.uint32),
        "shape": np.array([shapes.index(row.shape) for row in rows], np.uint16),
        "tokens": np.array([max(row.tokens, default=0) for row in rows], np.uint16),
        "all_tokens": np.array([sum(row.tokens) for row in rows], np.uint32),
        "num_bytes": np.array([row.header.num_bytes for row in rows], np.uint32),
        "masked": np.array(["mask" in row.header.shapes for row in rows], np.uint8),
        "repeats": np.array([row.repeats for row in rows], np.float32),
    }
    fields = {
        "shard_format": SHARD_FORMAT,
        "suffix": suffix,
        "shapes": shapes,
        "layouts": list(map(json.loads, layouts)),
        "widths": widths,
        "item_bytes": max(first.header.item_bytes, *(row.header.item_bytes for row in rows)),
        "sources": sorted({source for row in rows for source in row.sources}),
        **dict(zip(RUN_KEYS, first.header.run_identity, strict=True)),
    }
    if failed:
        fields["failed"] = len(failed), [(name, reason[:_MAX_REASON]) for name, reason in failed[:_MAX_FAILED]]
    size = len(_index_bytes(arrays, fields))  # offsets do not change it
    arrays["offset"] += np.uint64(_BLOCK + _padded(size))
    parts = [_member_header(INDEX, size), _padded_bytes(_index_bytes(arrays, fields))]
    for head, row in zip(heads, rows, strict=True):
        parts += [head, _padded_bytes(row.data)]
    return b"".join([*parts, bytes(2 * _BLOCK)])


class Shard:
    """A shard on disk, opened; rows are numbered from 0.

    Attributes:
        fields: dict, what all rows agree on.
        arrays: {name: array}, of each row, as in the index.

    Args:
        verify_index: False for a shard whose index has been verified before; a wrong row does not pass unnoticed even
            so.

    Raises:
        SidecarError: it is no shard, or its index is damaged.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike, verify_index: bool = True):
        self.path = os.fspath(path)
        self._file = open_regular(path)
        with named_errors(path):
            head = os.pread(self._file.fileno(), _BLOCK, 0)
            is_shard = head[: len(INDEX) + 1] == INDEX.encode() + b"\0"
            size = int(head[124:135], 8) if is_shard else _MAX_INDEX + 1
            if size > _MAX_INDEX:
                raise SidecarError(f"{path}: is not a shard; pack the folder again")
            file_size = os.fstat(self._file.fileno()).st_size
            if file_size < _BLOCK + size:
                raise SidecarError(f"{path}: its index is damaged; copy or pack it again")
            # Mapped, so that the indexes of thousands of shards stay in the page cache, once for all processes.
            data = memoryview(mmap.mmap(self._file.fileno(), _BLOCK + size, access=mmap.ACCESS_READ))[_BLOCK:]
        self.arrays, self.fields = _parse_index(path, data, verify_index)
        end = int(self.arrays["offset"][-1]) + _padded(int(self.arrays["length"][-1])) + 2 * _BLOCK
        if file_size != end:
            raise SidecarError(f"{path}: is truncated; copy or pack it again")

    def close(self) -> None:
        """Closes the file; reading opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __len__(self) -> int:
        return len(self.arrays["offset"])

    @property
    def run_identity(self) -> tuple[str, ...]:
        """The values of RUN_KEYS, on which all rows agree."""
        return tuple(self.fields[key] for key in RUN_KEYS)

    def names(self) -> list[bytes]:
        """The names of all rows, as the file system encodes them."""
        names, ends = self.arrays["names"].tobytes(), self.arrays["name_ends"].tolist()
        return [names[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def where(self, row: int) -> str:
        """`00012-5be2c0d1.tar#a.img_sdxl`, with the path of the shard."""
        ends = self.arrays["name_ends"]
        name = self.arrays["names"][ends[row - 1] if row else 0 : ends[row]].tobytes()
        return f"{self.path}#{os.fsdecode(name)}{self.fields['suffix']}"

    def read(self, row: int) -> bytearray:
        """The bytes of a sidecar, verified.

        Raises:
            SidecarError: they do not match the SHA-256 in the index.
        """
        data = bytearray(self.arrays["length"].item(row))
        if self._file is None:
            self._file = open_regular(self.path)
        with named_errors(self.path):
            os.preadv(self._file.fileno(), [data], self.arrays["offset"].item(row))
        if hashlib.sha256(data).digest() != self.arrays["sha256"][row].tobytes():
            raise SidecarError(
                f"{self.where(row)}: row {row} does not match the SHA-256 in the shard's index; copy or pack the "
                "shard again"
            )
        return data

    def tensors(self, row: int) -> "tuple[dict[str, torch.Tensor], Mapping[str, str]]":
        """Reads and verifies a sidecar; returns (tensors by name, header fields). Raises like `read`."""
        import torch

        dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
        data, tensors = self.read(row), {}
        start, layout = self.arrays["start"].item(row), self.fields["layouts"][self.arrays["layout"].item(row)]
        for name, (dtype, shape, begin, _) in layout.items():
            if dtype not in dtypes:
                return tensors_of(bytes(data), self.where, row), _Fields(data)
            flat = torch.frombuffer(data, dtype=dtypes[dtype], count=prod(shape), offset=start + begin)
            tensors[name] = flat.view(shape)
        return tensors, _Fields(data)


class _Fields(Mapping):
    """The header fields of a verified sidecar, parsed when they are first asked for."""

    def __init__(self, data: bytes):
        self._data = data

    @cached_property
    def _fields(self):
        return metadata_of(self._data)

    def __getitem__(self, name: str) -> str:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def fields_in(where: str, read: Callable[[int], bytes]) -> dict:
    """The fields of a shard from its beginning alone, not verified.

    Args:
        where: names the shard in the error message.
        read: function of a number of bytes that returns as many from the beginning, or all there are.

    Raises:
        SidecarError: it is no shard, or its index is damaged.
    """
    head = read(HEAD_BYTES)
    end = _BLOCK + 8 + int.from_bytes(head[_BLOCK : _BLOCK + 8], "little")
    if len(head) < end <= _MAX_INDEX:
        head = read(end)
    try:
        return json.loads(json.loads(head[_BLOCK + 8 : end])["__metadata__"]["shard"])
    except (ValueError, KeyError, TypeError) as error:
        raise SidecarError(f"{where}: its index is damaged; copy or pack it again") from error


def _index_bytes(arrays, fields):
    from safetensors.numpy import save

    # One JSON text: safetensors writes several fields in random order.
    metadata = {"shard": json.dumps(fields | {"sha256": _NO_SHA256})}
    data = save(arrays, metadata)
    return data.replace(_NO_SHA256.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def _parse_index(path, data, verify):
    """(arrays, fields) of the bytes of an index; arrays are views. `verify`: compare it with its SHA-256."""
    try:
        start, layout = layout_of(data)
        arrays = {
            name: np.frombuffer(data, _DTYPES[dtype], prod(shape), start + begin).reshape(shape)
            for name, (dtype, shape, begin, _) in layout.items()
        }
        fields = json.loads(header_of(data).metadata["shard"])
        digest = fields["sha256"].encode()
        if (
            verify
            and hashlib.sha256(bytes(data).replace(digest, _NO_SHA256.encode(), 1)).hexdigest() != fields["sha256"]
        ):
            raise ValueError
    except (SidecarError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SidecarError(f"{path}: its index is damaged; copy or pack it again") from error
    if fields["shard_format"] != SHARD_FORMAT:
        raise SidecarError(f"{path}: has format {fields['shard_format']}, this version reads {SHARD_FORMAT}")
    return arrays, fields


def _member_header(name, size):
    """The block or blocks in front of a member; long names and other letters than ASCII take several."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padded(size):
    return -(-size // _BLOCK) * _BLOCK


def _padded_bytes(data):
    return data + bytes(_padded(len(data)) - len(data))


def _rows_of(digests: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
