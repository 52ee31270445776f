"""Writes files and directories that appear under their names complete, or not at all."""

import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cachetrain.reading import open_regular, read_bytes

LOCK = ".lock"

# A name from `temporary_path`; machine and process id show whether its writer is still alive.
_TEMPORARY = re.compile(r"\.cachetrain~(?P<node>[^~]*)~(?P<pid>\d+)~[0-9a-f]{8}.*\.tmp")
_ABANDONED_AGE_S = 3600
# A file system without permissions, or that cannot sync a directory, answers with one of these; a full or broken disk
# does not.
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF, errno.EISDIR}


def temporary_path(path: str | Path) -> Path:
    """A hidden name beside `path` for a file that is not complete yet; short even if the name of `path` is long."""
    path = Path(path)
    owner = f"{os.uname().nodename}~{os.getpid()}" if hasattr(os, "uname") else f"~{os.getpid()}"
    return path.with_name(f".cachetrain~{owner}~{secrets.token_hex(4)}{path.suffix}.tmp")


def is_abandoned(path: str | Path) -> bool:
    """Whether `path` is a temporary file whose writer is gone: its process on this machine has ended, or nothing has
    been written for an hour."""
    match = _TEMPORARY.fullmatch(os.path.basename(path))
    if match is None:
        return False
    if hasattr(os, "uname") and match["node"] == os.uname().nodename:
        try:
            os.kill(int(match["pid"]), 0)  # signal 0 only checks whether the process exists
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # alive, of another user
    return time.time() - os.stat(path).st_mtime > _ABANDONED_AGE_S


def check_replaceable(path: str | Path) -> None:
    """Checks that `path` is new or a regular file; renaming onto a device such as /dev/full would remove it.

    Raises:
        OSError: it is something else.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # a new name; what else is wrong with it, writing tells
    if not stat.S_ISREG(mode):
        raise OSError(errno.EEXIST, "not a regular file, so not replaced; choose another name", str(path))


def atomic_write(path: str | Path, data: bytes, mode: int | None = None) -> None:
    """Writes bytes to `path`, which holds either its old or its new content at every moment.

    Args:
        mode: permissions of the file; None: those of any new file.

    Raises:
        OSError: it cannot be written, or `path` is not a regular file.
    """
    check_replaceable(path)
    temporary = temporary_path(path)
    try:
        if mode is not None:
            temporary.touch(0o600)  # before the content is there, which others may not be allowed to read
        temporary.write_bytes(data)
        if mode is not None:
            with _if_supported():
                os.chmod(temporary, stat.S_IMODE(mode))
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # name `path`: a failed write names no file, a failed open the temporary one
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def staged_file(path: str | Path) -> Iterator[Path]:
    """Yields a path for a new file, which replaces `path` once the block ends and the file is on disk.

    The new file has a directory to itself, because safetensors 0.8 writes to a temporary file beside it, which would
    remain if the process were killed.
    """
    path = Path(path)
    check_replaceable(path)
    with _stage(path) as stage:
        yield stage / path.name
        _sync_tree(stage)
        os.replace(stage / path.name, path)
        _sync(path.parent)
    shutil.rmtree(stage)


@contextmanager
def staged_directory(out: str | Path, overwrite: bool = False, holds: str | None = None) -> Iterator[Path]:
    """Yields a temporary directory beside `out`, which becomes `out` once the block ends; an exception removes it.

    Args:
        holds: only a directory that has this file, or is empty, is replaced; None: any.

    Raises:
        ValueError: `out` exists and may not be replaced.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists; choose another --out, or pass --overwrite")
    if out.exists() and (out.is_symlink() or not out.is_dir()):
        raise ValueError(f"{out}: is not a directory, and is not replaced; choose another --out")
    if holds and out.is_dir() and any(out.iterdir()) and not (out / holds).is_file():
        raise ValueError(f"{out}: has no {holds}, so it is not replaced; choose another --out")
    with _stage(out) as stage:
        yield stage
        _sync_tree(stage)
        removed = _set_aside(out) if os.path.lexists(out) else None
        try:
            os.rename(stage, out)
        except BaseException:
            if removed:
                os.rename(removed, out)
            raise
        _sync(out.parent)
    if removed:
        _remove(removed)


def remove_directory(directory: Path) -> None:
    """Removes a directory tree, whose name is gone at once, before its files are; of a link only the link."""
    if directory.is_symlink():
        return directory.unlink()
    removed = _set_aside(directory)
    _sync(directory.parent)  # or a crash could bring the name back without all of its files
    _remove(removed)


@contextmanager
def locked_directory(directory: str | Path) -> Iterator[None]:
    """Makes a directory, and locks a file in it until the block or the process ends, to keep other processes out.

    Raises:
        ValueError: another process holds it.
        OSError: the directory cannot be made, or its lock is no regular file.
    """
    import fcntl  # missing on Windows, where training is not supported

    Path(directory).mkdir(parents=True, exist_ok=True)
    with open_regular(Path(directory) / LOCK, "ab") as file:
        try:
            # Not flock: loader workers would inherit the lock, and hold it for seconds after this process is killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{directory}: another process is writing there; wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks
        yield


def claim(marker: str | Path, owner: str | Path, what: str) -> None:
    """Makes `owner`, a run's directory, the only run of its name that writes to what the file `marker` stands for.

    A run that is gone, or has never begun, loses its claim.

    Args:
        marker: file that holds the path of the owner; its directory is made.
        what: names the shared place in the error message.

    Raises:
        ValueError: another run has claimed it.
    """
    marker, owner = Path(marker), os.path.realpath(owner)
    with suppress(FileNotFoundError):
        other = os.path.realpath(marker.parent / os.fsdecode(read_bytes(marker)))
        same_name = os.path.basename(other) == os.path.basename(owner)  # or the marker is a copy, with what it marks
        if other != owner and same_name and ((Path(other) / "args.json").exists() or is_locked(other)):
            raise ValueError(
                f"{what}: has files of another run of this name, {other}; choose another name for --output_dir, or "
                "another place"
            )
    marker.parent.mkdir(parents=True, exist_ok=True)
    # Relative, so that a copy of a tree with runs and logs is one of its own.
    atomic_write(marker, os.fsencode(os.path.relpath(owner, os.path.realpath(marker.parent))))


def is_locked(directory: str | Path) -> bool:
    """Whether another process has locked a directory by `locked_directory`; never takes the lock itself.

    Always False on a file system without locks.
    """
    try:
        file = open_regular(Path(directory) / LOCK)
    except OSError:
        return False
    with file:
        try:
            os.lockf(file.fileno(), os.F_TEST, 0)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:
            pass
    return False


def remove_leftovers(directory: str | Path, name: str) -> None:
    """Removes from `directory` what a killed process has left of the above. `name`: pattern of the final names."""
    for pattern in (f".{name}.stage", f".{name}.removed"):
        for path in Path(directory).glob(pattern):
            _remove(path)


@contextmanager
def _stage(out):
    """Makes a temporary directory beside `out`; an exception removes it."""
    stage = out.with_name(f".{out.name}.stage")
    _remove(stage)
    stage.mkdir(parents=True)
    try:
        yield stage
    except BaseException:
        with suppress(OSError):
            _remove(stage)
        raise


def _set_aside(directory):
    """Renames a directory that is to be removed; returns its new path."""
    removed = directory.with_name(f".{directory.name}.removed")
    _remove(removed)
    os.rename(directory, removed)
    return removed


def _remove(path):
    """Removes a file, a link (not what it points to) or a directory tree, if it is there."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _sync_tree(directory):
    """Forces a directory tree to disk, so that after a crash the final name never stands for incomplete files.

    Also lets everyone who may read the directory read its files: safetensors makes them readable by their owner only.
    """
    mode = os.stat(directory).st_mode & 0o666
    for folder, _, names in os.walk(directory, onerror=_fail):
        for name in names:
            with _if_supported():
                os.chmod(os.path.join(folder, name), mode)
            _sync(os.path.join(folder, name))
        _sync(folder)


def _fail(error):
    raise error


def _sync(path):
    with _if_supported():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _if_supported():
    """Passes over what a file system does not support, with which no file is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
