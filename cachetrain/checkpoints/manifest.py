"""What a checkpoint consists of: the size and SHA-256 of each file, written last and checked before it is trusted."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "manifest.json"
_THREADS = 4  # hashing lets go of Python's lock


def write_manifest(directory, known=None):
    """Writes `<directory>/manifest.json` over all files there.

    Args:
        known: {path in the directory: entry} of files that need not be read again, from another manifest.

    Returns:
        what `read_manifest` will.
    """
    directory, known = Path(directory), known or {}
    names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    files = {name: known.get(name) or _entry(directory / name) for name in sorted(names) if name != NAME}
    (directory / NAME).write_bytes(_encoded(files))
    return files


def read_manifest(directory):
    """{path in the directory: {"size": bytes, "sha256": hex}} of a checkpoint.

    Raises:
        ValueError: it has none, or one that does not match its own hash.
        OSError: it cannot be read.
    """
    path = Path(directory) / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{directory}: has no {NAME}; it is not complete, or of an older version") from None
    try:
        files = json.loads(data)["files"]
        intact = data == _encoded(files)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{path}: is damaged: it does not match its own hash")
    return files


def damages(directory):
    """What is wrong with the files of a checkpoint, as {path in the directory: str}; empty for an intact one.

    Raises:
        ValueError, OSError: as read_manifest.
    """
    files = read_manifest(directory)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _damage(Path(directory) / name, files[name]), files)
        return {name: damage for name, damage in zip(files, found, strict=True) if damage}


def _damage(path, expected):
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"has {size} bytes, was written with {expected['size']}"
        return "" if _entry(path) == expected else "does not match its SHA-256"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _entry(path):
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _encoded(files):
    listed = json.dumps(files, indent=1)
    digest = hashlib.sha256(listed.encode()).hexdigest()
    return f'{{"sha256": "{digest}",\n"files": {listed}}}\n'.encode()
