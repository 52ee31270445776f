"""Decides which sidecars have to be made: the states of DESIGN, from one stat and one header read per file."""

import hashlib
import os
from collections.abc import Callable
from typing import NamedTuple

from cachetrain.data.scan import read_caption
from cachetrain.data.sidecar import Header, SidecarError, read_header, read_sidecar, write_sidecar

FRESH, MISSING, STALE, CORRUPT, FOREIGN = "fresh", "missing", "stale", "corrupt", "foreign"

# Fresh, but its source has a new time.
TOUCHED = "touched"

# A sidecar is stale when its header differs from the run in one of these.
COMPARED = ("kind", "encoder", "settings")


class Source(NamedTuple):
    """State of what a sidecar is made from; `sha256` is a function, as hashing is rarely needed."""

    size: str
    mtime_ns: str
    sha256: Callable[[], str]


def image_source(pair):
    """Source of an image sidecar: the file's bytes."""
    stat = os.stat(pair.image)

    def sha256():
        with open(pair.image, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return Source(str(stat.st_size), str(stat.st_mtime_ns), sha256)


def caption_source(pair):
    """Source of a text sidecar: the caption as encoded, from its file or the image's name."""
    if pair.caption_file is None:
        caption = read_caption(pair)
        return Source(caption.size, caption.mtime_ns, lambda: caption.sha256)
    stat = os.stat(pair.caption_file)
    return Source(str(stat.st_size), str(stat.st_mtime_ns), lambda: read_caption(pair).sha256)


def sidecar_state(path, source, wanted, full=False):
    """Decides from one header read; `source` was one stat.

    A source that was only touched (new time, same SHA-256) leaves its sidecar fresh; the header is then brought up
    to date, so that the next run need not hash again.

    Args:
        path: of the sidecar.
        source: Source.
        wanted: header fields of this run.
        full: hash the source and the whole sidecar, whatever size, time and header say.

    Returns:
        (FRESH, MISSING, STALE, CORRUPT or FOREIGN; header fields, {} where there are none).

    Raises:
        OSError: source or sidecar exists but cannot be read.
        ValueError: the caption is not text.
    """
    state, header = file_state(path, full)
    if state is None and any(header.metadata.get(key) != wanted[key] for key in COMPARED):
        state = STALE
    if state is None:
        state = source_state(header.metadata, source, full)
    if state == TOUCHED:
        state = _refresh(path, source)
    return state, header.metadata


def file_state(path, full=False):
    """What the file alone tells: (MISSING, CORRUPT, FOREIGN, or None: encoder and source decide; its Header).

    Args:
        full: compare its tensors with their hash, too.
    """
    try:
        header = read_sidecar(path)[1] if full else read_header(path)
    except FileNotFoundError:
        return MISSING, Header({}, {}, {})
    except SidecarError:
        return CORRUPT, Header({}, {}, {})
    return (FOREIGN if header.foreign else None), header


def source_state(metadata, source, full=False):
    """What the source tells of a sidecar with these header fields: FRESH, TOUCHED or STALE.

    Args:
        full: hash the source though its size and time are unchanged.
    """
    unchanged = (metadata.get("source_size"), metadata.get("source_mtime_ns")) == (source.size, source.mtime_ns)
    if unchanged and not full:
        return FRESH
    if metadata.get("source_sha256") != source.sha256():
        return STALE
    return FRESH if unchanged else TOUCHED


def _refresh(path, source):
    try:
        tensors, header = read_sidecar(path)
    except SidecarError:
        return CORRUPT
    write_sidecar(path, tensors, {**header.metadata, "source_size": source.size, "source_mtime_ns": source.mtime_ns})
    return FRESH
