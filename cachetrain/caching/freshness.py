"""Decides which sidecars have to be made, from one stat of the source and one header read per sidecar."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cachetrain.data import variants
from cachetrain.data.captions import Pair
from cachetrain.data.masks import mask_file
from cachetrain.data.sidecar import Header, SidecarError, read_header, read_sidecar, write_sidecar
from cachetrain.data.walk import MAX_IMAGE
from cachetrain.modeling import normalisation
from cachetrain.reading import open_regular, read_bytes

FRESH, MISSING, STALE, CORRUPT, FOREIGN = "fresh", "missing", "stale", "corrupt", "foreign"

# The source has a new time or settings but the same content, so the sidecar counts as fresh.
TOUCHED = "touched"

# A sidecar is stale when its header differs from the run in one of these.
COMPARED_FIELDS = ("kind", "encoder", "settings")

# Where a run says other numbers (--norm), these are written to the headers of sidecars that are fresh otherwise.
UPDATED_FIELDS = (*normalisation.FIELDS, "norm")


class Source(NamedTuple):
    """State of what a sidecar is made from.

    Attributes:
        size, mtime_ns: of the file, as in headers; None if there is no such file.
        sha256: a function, because hashing is rarely needed.
        captions: of a text sidecar: CaptionSettings.in_header.
        mask: Source of the image's mask file; None if the sidecar does not depend on one.
    """

    size: str | None
    mtime_ns: str | None
    sha256: Callable[[], str | None]
    captions: str = ""
    mask: "Source | None" = None

    @property
    def files(self) -> "dict[str, Source]":
        """By the prefix of their header fields, the files that a sidecar is made from."""
        return {"source": self} | ({"mask": self.mask} if self.mask else {})


def image_source(pair: Pair, masked: bool = False) -> Source:
    """Source of an image sidecar: the bytes of the image file.

    Args:
        masked: the bytes of its mask file, too; that there is none also counts.

    Raises:
        OSError: the image cannot be read.
        ValueError: the mask cannot be read.
    """
    source = _source_of(pair.image)
    if not masked:
        return source
    path = mask_file(pair.image)
    try:
        return source._replace(mask=Source(None, None, lambda: None) if path is None else _source_of(path))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error  # the file is named, which is not the image


def _source_of(path):
    stat = os.stat(path)

    def sha256():
        return hashlib.sha256(read_bytes(path, MAX_IMAGE)).hexdigest()

    return Source(str(stat.st_size), str(stat.st_mtime_ns), sha256)


def has_mask_file(metadata: dict[str, str]) -> bool:
    """Whether an image sidecar with these header fields was made with --mask files."""
    return '"mask": "files"' in metadata.get("settings", "")


def caption_source(pair: Pair, settings: variants.CaptionSettings = variants.PLAIN) -> Source:
    """Source of a text sidecar: the captions as encoded, from their files or from the image's name."""
    settings = variants.settings_of_pair(pair, settings)
    if pair.caption_file is None:
        captions = variants.read_captions(pair, settings)
        return Source(captions.size, captions.mtime_ns, lambda: captions.sha256, captions.settings)
    stats = map(os.stat, variants.caption_files(pair, settings))
    state = variants.fingerprint(pair, settings, [(stat.st_size, stat.st_mtime_ns) for stat in stats])
    return Source(*state, lambda: variants.read_captions(pair, settings).sha256, settings.in_header())


def sidecar_state(
    path: str | Path, source: Source, wanted: dict[str, str], full: bool = False
) -> tuple[str, dict[str, str]]:
    """Returns the state of a sidecar.

    If the source has a new time, or captions new settings, and the SHA-256 is the same, the sidecar is fresh, and
    time and settings are written to its header, so that the next run need not hash the source again.

    Args:
        path: of the sidecar.
        source: state of its image or caption.
        wanted: header fields of this run.
        full: hash the source and the whole sidecar, whatever size, time and header say.

    Returns:
        (FRESH, MISSING, STALE, CORRUPT or FOREIGN; header fields, {} if there are none).

    Raises:
        OSError: source or sidecar exists but cannot be read.
        ValueError: the caption is not UTF-8 text.
    """
    state, header = file_state(path, full)
    if state is None and any(header.metadata.get(key) != wanted[key] for key in COMPARED_FIELDS):
        state = STALE
    if state is None:
        state = source_state(header.metadata, source, full)
    updates = {key: wanted[key] for key in UPDATED_FIELDS if key in wanted}
    numbers = updates.keys() & normalisation.FIELDS
    if state == TOUCHED or (state == FRESH and any(header.metadata.get(key) != updates[key] for key in numbers)):
        state = _store_new_state(path, source, updates)
    return state, header.metadata


def file_state(path: str | Path, full: bool = False) -> tuple[str | None, Header]:
    """Returns what a sidecar alone shows: (MISSING, CORRUPT, FOREIGN, or None if its source decides; its header).

    Args:
        full: also compare the tensors with their hash.
    """
    try:
        header = read_sidecar(path)[1] if full else read_header(path)
    except FileNotFoundError:
        return MISSING, Header({}, {}, {})
    except SidecarError:
        return CORRUPT, Header({}, {}, {})
    return (FOREIGN if header.foreign else None), header


def source_state(metadata: dict[str, str], source: Source, full: bool = False) -> str:
    """Returns the state of a sidecar with these header fields, from its source alone: FRESH, TOUCHED or STALE.

    Args:
        full: hash the source even if its size and time are unchanged.
    """
    states = [_file_source_state(metadata, prefix, part, full) for prefix, part in source.files.items()]
    return next((state for state in (STALE, TOUCHED) if state in states), FRESH)


def _file_source_state(metadata, prefix, source, full):
    size, mtime_ns, sha256 = (metadata.get(f"{prefix}_{name}") for name in ("size", "mtime_ns", "sha256"))
    captions = metadata.get("captions", "") if prefix == "source" else ""
    unchanged = (size, mtime_ns, captions) == (source.size, source.mtime_ns, source.captions)
    if unchanged and not full:
        return FRESH
    if sha256 != source.sha256():
        return STALE
    return FRESH if unchanged else TOUCHED


def _store_new_state(path, source, updates):
    try:
        tensors, header = read_sidecar(path)
    except SidecarError:
        return CORRUPT
    new = {"captions": source.captions, **updates}
    for prefix, part in source.files.items():
        if part.size is not None:
            new |= {f"{prefix}_size": part.size, f"{prefix}_mtime_ns": part.mtime_ns}
    metadata = {name: value for name, value in (header.metadata | new).items() if name != "captions" or value}
    with suppress(OSError):  # a read-only folder, for example: the next run hashes the source again
        write_sidecar(path, tensors, metadata)
    return FRESH


def is_of_others(path: str | Path) -> bool:
    """Whether a file that cannot be read as a sidecar shows no sign that it was one before it was damaged.

    Signs are the names of header fields, the beginning of a safetensors file, and zeros, as a power cut leaves.
    """
    with open_regular(path) as file:
        data = file.read(65536) or b""
    if b'"cachetrain_format"' in data or b'"header_sha256"' in data or not data.strip(b"\0"):
        return False
    # safetensors: the length of the header in 8 bytes, of which at least 4 are zeros; then the header, which is JSON.
    return b"\0" not in data[:8] or bool(data[4:8].strip(b"\0")) or data[8:9] not in (b"", b"{")
