"""Warnings: said on stderr at once, and kept with their steps in a run's `warnings.jsonl`. Imports no torch."""

import json
import os
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from errno import ENOSPC

_record = None  # of the run that goes on in this process, if any


def warn(message):
    """Says what does not end the run, and keeps it where one is recorded; from any thread."""
    if os.environ.get("RANK", "0") == "0":  # the ranks of a run all come to say the same
        print(f"warning: {message}", file=sys.stderr)
        if _record is not None:
            _record.add(message)


@contextmanager
def recorded():
    """Yields the Record that gets all warnings meanwhile, and the exception that ends the run."""
    global _record
    record = _record = Record()
    try:
        yield record
    except BaseException as error:
        said = isinstance(error, ValueError | OSError)  # others say little without their name
        record.add(f"the run ended: {error if said else traceback.format_exception_only(error)[-1].strip()}")
        raise
    finally:
        _record = None


class Record:
    """Appends lines {"step", "time", "message"} to a file, from any thread. A disk that refuses them is no error.

    Attributes:
        step: of the lines to come.
    """

    def __init__(self):
        self.step, self._path, self._early, self._lock = 0, None, [], threading.Lock()

    def start(self, path, step):
        """Opens the file once the run is sure to start; what has been said before is said at its first step."""
        with self._lock:
            self._path, self.step = path, step
            for line in self._early:
                self._write(line)

    def add(self, message):
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "message": message}
        with self._lock:
            if self._path is None:
                self._early.append(line)
            else:
                self._write(line)

    def _write(self, line):
        with suppress(OSError), open(self._path, "ab", buffering=0) as file:
            append_whole(file, json.dumps({"step": self.step, **line}).encode() + b"\n")


def append_whole(file, line):
    """Appends `line` to an unbuffered file, or nothing.

    Raises:
        OSError: there is no room for all of it.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) < len(line):
            raise OSError(ENOSPC, os.strerror(ENOSPC))
    except OSError:
        file.truncate(end)
        raise
