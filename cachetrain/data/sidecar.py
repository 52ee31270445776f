"""The sidecar format, which connects caching and training: contents, writing, reading, verifying.

A sidecar is a safetensors file beside its source; the sidecar's suffix REPLACES the source's: `a.jpg`, `a.txt` ->
`a.img_sdxl`, `a.txt_t5cache`. The safetensors metadata, here called the header, records the source, encoder and
settings that the tensors were made from. This module does not import torch until tensors are read or written.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection
from itertools import count
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cachetrain.atomic import atomic_write
from cachetrain.log import counted
from cachetrain.reading import json_object, named_errors, open_regular, read_bytes

if TYPE_CHECKING:
    import torch

FORMAT = "1"
NULL_STEM = "_null_caption"

# kind -> default suffix. Image kinds hold `latent` (optionally `latent_flip`, `logvar`, `mask`), and of further crops
# `latent.1` and so on; text kinds hold `emb` and, for SDXL, `pooled`, and of further variants of a caption `emb.1`,
# `pooled.1` and so on.
SUFFIXES = {
    "img_sdvae": ".img_sdvae",
    "img_sdxl": ".img_sdxl",
    "txt_clipl": ".txt_clipl",
    "txt_t5cache": ".txt_t5cache",
    "txt_sdxl": ".txt_sdxl",
}

ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}

# Bytes of a header, which takes less than 2 KiB, and of a whole file; more is not read.
_MAX_HEADER, MAX_FILE = 2**20, 2**30

# The form of the header fields that are numbers. ASCII digits only: int() takes those of all scripts.
_WHOLE, _DECIMAL = "[0-9]{1,18}", r"[0-9]{1,18}(\.[0-9]{1,30})?(e[+-]?[0-9]{1,3})?"
_FORMS = {
    **dict.fromkeys(("width", "height", "original_width", "original_height", "num_tokens"), _WHOLE),
    "scaling_factor": f"{_DECIMAL}(,{_DECIMAL})*",  # one number, or one for each channel
    "shift_factor": f"-?{_DECIMAL}(,-?{_DECIMAL})*",
    "crop_box": ",".join([_DECIMAL] * 4),
    "mask_share": _DECIMAL,
}

# What parsing a malformed header raises.
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError, IndexError, RecursionError)

# Placeholder in the header for a hash that is not computed yet.
_NO_SHA256 = "0" * 64

# Sidecars must agree on all of these to be trained on together.
RUN_KEYS = ("kind", "encoder", "settings", "scaling_factor", "shift_factor")


class SidecarError(ValueError):
    """A sidecar is truncated or was altered after it was written."""


class Header(NamedTuple):
    """A sidecar without its tensors.

    Attributes:
        metadata: header fields; {} for a file without a header.
        shapes, dtypes: shape and dtype of each tensor, by name; dtypes as safetensors names them ("F16").
    """

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @property
    def foreign(self) -> bool:
        """Whether the file lacks a cachetrain header."""
        return not {"cachetrain_format", "sha256", "header_sha256"} & self.metadata.keys()

    @property
    def num_bytes(self) -> int:
        """Size of the tensors."""
        return sum(prod(shape) * ITEM_BYTES.get(self.dtypes[name], 4) for name, shape in self.shapes.items())

    @property
    def item_bytes(self) -> int:
        """Size of an element of the widest dtype."""
        return max(ITEM_BYTES.get(dtype, 4) for dtype in self.dtypes.values())

    @property
    def run_identity(self) -> tuple[str, ...]:
        """The values of RUN_KEYS, which must be equal in all sidecars of a run."""
        return tuple(self.metadata.get(key, "") for key in RUN_KEYS)


def sidecar_path(source: str | Path, suffix: str) -> Path:
    """`dir/a.b.jpg`, `.img_sdxl` -> `dir/a.b.img_sdxl`."""
    source = Path(source)
    return source.with_name(source.stem + suffix)


def numbered(name: str, number: int) -> str:
    """The name of a tensor or header field of crop `number`, from 0: `latent`, `latent.1`, `latent.2`."""
    return f"{name}.{number}" if number else name


def num_crops(names: Collection[str]) -> int:
    """How many crops an image sidecar with tensors of these names holds."""
    return next(number for number in count(1) if numbered("latent", number) not in names)


def of_crop(metadata: dict[str, str], number: int) -> dict[str, str]:
    """The header fields of crop `number`: its crop box in place of that of the first."""
    if not number:
        return metadata
    boxes = {"crop_box": metadata[box]} if (box := numbered("crop_box", number)) in metadata else {}
    return {name: value for name, value in metadata.items() if name != "crop_box"} | boxes


def write_sidecar(path: str | Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str]) -> None:
    """Writes one sidecar atomically.

    Args:
        path: target; its directory must exist.
        tensors: CPU tensors by name.
        metadata: header fields. The format and two hashes are added: `sha256` covers the tensors' bytes, which
            safetensors does not check, and `header_sha256` covers the rest, so that a header can be verified without
            reading the tensors.
    """
    atomic_write(path, sidecar_bytes(tensors, metadata))


def sidecar_bytes(tensors: "dict[str, torch.Tensor]", metadata: dict[str, str]) -> bytes:
    """Returns the bytes of one sidecar, as `write_sidecar` writes them; the same content gives the same bytes."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    added = {"cachetrain_format": FORMAT, "sha256": _NO_SHA256, "header_sha256": _NO_SHA256}
    data = _in_order(save(tensors, metadata | added))
    start = _payload_start(data)
    payload = memoryview(data)[start:]
    header = data[:start].replace(_entry("sha256"), _entry("sha256", hashlib.sha256(payload).hexdigest()))
    header = header.replace(_entry("header_sha256"), _entry("header_sha256", hashlib.sha256(header).hexdigest()))
    return b"".join((header, payload))


def read_header(path: str | Path) -> Header:
    """Reads only the header: one open, one read of a few KiB, one size check.

    Raises:
        SidecarError: the file is truncated, or the header is damaged.
        OSError: the file cannot be opened.
    """
    with open_regular(path) as file, named_errors(path):
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, 4096)) or b""
        header_size = _payload_start(data)
        if len(data) < header_size <= min(size, _MAX_HEADER):
            data += file.read(header_size - len(data)) or b""
    return _parse(path, data, size)


def read_sidecar(path: str | Path) -> "tuple[dict[str, torch.Tensor], Header]":
    """Reads and verifies one sidecar.

    Returns:
        (tensors by name, Header). A foreign file is returned unverified.

    Raises:
        SidecarError: the file does not match its hashes, or cannot be parsed.
        OSError: the file cannot be opened.
    """
    data, header = read_verified(path)
    return tensors_of(data, str, path), header


def tensors_of(data: bytes, where: Callable[..., str], *args: object) -> "dict[str, torch.Tensor]":
    """Returns the tensors of a verified sidecar by name; where(*args) names it in the error message.

    Raises:
        SidecarError: they cannot be parsed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise SidecarError(f"{where(*args)}: {error}; run the cache script again") from error


def read_verified(path: str | Path) -> tuple[bytes, Header]:
    """Reads and verifies one sidecar like `read_sidecar`, but returns (bytes of the file, Header)."""
    data = read_bytes(path, MAX_FILE)
    return data, verified(path, data)


def verified(path: str | Path, data: bytes) -> Header:
    """Verifies the bytes of one sidecar, which `path` names in messages; raises SidecarError like `read_sidecar`."""
    header = _parse(path, data, len(data))
    payload = memoryview(data)[_payload_start(data) :]
    if not header.foreign and header.metadata.get("sha256") != hashlib.sha256(payload).hexdigest():
        raise SidecarError(
            f"{path}: tensors do not match their SHA-256; delete the file, or run the cache script with --full"
        )
    return header


def header_of(data: bytes) -> Header:
    """Returns the Header of a verified sidecar from the file's bytes.

    Raises:
        SidecarError: it is no safetensors file.
    """
    try:
        return _header(json.loads(bytes(data[8 : _payload_start(data)])))
    except _MALFORMED as error:
        raise SidecarError("not a readable safetensors file") from error


def layout_of(data: bytes) -> tuple[int, dict[str, tuple]]:
    """Returns (where the tensors of a verified sidecar start, {name: (dtype, shape, begin, end)}) from its bytes."""
    start = _payload_start(data)
    table = json.loads(bytes(data[8:start]))
    table.pop("__metadata__", None)
    return start, {name: (e["dtype"], e["shape"], *e["data_offsets"]) for name, e in table.items()}


def metadata_of(data: bytes) -> dict[str, str]:
    """Returns the header fields of a verified sidecar from the file's bytes."""
    return json.loads(data[8 : _payload_start(data)]).get("__metadata__", {})


def caption_lengths(metadata: dict[str, str]) -> list[int]:
    """Returns the number of tokens of each variant of a caption from the header fields; [] if they do not say."""
    return [int(value) for name, value in metadata.items() if name.partition(".")[0] == "num_tokens"]


def num_truncated(metadata: dict[str, str]) -> int:
    """Returns how many variants of a caption were truncated, by the header fields."""
    return sum(name.partition(".")[0] == "truncated" and value == "1" for name, value in metadata.items())


def settings_of(path: str | Path, header: Header) -> dict:
    """Returns the settings that a sidecar was made with; {} if they are not recorded.

    Raises:
        ValueError: they are no JSON object.
    """
    return json_object(f"{path}: the settings in its header", header.metadata.get("settings") or "{}")


def _entry(key, digest=_NO_SHA256):
    """Bytes of a hash entry in the header, as safetensors writes them."""
    return f'"{key}":"{digest}"'.encode()


def _in_order(data):
    """A safetensors file with its metadata sorted by name; safetensors writes them in random order."""
    start = _payload_start(data)
    table = json.loads(data[8:start])
    table["__metadata__"] = dict(sorted(table["__metadata__"].items()))
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the tensors
    return len(text).to_bytes(8, "little") + text + data[start:]


def _payload_start(data):
    return 8 + int.from_bytes(data[:8], "little")


def _parse(path, data, size):
    """Parses and checks the header in `data`, the beginning of a file of `size` bytes."""
    start = _payload_start(data)
    try:
        if start > _MAX_HEADER:
            raise ValueError
        table = json.loads(data[8:start])
        metadata = table.get("__metadata__", {})
        header = _header(table)
        end = start + max((_count(entry["data_offsets"][1]) for entry in table.values()), default=0)
    except _MALFORMED as error:
        raise SidecarError(f"{path}: not a readable safetensors file; run the cache script again") from error
    if end != size:
        raise SidecarError(
            f"{path}: has {counted(size, 'byte')}, the header expects {end}; run the cache script again"
        )
    if header.foreign:
        return header
    if metadata.get("cachetrain_format", FORMAT) != FORMAT:
        raise SidecarError(
            f"{path}: has format {metadata['cachetrain_format']}, this version reads {FORMAT}; "
            "run the cache script again"
        )
    digest = metadata.get("header_sha256")
    blank = data[:start].replace(_entry("header_sha256", digest), _entry("header_sha256"))
    if hashlib.sha256(blank).hexdigest() != digest:
        raise SidecarError(f"{path}: the header does not match its SHA-256; run the cache script again")
    _check_fields(path, header.metadata)
    return header


def _header(table):
    """The Header of a parsed JSON header, from which its metadata are removed."""
    metadata = table.pop("__metadata__", {})
    return Header(
        {name: str(value) for name, value in metadata.items()},
        {name: tuple(map(_count, entry["shape"])) for name, entry in table.items()},
        {name: str(entry["dtype"]) for name, entry in table.items()},
    )


def _count(value):
    """A whole number from 0 in JSON; int() would also take "8" and 8.5."""
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _check_fields(path, metadata):
    """Checks the header fields that are numbers, whoever wrote them."""
    for name, value in metadata.items():
        pattern = _FORMS.get(name.partition(".")[0])  # num_tokens.1: of a variant
        if pattern is not None and not re.fullmatch(pattern, value):
            raise SidecarError(f"{path}: its header says {name} {value!r:.40}; run the cache script again")
    if "crop_box" in metadata:
        try:
            sides = [int(metadata[name]) for name in ("width", "height", "original_width", "original_height")]
            left, top, right, bottom = map(float, metadata["crop_box"].split(","))
        except KeyError as error:
            raise SidecarError(f"{path}: its header lacks {error}; run the cache script again") from None
        if min(sides) < 1 or not (left < right and top < bottom):
            raise SidecarError(f"{path}: its header has an empty image; run the cache script again")
