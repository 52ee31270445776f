"""The contract between the two stages: what a cache file holds, and how it is written and read.

A sidecar is a safetensors file beside its source, whose suffix REPLACES the source's: `a.jpg`, `a.txt` ->
`a.img_sdxl`, `a.txt_t5cache`. Its safetensors metadata is the header: it says from which source, by which
encoder and with which settings the tensors were made. This module imports no torch until tensors are touched.
"""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import NamedTuple

FORMAT = "1"
NULL_STEM = "_null_caption"

# kind -> default suffix. Image kinds hold `latent` (and `latent_flip`, `logvar` on request), text kinds `emb`.
SUFFIXES = {
    "img_sdvae": ".img_sdvae",
    "img_sdxl": ".img_sdxl",
    "txt_clipl": ".txt_clipl",
    "txt_t5cache": ".txt_t5cache",
}

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
        return "cachetrain_format" not in self.metadata and "sha256" not in self.metadata

    @property
    def run_identity(self):
        """The fields on which sidecars of one run must agree, as a comparable tuple."""
        return tuple(self.metadata.get(key, "") for key in RUN_KEYS)


def sidecar_path(source, suffix):
    """`dir/a.b.jpg`, `.img_sdxl` -> `dir/a.b.img_sdxl`."""
    source = Path(source)
    return source.with_name(source.stem + suffix)


def atomic_write(path, data):
    """Writes bytes under `path`, which holds either its old or its new content at every moment."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_sidecar(path, tensors, metadata):
    """Writes one sidecar atomically.

    Args:
        path: target; its directory must exist.
        tensors: name -> CPU tensor.
        metadata: str -> str; `cachetrain_format` and `sha256` are added here.
    """
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"cachetrain_format": FORMAT, **metadata}
    _, digest = _split(path, save(tensors, metadata))
    atomic_write(path, save(tensors, {**metadata, "sha256": digest}))


def read_header(path):
    """Reads the header alone: one open, one read of a few KiB, one size check.

    Raises:
        SidecarError: the file is cut or its header is not readable.
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, 4096))
        wanted = 8 + int.from_bytes(data[:8], "little")
        if len(data) < wanted <= size:
            data += file.read(wanted - len(data))
    return _split(path, data, size)[0]


def read_sidecar(path):
    """Reads and verifies one sidecar.

    Returns:
        (tensors by name, Header). Foreign files are returned unverified.

    Raises:
        SidecarError: the file does not match its own hash, or cannot be parsed.
        OSError: the file cannot be opened.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = Path(path).read_bytes()
    header, digest = _split(path, data)
    if not header.foreign and header.metadata.get("sha256") != digest:
        raise SidecarError(f"{path}: content does not match its SHA-256; delete it, or run the cache "
                           "script with --verify")  # fmt: skip
    try:
        return load(data), header
    except SafetensorError as error:
        raise SidecarError(f"{path}: {error}; run the cache script again") from error


def _split(path, data, size=None):
    """Parses safetensors bytes, of which the payload may be missing when the file's `size` is given.

    Returns:
        (Header, digest): the SHA-256 over header fields, tensor table and payload, so that a flip anywhere in
        the file changes it (safetensors itself misses one in the payload).
    """
    size = len(data) if size is None else size
    start = 8 + int.from_bytes(data[:8], "little")
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
    if not header.foreign and metadata.get("cachetrain_format") != FORMAT:
        raise SidecarError(
            f"{path}: format {metadata.get('cachetrain_format')}, this version reads {FORMAT}; "
            "run the cache script again"
        )
    fields = {key: value for key, value in metadata.items() if key != "sha256"}
    canonical = json.dumps([fields, table], sort_keys=True).encode()
    return header, hashlib.sha256(canonical + b"\0" + data[start:]).hexdigest()
