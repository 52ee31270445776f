"""Decides which sidecars have to be made, from one stat of the source and one header read per sidecar."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cachetrain.data import variants
from cachetrain.data.captions import Pair
from cachetrain.data.sidecar import Header, SidecarError, read_header, read_sidecar, write_sidecar
from cachetrain.data.walk import MAX_IMAGE
from cachetrain.reading import open_regular, read_bytes

FRESH, MISSING, STALE, CORRUPT, FOREIGN = "fresh", "missing", "stale", "corrupt", "foreign"

# The source has a new time or settings but the same content, so the sidecar counts as fresh.
TOUCHED = "touched"

# A sidecar is stale when its header differs from the run in one of these.
COMPARED_FIELDS = ("kind", "encoder", "settings")


class Source(NamedTuple):
    """State of what a sidecar is made from; `sha256` is a function, because hashing is rarely needed.

    Attributes:
        captions: of a text sidecar: CaptionSettings.in_header.
    """

    size: str
    mtime_ns: str
    sha256: Callable[[], str]
    captions: str = ""

    def state(self) -> tuple[str, str, str]:
        """What need not be hashed: if it is unchanged, so is the source."""
        return self.size, self.mtime_ns, self.captions


def image_source(pair: Pair) -> Source:
    """Source of an image sidecar: the bytes of the image file."""
    stat = os.stat(pair.image)

    def sha256():
        return hashlib.sha256(read_bytes(pair.image, MAX_IMAGE)).hexdigest()

    return Source(str(stat.st_size), str(stat.st_mtime_ns), sha256)


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
    if state == TOUCHED:
        state = _store_new_state(path, source)
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
    recorded = metadata.get("source_size"), metadata.get("source_mtime_ns"), metadata.get("captions", "")
    unchanged = recorded == source.state()
    if unchanged and not full:
        return FRESH
    if metadata.get("source_sha256") != source.sha256():
        return STALE
    return FRESH if unchanged else TOUCHED


def _store_new_state(path, source):
    try:
        tensors, header = read_sidecar(path)
    except SidecarError:
        return CORRUPT
    state = {"source_size": source.size, "source_mtime_ns": source.mtime_ns, "captions": source.captions}
    metadata = {name: value for name, value in (header.metadata | state).items() if name != "captions" or value}
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
