"""Copies shard sets from object storage to a local directory, where training reads them."""

import hashlib
import os
import shutil
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from tqdm import tqdm

from cachetrain.atomic import is_abandoned, locked_directory, temporary_path
from cachetrain.data.objects import chunks_of, entries_in, open_store
from cachetrain.data.shard_set import folder_suffix, shard_number
from cachetrain.data.sidecar import NULL_STEM
from cachetrain.log import counted

_THREADS = 8


def near_directory(url: str, shard_cache: str | os.PathLike) -> Path:
    """The directory in `shard_cache` that holds the copy of the set at `url`."""
    name = url.rstrip("/").rpartition("/")[2]
    return Path(shard_cache) / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def fetch_set(url: str, shard_cache: str | os.PathLike, suffixes: Set[str]) -> None:
    """Copies the shards of a set that are not in its `near_directory` yet, and removes those no longer in the set.

    A shard appears there whole: its name has a hash of its content, so that one of this name and size is not copied
    again, and an interrupted copy is continued by the next call.

    Args:
        suffixes: of the sidecars whose shards are copied.

    Raises:
        ValueError: there are none.
        OSError: the set cannot be read, another process copies into the directory, or the disk has no room.
    """
    store, target = open_store(url), near_directory(url, shard_cache)
    sizes = {one["path"]: one["size"] for one in entries_in(store) if _is_part(one["path"], suffixes)}
    if not any(shard_number(name.rpartition("/")[2]) is not None for name in sizes):
        raise ValueError(
            f"{url}: no shards of {', '.join(sorted(suffixes))}; pack a folder with cache/pack_shards.py"
        )
    with locked_directory(target):
        missing = {name: size for name, size in sizes.items() if not _has(target / name, size)}
        _remove_others(target, sizes)
        needed, free = sum(missing.values()), shutil.disk_usage(target).free
        if needed > free:
            raise OSError(
                f"--shard_cache {shard_cache}: {counted(len(missing), 'file')} of {url} need "
                f"{tqdm.format_sizeof(needed, 'B')}, but {tqdm.format_sizeof(free, 'B')} are free; use another disk"
            )
        _copy_all(store, target, missing)


def _copy_all(store, target, missing):
    stopped, total = Event(), sum(missing.values())
    progress = tqdm(desc="shards", total=total, unit="B", unit_scale=True, disable=None if total else True)
    with progress, ThreadPoolExecutor(_THREADS) as pool:
        try:
            copies = [pool.submit(_copy, store, name, target / name, missing[name], stopped) for name in missing]
            for copy in copies:
                progress.update(copy.result())
        finally:
            stopped.set()  # after an error or a signal, the others end at their next piece


def _copy(store, name, path, size, stopped):
    """Copies one object; returns its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, copied = temporary_path(path), 0
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks_of(store, name):
                if stopped.is_set():
                    return 0
                copied += file.write(chunk)
        if copied != size:
            raise OSError(f"{store}: {name} has {counted(copied, 'byte')}, expected {size:,}; start again")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return size


def _is_part(name, suffixes):
    """Whether an object is a shard or the null caption of sidecars of these suffixes."""
    folder, _, base = name.rpartition("/")
    suffix = folder_suffix(folder)
    return suffix in suffixes and (shard_number(base) is not None or base == NULL_STEM + suffix)


def _has(path, size):
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _remove_others(target, names):
    """Removes the shards that are no longer in the set, and temporary files of killed processes."""
    for path in target.glob("*/*"):
        known = path.relative_to(target).as_posix() in names
        if (shard_number(path.name) is not None and not known) or is_abandoned(path):
            path.unlink()
