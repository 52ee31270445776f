"""The contract between the two stages: what a cache file holds, and how it is written and read.

A sidecar is a safetensors file beside its source, whose suffix REPLACES the source's: `a.jpg`, `a.txt` ->
`a.img_sdxl`, `a.txt_t5cache`. Its safetensors metadata is the header: it says from which source, by which
encoder and with which settings the tensors were made. This module imports no torch until tensors are touched.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from cachetrain.atomic import atomic_write

FORMAT = "1"
NULL_STEM = "_null_caption"

# kind -> default suffix. Image kinds hold `latent` (and `latent_flip`, `logvar` on request), text kinds `emb`.
SUFFIXES = {
    "img_sdvae": ".img_sdvae",
    "img_sdxl": ".img_sdxl",
    "txt_clipl": ".txt_clipl",
    "txt_t5cache": ".txt_t5cache",
}


# Stands for a hash in the header while it is computed.
_NO_SHA256 = "0" * 64

# Sidecars that may train together agree on all of these.
RUN_KEYS = ("kind", "encoder", "settings", "scaling_factor", "shift_factor")


class SidecarError(ValueError):
    """A sidecar that is cut, flipped or otherwise not what its writer wrote."""


class Header(NamedTuple):
    """The readable part of a sidecar: `metadata` is {} for a foreign (headerless) file."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @property
    def foreign(self):
        return not {"cachetrain_format", "sha256", "header_sha256"} & self.metadata.keys()

    @property
    def run_identity(self):
        """The fields on which sidecars of one run must agree, as a comparable tuple."""
        return tuple(self.metadata.get(key, "") for key in RUN_KEYS)


def sidecar_path(source, suffix):
    """`dir/a.b.jpg`, `.img_sdxl` -> `dir/a.b.img_sdxl`."""
    source = Path(source)
    return source.with_name(source.stem + suffix)


def write_sidecar(path, tensors, metadata):
    """Writes one sidecar atomically.

    Args:
        path: target; its directory must exist.
        tensors: name -> CPU tensor.
        metadata: str -> str; the format and two hashes are added: `sha256` of the payload, which safetensors does
            not check, and `header_sha256` of everything before it, so that a header can be trusted unread further.
    """
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    added = {"cachetrain_format": FORMAT, "sha256": _NO_SHA256, "header_sha256": _NO_SHA256}
    data = save(tensors, metadata | added)
    start = _payload_start(data)
    payload = memoryview(data)[start:]
    header = data[:start].replace(_entry("sha256"), _entry("sha256", hashlib.sha256(payload).hexdigest()))
    header = header.replace(_entry("header_sha256"), _entry("header_sha256", hashlib.sha256(header).hexdigest()))
    atomic_write(path, b"".join((header, payload)))


def read_header(path):
    """Reads the header alone: one open, one read of a few KiB, one size check.

    Raises:
        SidecarError: the file is cut or its header is not readable.
        OSError: the file cannot be opened.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, 4096))
        wanted = 8 + int.from_bytes(data[:8], "little")
        if len(data) < wanted <= size:
            data += file.read(wanted - len(data))
    return _parse(path, data, size)


def read_sidecar(path):
    """Reads and verifies one sidecar.

    Returns:
        (tensors by name, Header). Foreign files are returned unverified.

    Raises:
        SidecarError: the file does not match its own hashes, or cannot be parsed.
        OSError: the file cannot be opened.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data, header = read_verified(path)
    try:
        return load(data), header
    except SafetensorError as error:
        raise SidecarError(f"{path}: {error}; run the cache script again") from error


def read_verified(path):
    """Reads one sidecar as it is and verifies it, as `read_sidecar` does; returns (bytes, Header)."""
    data = Path(path).read_bytes()
    header = _parse(path, data, len(data))
    payload = memoryview(data)[_payload_start(data) :]
    if not header.foreign and header.metadata.get("sha256") != hashlib.sha256(payload).hexdigest():
        raise SidecarError(f"{path}: its tensors do not match their SHA-256; delete it, or run the cache "
                           "script with --full")  # fmt: skip
    return data, header


def _entry(key, digest=_NO_SHA256):
    """Bytes of a hash in the header, as safetensors writes them."""
    return f'"{key}":"{digest}"'.encode()


def _payload_start(data):
    return 8 + int.from_bytes(data[:8], "little")


def _parse(path, data, size):
    """Parses and checks the header of a file of `size` bytes that begins with `data`."""
    start = _payload_start(data)
    try:
        table = json.loads(data[8:start])
        metadata = table.pop("__metadata__", {})
        header = Header(
            metadata,
            {name: tuple(entry["shape"]) for name, entry in table.items()},
            {name: entry["dtype"] for name, entry in table.items()},
        )
        end = start + max((entry["data_offsets"][1] for entry in table.values()), default=0)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise SidecarError(f"{path}: not a readable safetensors file; run the cache script again") from error
    if end != size:
        raise SidecarError(f"{path}: {size} bytes, its header promises {end}; run the cache script again")
    if header.foreign:
        return header
    if metadata.get("cachetrain_format", FORMAT) != FORMAT:
        raise SidecarError(
            f"{path}: format {metadata['cachetrain_format']}, this version reads {FORMAT}; run the cache script again"
        )
    digest = metadata.get("header_sha256")
    blank = data[:start].replace(_entry("header_sha256", digest), _entry("header_sha256"))
    if hashlib.sha256(blank).hexdigest() != digest:
        raise SidecarError(f"{path}: its header does not match its SHA-256; run the cache script again")
    return header
