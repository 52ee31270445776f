"""Files and directories that appear under their name whole and on disk, or not at all."""

import os
import re
import secrets
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"

# What `temporary_path` gives: the machine and the process say whether anybody is still writing it.
_TEMPORARY = re.compile(r"\.cachetrain~(?P<node>[^~]*)~(?P<pid>\d+)~[0-9a-f]{8}.*\.tmp")
_ABANDONED_AGE_S = 3600


def temporary_path(path):
    """A hidden name beside `path` for a file that is not complete yet; short, however long the target's is."""
    path = Path(path)
    owner = f"{os.uname().nodename}~{os.getpid()}" if hasattr(os, "uname") else f"~{os.getpid()}"
    return path.with_name(f".cachetrain~{owner}~{secrets.token_hex(4)}{path.suffix}.tmp")


def is_abandoned(path):
    """Whether `path` is a temporary file whose writer is gone: dead on this machine, or silent for an hour."""
    match = _TEMPORARY.fullmatch(os.path.basename(path))
    if match is None:
        return False
    if hasattr(os, "uname") and match["node"] == os.uname().nodename:
        try:
            os.kill(int(match["pid"]), 0)  # signal 0 only asks whether the process exists
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # another user's, alive
    return time.time() - os.stat(path).st_mtime > _ABANDONED_AGE_S


def atomic_write(path, data):
    """Writes bytes under `path`, which holds either its old or its new content at every moment."""
    temporary = temporary_path(path)
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # writing does not say where it failed, opening names the temporary file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def staged_file(path):
    """Yields a name in a directory beside `path` for a file that takes its place once it is complete and on disk.

    It has a directory to itself because safetensors 0.8 writes to a temporary file of its own beside it, which would
    stay behind where the process is killed.
    """
    path = Path(path)
    with _stage(path) as stage:
        yield stage / path.name
        _sync_tree(stage)
        os.replace(stage / path.name, path)
        _sync(path.parent)
    shutil.rmtree(stage)


@contextmanager
def staged_directory(out, overwrite=False):
    """Yields a temporary directory beside `out` that takes its name once complete and vanishes on failure.

    Raises:
        ValueError: `out` exists and may not be replaced.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists; choose another --out, or pass --overwrite")
    with _stage(out) as stage:
        yield stage
        _sync_tree(stage)
        removed = _set_aside(out) if out.exists() else None
        try:
            os.rename(stage, out)
        except BaseException:
            if removed:
                os.rename(removed, out)
            raise
        _sync(out.parent)
    if removed:
        shutil.rmtree(removed)


def remove_directory(directory):
    """Removes a directory tree, which is gone from under its name at once."""
    removed = _set_aside(directory)
    _sync(directory.parent)  # or a crash could bring the name back without all that is removed now
    shutil.rmtree(removed)


@contextmanager
def locked_directory(directory):
    """Makes a directory, and keeps it for this process alone: a file in it is locked until the process ends.

    Raises:
        ValueError: another process holds it.
    """
    import fcntl  # not on Windows, where nothing trains

    Path(directory).mkdir(parents=True, exist_ok=True)
    with open(Path(directory) / LOCK, "a") as file:
        try:
            # Not flock: the loader's workers would hold that lock too, for seconds after this process was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{directory}: another process is writing there; wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks
        yield


def is_locked(directory):
    """Whether another process holds a directory by `locked_directory`: a look that takes no lock, not for an instant.

    On a file system without locks nobody is seen to.
    """
    try:
        file = open(Path(directory) / LOCK, "rb")
    except FileNotFoundError:
        return False
    with file:
        try:
            os.lockf(file.fileno(), os.F_TEST, 0)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:
            pass
    return False


def remove_leftovers(directory, name="*"):
    """Removes what a killed process has left of the above in `directory`. `name`: pattern of what was to be made."""
    for pattern in (f".{name}.stage", f".{name}.removed"):
        for path in Path(directory).glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _stage(out):
    """Makes a new directory beside `out`, which an exception removes."""
    stage = out.with_name(f".{out.name}.stage")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _set_aside(directory):
    """Renames what is to be removed; returns its new path."""
    removed = directory.with_name(f".{directory.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    os.rename(directory, removed)
    return removed


def _sync_tree(directory):
    """Forces a directory tree to disk, so that the rename never promises more than a crash would leave.

    Whoever may read the directory may read its files: safetensors makes them for their owner alone.
    """
    mode = os.stat(directory).st_mode & 0o666
    for folder, _, names in os.walk(directory, onerror=_fail):
        for name in names:
            os.chmod(os.path.join(folder, name), mode)
            _sync(os.path.join(folder, name))
        _sync(folder)


def _fail(error):
    raise error


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
