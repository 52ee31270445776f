"""Messages to the user: info() on stdout; warn() on stderr and in the run's warnings.jsonl. Imports no torch."""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOSPC
from pathlib import Path
from typing import BinaryIO

from cachetrain.reading import open_regular

# Control characters, line separators, what changes the direction of text, and bytes that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_warning_log = None  # the WarningLog of the run in this process, if any


def info(message: str) -> None:
    """Prints a message, of one line or more, on stdout at once; on rank 0 only."""
    if _is_rank_0():
        _print("\n".join(map(printable, message.split("\n"))), sys.stdout)


def warn(message: str) -> None:
    """Prints a warning of one line on stderr and adds it to the run's WarningLog, on rank 0 only; from any thread."""
    if _is_rank_0():  # all ranks of a run reach the same warnings
        message = printable(message)
        _print(f"warning: {message}", sys.stderr)
        if _warning_log is not None:
            _warning_log.add(message)


def printable(text: object) -> str:
    """The text in one line that changes nothing else on a terminal: what would is written as in a Python string.

    For names of files, which may hold any character, and for messages that contain such names.
    """
    return _UNPRINTABLE.sub(_escaped, str(text))


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`, `1,234 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def list_entry(name: str) -> bytes:
    """The bytes of a file name for a list with a line for each, like `printable`; those that are no text remain."""
    return b"".join(
        os.fsencode(part) if "\udc80" <= part <= "\udcff" else printable(part).encode()
        for part in re.split("([\udc80-\udcff])", name)
    )


def _escaped(match):
    return match[0].encode("unicode_escape").decode()


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its name, if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def describe(error: BaseException) -> str:
    """An exception in one line; with its name, unless it is one whose message says it all."""
    is_plain = isinstance(error, ValueError | OSError) and str(error)
    return " ".join(str(error).split("\n")) if is_plain else f"{type(error).__name__}: {first_line(error)}"


def _print(message, file):
    """Prints what can be printed: a full disk, a closed terminal or a file name that is not text never ends a run."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    with suppress(OSError, ValueError):  # ValueError: the file is closed
        print(message.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def _is_rank_0():
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def record_warnings() -> Iterator["WarningLog"]:
    """Yields a WarningLog that records every warning, and the exception that ends the block, if any."""
    global _warning_log
    log = _warning_log = WarningLog()
    try:
        yield log
    except BaseException as error:
        log.add(f"the run ended: {describe(error)}")
        raise
    finally:
        _warning_log = None


class WarningLog:
    """Appends lines {"step", "time", "message"} to a file, from any thread. Lines that cannot be written are lost.

    Attributes:
        step: step number of the next lines.
    """

    def __init__(self):
        self.step = 0
        self._path = None
        self._pending = []  # lines added before `start`
        self._lock = threading.Lock()

    def start(self, path: Path, step: int) -> None:
        """Starts writing to `path`; lines added before are written first, with the step number `step`.

        Until then no file is created: a run that is refused leaves none.
        """
        with self._lock:
            self._path = path
            self.step = step
            for line in self._pending:
                self._write(line)

    def add(self, message: str) -> None:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "message": message}
        with self._lock:
            if self._path is None:
                self._pending.append(line)
            else:
                self._write(line)

    def _write(self, line):
        with suppress(OSError), open_regular(self._path, "ab") as file:
            append_line(file, json.dumps({"step": self.step, **line}).encode() + b"\n")


def append_line(file: BinaryIO, line: bytes) -> None:
    """Appends a line to an unbuffered file, either all of it or nothing.

    Raises:
        OSError: the disk has no room for the whole line.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) < len(line):
            raise OSError(ENOSPC, os.strerror(ENOSPC))
    except OSError:
        file.truncate(end)
        raise
