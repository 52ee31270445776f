"""Lines on stdout, lines on stderr that do not break a progress bar, and how a failure of one file is worded."""

import os
import sys

from tqdm import tqdm

from cachetrain.log import printable


def print_line(message: str) -> None:
    """Prints a line on stderr, above the progress bar if there is one."""
    tqdm.write(printable(message), file=sys.stderr)


def say(*lines: object) -> None:
    """Prints lines on stdout, whatever characters the names in them have."""
    for line in lines:
        print(printable(line))


def how_to_mend(error: ValueError) -> str:
    """What is wrong with a shard of a set that is being made, and what to do."""
    problem, _, _ = str(error).rpartition("; ")
    return f"{problem or error}; delete it, and run again"


def failure_line(path: str | os.PathLike, reason: str | Exception) -> str:
    """Returns `path: reason`, or the reason alone if it starts with the path, or with that of the file's caption or
    sidecar."""
    reason = getattr(reason, "strerror", None) or str(reason)
    return reason if reason.startswith(os.path.splitext(path)[0]) else f"{path}: {reason}"
