"""manifest.json: the size and SHA-256 of each file of a checkpoint, with which damage is found."""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from cachetrain.log import counted
from cachetrain.reading import open_regular, read_bytes

NAME = "manifest.json"
_THREADS = 4  # hashing releases the GIL


def write_manifest(directory: Path, known: dict[str, dict] | None = None) -> dict[str, dict]:
    """Writes `<directory>/manifest.json`, with an entry for each file in the directory.

    Args:
        directory: the checkpoint.
        known: {path in the directory: entry} of files that need not be hashed again.

    Returns:
        the entries, as `read_manifest` returns them.
    """
    directory = Path(directory)
    known = known or {}
    names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    files = {name: known.get(name) or _entry(directory / name) for name in sorted(names) if name != NAME}
    (directory / NAME).write_bytes(_encoded(files))
    return files


def read_manifest(directory: Path) -> dict[str, dict]:
    """Reads the manifest of a checkpoint.

    Returns:
        {path in the directory: {"size": bytes, "sha256": hex}}.

    Raises:
        ValueError: there is no manifest, it does not match its own hash, or an entry is not one of a checkpoint's.
        OSError: the manifest cannot be read.
    """
    path = Path(directory) / NAME
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise ValueError(
            f"{directory}: has no {NAME}; the checkpoint is incomplete, or from an older version"
        ) from None
    try:
        files = json.loads(data)["files"]
        intact = data == _encoded(files)
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ValueError(f"{path}: is damaged: its content does not match its hash")
    if not isinstance(files, dict):
        raise ValueError(f"{path}: its list of files is not one of a checkpoint")
    for name, entry in files.items():
        if not _is_inside(name) or not _is_entry(entry):
            raise ValueError(f"{path}: {name!r}: {entry!r:.200} is not an entry of a checkpoint; do not use it")
    return files


def damages(directory: Path) -> dict[str, str]:
    """Compares the files of a checkpoint with its manifest.

    Returns:
        {path in the directory: description of the damage}; {} for an intact checkpoint.

    Raises:
        ValueError, OSError: of read_manifest.
    """
    files = read_manifest(directory)
    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(lambda name: _damage(Path(directory), name, files[name]), files)
        return {name: damage for name, damage in zip(files, results, strict=True) if damage}


def _is_inside(name):
    """Whether a name is a plain relative path: a manifest may be anybody's, and files are opened by its names."""
    return name == PurePosixPath(name).as_posix() and not re.search(r"(^/|^\.$|^\.\.(/|$)|/\.\.(/|$)|\\|\0)", name)


def _is_entry(entry):
    return (
        isinstance(entry, dict)
        and entry.keys() == {"size", "sha256"}
        and type(entry["size"]) is int
        and re.fullmatch("[0-9a-f]{64}", str(entry["sha256"])) is not None
    )


def _damage(directory, name, expected):
    path = directory / name
    try:
        if not path.resolve().is_relative_to(directory.resolve()):
            return "is a link out of the checkpoint"
        size = path.stat().st_size
        if size != expected["size"]:
            return f"has {counted(size, 'byte')}, expected {expected['size']}"
        return "" if _entry(path) == expected else "does not match its SHA-256"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _entry(path):
    with open_regular(path) as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _encoded(files):
    listed = json.dumps(files, indent=1)
    digest = hashlib.sha256(listed.encode()).hexdigest()
    return f'{{"sha256": "{digest}",\n"files": {listed}}}\n'.encode()
