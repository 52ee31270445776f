"""Reads what users' folders hold: regular files only, none larger than its kind can be, text in UTF-8.

A pipe, socket or device could keep a reader for ever, and a file of gigabytes takes all memory.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EFBIG, EINVAL
from io import BufferedReader, FileIO

# Bytes of a text file that a person or a program may have written: captions, configs, prompts, settings.
MAX_TEXT = 32 * 2**20

_FLAGS = {"rb": os.O_RDONLY, "ab": os.O_WRONLY | os.O_CREAT | os.O_APPEND}


def open_regular(path: str | os.PathLike, mode: str = "rb") -> FileIO:
    """Opens a file in bytes, unbuffered, "rb" to read or "ab" to append.

    Raises:
        OSError: it cannot be opened, or is a pipe, socket or device.
    """
    # Without O_NONBLOCK, opening a pipe waits for its other end. Regular files do not care.
    file = open(path, mode, buffering=0, opener=lambda name, _: os.open(name, _FLAGS[mode] | os.O_NONBLOCK, 0o666))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(EINVAL, "is not a regular file", os.fspath(path))
    return file


def check_regular(path: str | os.PathLike) -> None:
    """Checks that a file which a library is going to open is a regular one.

    Raises:
        OSError: it does not exist, or is a pipe, socket or device.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(EINVAL, "is not a regular file", os.fspath(path))


def read_with_stat(path: str | os.PathLike, most: int = MAX_TEXT) -> tuple[bytes, os.stat_result]:
    """Reads a file once, so that the result of os.stat describes exactly the bytes that were read.

    Raises:
        OSError: it cannot be read, is not a regular file, has more than `most` bytes, or more than its size says, as
            the files in /proc, which can be endless.
    """
    with open_regular(path) as file, named_errors(path):
        state = os.fstat(file.fileno())
        if state.st_size > most:
            raise OSError(EFBIG, f"has {state.st_size:,} bytes, expected at most {most:,}")
        if not state.st_size and file.read(1) != b"":
            raise OSError(EINVAL, "is not a regular file: it has no size, but content")
        return BufferedReader(file).read(state.st_size) or b"", state


@contextmanager
def named_errors(path: str | os.PathLike) -> Iterator[None]:
    """Adds the path to an OSError without one: unlike `open`, reading names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise


def read_bytes(path: str | os.PathLike, most: int = MAX_TEXT) -> bytes:
    """Reads a file; raises like `read_with_stat`."""
    return read_with_stat(path, most)[0]


def decoded(path: str | os.PathLike, data: bytes) -> str:
    """The text of a file of these bytes: UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is something else.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: not UTF-8 text (line {line}); save it as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{path}: not UTF-8 text (it has NUL characters, as UTF-16); save it as UTF-8")
    return text


def read_text(path: str | os.PathLike) -> str:
    """Reads a text file; raises like `read_bytes` and `decoded`."""
    return decoded(path, read_bytes(path))


def read_json(path: str | os.PathLike) -> dict:
    """Reads a file that holds one JSON object.

    Raises:
        OSError: of `read_bytes`.
        ValueError: it is no JSON object.
    """
    return json_object(path, read_text(path))


def json_object(where: str | os.PathLike, text: str) -> dict:
    """Parses one JSON object; `where` names it in the error message.

    Raises:
        ValueError: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and lists in lists in lists
        raise ValueError(f"{where}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {value!r:.40}")
    return value


def json_lines(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """Yields (line number, object) of a file of JSON lines; an incomplete last line is left out.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is no JSON object.
    """
    with open_regular(path) as file, BufferedReader(file) as lines:
        number = 0
        while (line := lines.readline(MAX_TEXT)).endswith(b"\n"):
            number += 1
            where = f"{path}, line {number}"
            try:
                yield number, json_object(where, line.decode())
            except UnicodeDecodeError:
                raise ValueError(f"{where}: not UTF-8 text; remove the line") from None
