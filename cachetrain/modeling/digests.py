"""SHA-256 of large files, remembered from run to run. Imports no torch."""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from cachetrain.atomic import atomic_write
from cachetrain.reading import open_regular, read_json

LEAST_BYTES = 2**20  # smaller files are hashed at once
_RACY_NS = 2 * 10**9  # a file this young may change again within the clock's resolution


def sha256_of(path: str | Path) -> bytes:
    """The SHA-256 of a file; of a large one that is what it was at its last hashing, it is read from a list.

    A file is taken for the same if its path, size and both times are: of its content, and of its inode, which nothing
    can set back. The list is ~/.cache/cachetrain/sha256.json ($XDG_CACHE_HOME); without it files are hashed again.
    """
    path, stat = os.path.realpath(path), os.stat(path)
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    if stat.st_size < LEAST_BYTES:
        return _hash(path)
    known = _read_list()
    entry = known.get(path)
    if isinstance(entry, list) and entry[:3] == state and len(entry) == 4:
        with suppress(TypeError, ValueError):
            return bytes.fromhex(entry[3])
    digest = _hash(path)
    if time.time_ns() - max(state[1:]) > _RACY_NS:
        known = {name: entry for name, entry in _read_list().items() if os.path.exists(name)}
        with suppress(OSError):  # a read-only home directory, for example
            _list_path().parent.mkdir(parents=True, exist_ok=True)
            atomic_write(_list_path(), json.dumps(known | {path: [*state, digest.hex()]}, indent=0).encode())
    return digest


def _hash(path):
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").digest()


def _list_path():
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "cachetrain" / "sha256.json"


def _read_list():
    try:
        return read_json(_list_path())
    except (OSError, ValueError):
        return {}
