"""--shard_cache: the shards of sets in object storage, near: copied to a local directory while training reads them.

    DIR/set-5be2c0d1/img_sdxl-1f0c2a9e/00012-5be2c0d1.tar          a shard
    DIR/set-5be2c0d1/img_sdxl-1f0c2a9e/00012-5be2c0d1.tar.index    its first bytes, up to the end of its index
    DIR/set-5be2c0d1/wanted/img_sdxl-1f0c2a9e~00012-5be2c0d1.tar   somebody waits for it

One process on each machine, the fetcher (data/fetcher.py), copies what comes up next, and removes what is not needed
when there is no more room. Loader workers do not use the network: they read what is there, ask for what is not, and
wait. All that they share is this directory, so that a fetcher that is killed can be started again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from cachetrain.data.shards import Shard
from cachetrain.log import warn
from cachetrain.reading import read_text

INDEX = ".index"
WANTED, FAILED = "wanted", "failed"
POLL_S = 0.02


def near_directory(url: str, shard_cache: str | os.PathLike) -> Path:
    """The directory in `shard_cache` for the set at `url`."""
    name = url.rstrip("/").rpartition("/")[2]
    return Path(shard_cache) / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def request_name(name: str) -> str:
    """The name of the file that asks for a shard, or for its index."""
    return name.replace("/", "~")


class Near:
    """The near directory of a set, as processes see it that do not fetch: the trainer that makes it, and its workers.

    Args:
        url: address of the set.

    Attributes:
        waited_s: seconds that this process has waited for shards.
    """

    def __init__(self, directory: str | os.PathLike, url: str):
        self.directory = os.fspath(directory)
        self.url = url
        self.waited_s = 0.0
        self._trainer = os.getpid()

    def where(self, name: str) -> str:
        """The address of a shard."""
        return f"{self.url.rstrip('/')}/{name}"

    def index_of(self, name: str) -> str:
        """The path of the index of a shard, once it is there; raises like `open`."""
        self._wait(name + INDEX)
        return os.path.join(self.directory, name + INDEX)

    def open(self, shard: Shard, name: str) -> None:
        """Opens a shard, once it is there.

        Raises:
            OSError: it cannot be fetched.
        """
        while True:
            self._wait(name)
            with suppress(FileNotFoundError):  # removed again in between
                return shard.open()

    def remove(self, name: str) -> None:
        """Removes a shard and its index, which are fetched again when they are asked for."""
        for path in (name, name + INDEX):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(self.directory, path))

    def _wait(self, name):
        path = os.path.join(self.directory, name)
        if os.path.exists(path):
            return
        started = time.monotonic()
        request, failure = (os.path.join(self.directory, of, request_name(name)) for of in (WANTED, FAILED))
        with suppress(FileNotFoundError):
            os.unlink(failure)
        _touch(request)
        while not os.path.exists(path):
            if not os.path.exists(request):
                if os.path.exists(failure):
                    raise OSError(read_text(failure))
                _touch(request)  # it was there, and has been removed again
            if self._trainer not in (os.getpid(), os.getppid()):
                raise OSError(f"{path}: the trainer has ended")
            time.sleep(POLL_S)
        self.waited_s += time.monotonic() - started


class Fetcher:
    """The process that fetches, seen from the trainer. It is started again if it is killed.

    Args:
        sets: {near directory: address of the set}.
        limit: bytes that shards may take in these directories; None: what the disk has.

    Raises:
        ValueError: it cannot start; it has said why.
    """

    def __init__(self, sets: dict[str, str], limit: int | None = None):
        self._argv = [sys.executable, "-P", "-m", "cachetrain.data.fetcher", json.dumps(sets), str(limit or 0)]
        self._plan = "[]\n"
        self._closed = False
        self._lock = threading.Lock()
        self._kept = []
        self._start()
        if self._process.stdout.readline() != "ready\n":
            self.close()
            raise ValueError("the shards cannot be fetched; see above")
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def keep(self, shards: Iterable[tuple[str, str]]) -> None:
        """Names (near directory, shard) of shards that are needed all the time."""
        self._kept = list(shards)

    def plan(self, shards: Sequence[tuple[str, str]]) -> None:
        """Says which shards (near directory, name) are read from now on, in this order; others may be removed."""
        self._plan = json.dumps([*self._kept, *shards]) + "\n"
        self._send()

    def close(self) -> None:
        """Ends the process; what it has fetched stays."""
        self._closed = True
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _start(self):
        self._process = subprocess.Popen(self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _send(self):
        with self._lock, suppress(OSError, ValueError):  # it has ended, and gets the plan when it starts again
            self._process.stdin.write(self._plan)
            self._process.stdin.flush()

    def _watch(self):
        while True:
            self._process.wait()
            if self._closed:
                return
            warn(f"the process that fetches shards has ended ({self._process.returncode}); restarting it")
            time.sleep(1)
            with self._lock:
                self._process.stdout.close()
                self._start()
            self._send()


def _touch(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab"):
        pass
