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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
INDEX_START = 512  # where the index begins: behind its tar header

_BLOCK, _MAX_INDEX = 512, 2**30
_MAX_FAILED, _MAX_REASON = 100, 200  # that are named in a shard, and characters of each reason
_PLAIN_HEADER = tarfile.TarInfo().tobuf(tarfile.PAX_FORMAT)
_NO_SHA256 = "0" * 64
NOT_SEALED = ValueError, KeyError, TypeError, AttributeError  # what `unsealed` raises
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "F32": np.float32, "F64": np.float64}


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
    """The samples that have no row in a shard with these fields, as of `Shard.fields`."""
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
    heads = [member_header(row.name + suffix, len(row.data)) for row in rows]
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
    size = len(sealed(arrays, fields))  # offsets do not change it
    arrays["offset"] += np.uint64(_BLOCK + _padded(size))
    parts = [member_header(INDEX, size), _padded_bytes(sealed(arrays, fields))]
    for head, row in zip(heads, rows, strict=True):
        parts += [head, _padded_bytes(row.data)]
    return b"".join([*parts, bytes(2 * _BLOCK)])


def index_size(path: str | os.PathLike, head: bytes) -> int:
    """Bytes of the index, which follows the first INDEX_START bytes of a shard.

    Args:
        path: names the shard in messages.
        head: those first bytes.

    Raises:
        SidecarError: it is no shard.
    """
    digits = head[124:135]
    is_shard = head[: len(INDEX) + 1] == INDEX.encode() + b"\0" and digits.isdigit() and not set(digits) & set(b"89")
    if not is_shard or int(digits, 8) > _MAX_INDEX:
        raise SidecarError(f"{path}: is not a shard; pack the folder again")
    return int(digits, 8)


class ShardIndex:
    """The index of a shard, wherever that is; rows are numbered from 0.

    Attributes:
        path: path or address of the shard.
        size, index_end: bytes of the shard, and where its index ends in it.
        fields: dict, what all rows agree on.
        arrays: {name: array}, of each row, as in the index.

    Args:
        data: bytes of the index; the arrays are views of them.
        size: bytes of the shard; None: not known.
        verify: False for an index that has been verified before; a wrong row does not pass unnoticed even so.

    Raises:
        SidecarError: it is damaged, or the shard is truncated.
    """

    def __init__(self, path: str | os.PathLike, data: bytes | memoryview, size: int | None, verify: bool = True):
        self.path = os.fspath(path)
        try:
            self.arrays, self.fields = unsealed(data, verify)
            found = self.fields["shard_format"]
        except NOT_SEALED as error:
            raise SidecarError(f"{path}: its index is damaged; copy or pack it again") from error
        if found != SHARD_FORMAT:
            raise SidecarError(f"{path}: has format {found}, this version reads {SHARD_FORMAT}")
        self.index_end = INDEX_START + len(data)
        self.size = int(self.arrays["offset"][-1]) + _padded(int(self.arrays["length"][-1])) + 2 * _BLOCK
        if size not in (None, self.size):
            raise SidecarError(f"{path}: is truncated; copy or pack it again")

    def __len__(self) -> int:
        return len(self.arrays["offset"])

    @property
    def run_identity(self) -> tuple[str, ...]:
        """The values of RUN_KEYS, on which all rows agree."""
        return tuple(self.fields[key] for key in RUN_KEYS)

    @property
    def seal(self) -> int:
        """The first 64 bits of the SHA-256 of the index, which covers the hashes of all rows."""
        return int(self.fields["sha256"][:16], 16)

    def names(self) -> list[bytes]:
        """The names of all rows, as the file system encodes them."""
        names, ends = self.arrays["names"].tobytes(), self.arrays["name_ends"].tolist()
        return [names[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def name(self, row: int) -> str:
        """The name of a row."""
        ends = self.arrays["name_ends"]
        return os.fsdecode(self.arrays["names"][ends[row - 1] if row else 0 : ends[row]].tobytes())

    def where(self, row: int) -> str:
        """`00012-5be2c0d1.tar#a.img_sdxl`, with the path of the shard."""
        return f"{self.path}#{self.name(row)}{self.fields['suffix']}"

    def before(self, row: int, end: int) -> bytes:
        """What lies between `end`, where the row before or the index ends, and a row: padding and a member header."""
        name = self.name(row) + self.fields["suffix"]
        return bytes(_padded(end) - end) + member_header(name, self.arrays["length"].item(row))

    def check(self, row: int, sha256: bytes) -> None:
        """Compares the SHA-256 of a sidecar with that in the index.

        Raises:
            SidecarError: it is another.
        """
        if sha256 != self.arrays["sha256"][row].tobytes():
            raise SidecarError(
                f"{self.where(row)}: row {row} does not match the SHA-256 in the shard's index; copy or pack the "
                "shard again"
            )


class Shard(ShardIndex):
    """A shard on disk. Reading opens it.

    Args:
        verify_index: as `verify` of ShardIndex.
        index: path of a copy of the shard's first bytes, up to the end of the index; the shard itself may come later.
        size: bytes that the shard should have; default: those of the file, or with `index`, any.
        where: names the shard in messages; default: its path.

    Raises:
        SidecarError: it is no shard, or its index is damaged.
        OSError: it cannot be opened.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        verify_index: bool = True,
        index: str | os.PathLike | None = None,
        size: int | None = None,
        where: str | None = None,
    ):
        self._file, self._file_path = None, os.fspath(path)
        source, path = index or path, where or path
        with open_regular(source) as file, named_errors(source):
            index_bytes = index_size(path, os.pread(file.fileno(), INDEX_START, 0))
            file_size = os.fstat(file.fileno()).st_size
            if file_size < INDEX_START + index_bytes:
                raise SidecarError(f"{path}: its index is damaged; copy or pack it again")
            # Mapped, so that the indexes of thousands of shards stay in the page cache, once for all processes.
            mapped = mmap.mmap(file.fileno(), INDEX_START + index_bytes, access=mmap.ACCESS_READ)
        super().__init__(path, memoryview(mapped)[INDEX_START:], size if index else file_size, verify_index)

    def open(self) -> None:
        """Opens the file, unless it is open."""
        if self._file is None:
            self._file = open_regular(self._file_path)

    def close(self) -> None:
        """Closes the file; reading opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def is_deleted(self) -> bool:
        """Whether the file is open, but has no name any more, so that it takes space until it is closed."""
        return self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0

    def read(self, row: int) -> bytearray:
        """The bytes of a sidecar, verified.

        Raises:
            SidecarError: they do not match the SHA-256 in the index.
        """
        data = bytearray(self.arrays["length"].item(row))
        self.open()
        with named_errors(self.path):
            os.preadv(self._file.fileno(), [data], self.arrays["offset"].item(row))
        self.check(row, hashlib.sha256(data).digest())
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


def sealed(arrays: Mapping[str, np.ndarray], fields: Mapping[str, object]) -> bytes:
    """A safetensors file of arrays and of fields, JSON-able, with a SHA-256 of all of it."""
    from safetensors.numpy import save

    # One JSON text: safetensors writes several fields in random order.
    metadata = {"shard": json.dumps({**fields, "sha256": _NO_SHA256})}
    data = save(dict(arrays), metadata)
    return data.replace(_NO_SHA256.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def unsealed(data: bytes | memoryview, verify: bool = True) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, fields) of the bytes that `sealed` made; arrays are views. `verify`: compare them with their SHA-256.

    Raises:
        one of NOT_SEALED: they are not as `sealed` made them.
    """
    start, layout = layout_of(data)
    arrays = {
        name: np.frombuffer(data, _DTYPES[dtype], prod(shape), start + begin).reshape(shape)
        for name, (dtype, shape, begin, _) in layout.items()
    }
    fields = json.loads(header_of(data).metadata["shard"])
    unsigned = bytes(data).replace(fields["sha256"].encode(), _NO_SHA256.encode(), 1) if verify else b""
    if verify and hashlib.sha256(unsigned).hexdigest() != fields["sha256"]:
        raise ValueError("does not match its SHA-256")
    return arrays, fields


def member_header(name: str, size: int) -> bytes:
    """The block or blocks in front of a member; long names and other letters than ASCII take several."""
    if len(name) > 100 or not name.isascii() or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    # The same in a third of the time, for --verify: 30 us are as long as the SHA-256 of a latent takes.
    header = bytearray(_PLAIN_HEADER)
    header[: len(name)] = name.encode()
    header[124:135] = b"%011o" % size
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def _padded(size):
    return -(-size // _BLOCK) * _BLOCK


def _padded_bytes(data):
    return data + bytes(_padded(len(data)) - len(data))


def _rows_of(digests: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
