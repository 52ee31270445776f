"""The process that brings shards near, see data/near.py: the only one of a training run that uses the network.

    python -m cachetrain.data.fetcher '{"DIR/set-5be2c0d1": "s3://bucket/set"}' LIMIT

LIMIT: bytes that shards may take, 0: what the disk has. It reads plans from its standard input, each a line with the
list of the shards that are needed from now on, in order, and ends when that is closed.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from cachetrain import cli
from cachetrain.atomic import atomic_write, is_abandoned, locked_directory, temporary_path
from cachetrain.data.near import FAILED, INDEX, POLL_S, WANTED, request_name
from cachetrain.data.objects import NotThereError, open_store, pieces_of, read_range
from cachetrain.data.shard_set import shard_number
from cachetrain.data.shards import INDEX_START, index_size
from cachetrain.log import counted, warn
from cachetrain.reading import open_regular

THREADS = 8
RESERVE = 2**28  # bytes of a disk that stay free
RETRY_S = 2.0
_WARN_EVERY_S = 60


class NoRoomError(OSError):
    """There is no room for a shard that is not needed yet."""


class Shelf:
    """The near directories: which shards lie there, which are needed, and which go when there is no more room.

    Args:
        sets: {near directory: address of the set}.
        limit: bytes that shards may take; None: what the disk has.
    """

    def __init__(self, sets: dict[str, str], limit: int | None):
        self.stores = {directory: open_store(url) for directory, url in sets.items()}
        self.limit = limit
        self.needed = {}  # (directory, name) -> place in the plan
        self.last_needed = {}  # (directory, name) -> number of the last plan that had it
        self.plans = 0
        self.sizes = {}  # (directory, name) -> bytes, of what is there or on its way
        self._lock = threading.Lock()
        for directory in sets:
            for path in Path(directory).glob("*/*"):
                name = path.relative_to(directory).as_posix()
                if shard_number(path.name) is not None:
                    self.sizes[directory, name] = path.stat().st_size
                elif is_abandoned(path):
                    path.unlink()

    def plan(self, shards: list) -> None:
        """Takes a new plan: pairs of directory and name, in the order in which they are needed."""
        self.plans += 1
        self.needed = {tuple(shard): place for place, shard in enumerate(shards)}
        self.last_needed.update(dict.fromkeys(self.needed, self.plans))

    def reserve(self, shard: tuple[str, str], size: int, wanted: bool) -> None:
        """Makes room for a shard, by removing others.

        Args:
            wanted: somebody waits for it: if need be, shards go that come up later.

        Raises:
            NoRoomError: there is none.
        """
        with self._lock:
            while not self._has_room(shard[0], size):
                others = [other for other in self.sizes if other not in self.needed and _is_there(other)]
                if others:
                    self._remove(min(others, key=lambda other: self.last_needed.get(other, 0)))
                    continue
                later = [other for other in self.sizes if _is_there(other)] if wanted else []
                if not later:
                    free = tqdm.format_sizeof(shutil.disk_usage(shard[0]).free, "B")
                    raise NoRoomError(
                        f"{shard[0]}: no room for {shard[1]}, which has {tqdm.format_sizeof(size, 'B')}; {free} are "
                        f"free on the disk, of which {tqdm.format_sizeof(RESERVE, 'B')} stay free"
                    )
                needed = self.needed  # which another plan may replace meanwhile
                self._remove(max(later, key=lambda other: needed.get(other, len(needed))))
            self.sizes[shard] = size
            if wanted:
                self.last_needed[shard] = self.plans

    def _has_room(self, directory, size):
        if self.limit is not None and sum(self.sizes.values()) + size > self.limit:
            return False
        coming = sum(size for shard, size in self.sizes.items() if not _is_there(shard))
        return shutil.disk_usage(directory).free - coming > size + RESERVE

    def _remove(self, shard):
        del self.sizes[shard]
        Path(*shard).unlink(missing_ok=True)  # a process that found it damaged may have removed it

    def copy(self, shard: tuple[str, str], wanted: bool) -> None:
        """Copies a shard, and its index beside it.

        Raises:
            OSError: it cannot be read or written; NotThereError, NoRoomError.
        """
        directory, name = shard
        path, where = Path(directory, name), f"{self.stores[directory]}: {name}"
        temporary = temporary_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        size, pieces = pieces_of(self.stores[directory], name)
        self.reserve(shard, size, wanted)
        try:
            with open(temporary, "wb") as file:
                copied = sum(map(file.write, pieces))
            if copied != size:
                raise OSError(f"{where} has {counted(copied, 'byte')}, expected {size:,}")
            with open_regular(temporary) as file:
                end = INDEX_START + index_size(where, os.pread(file.fileno(), INDEX_START, 0))
                atomic_write(Path(directory, name + INDEX), os.pread(file.fileno(), end, 0))
            os.replace(temporary, path)
        except BaseException:
            with self._lock:
                del self.sizes[shard]
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def copy_index(self, directory: str, name: str) -> None:
        """Copies the index of a shard; raises like `copy`."""
        Path(directory, name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(directory, name + INDEX), start_of(self.stores[directory], name))


def start_of(store, name: str) -> bytes:
    """The first bytes of a shard in a store, up to the end of its index.

    Raises:
        OSError: it cannot be read. SidecarError: it is no shard.
    """
    head = read_range(store, name, 0, INDEX_START)
    return head + read_range(store, name, INDEX_START, index_size(f"{store}: {name}", head))


def _is_there(shard):
    return os.path.exists(os.path.join(*shard))


class Copies:
    """The copies that are being made: what somebody waits for first, then in the order of the plan."""

    def __init__(self, shelf: Shelf):
        self.shelf = shelf
        self._pool = ThreadPoolExecutor(THREADS)
        self._running = {}  # (directory, name or name of an index) -> Future
        self._not_before = {}  # the same -> time of the next try
        self._ahead = deque()  # what is planned and was not started yet
        self._plan = 0  # number of the plan that this is of
        self._last_warning = -_WARN_EVERY_S

    def go_on(self) -> None:
        """Starts the copies that are due, and takes note of those that have ended."""
        for key, copy in list(self._running.items()):
            if copy.done():
                del self._running[key]
                self._end(key, copy)
        requests = list(_requests(self.shelf.stores))
        for directory, name in requests:
            if _is_there((directory, name)):
                _answer(directory, name)
            else:
                self._start((directory, name), wanted=True)
        if self._plan != self.shelf.plans:
            self._plan, self._ahead = self.shelf.plans, deque(self.shelf.needed)
        now = time.monotonic()
        for key in [key for key, time_s in self._not_before.items() if time_s <= now]:
            del self._not_before[key]
            if key in self.shelf.needed:
                self._ahead.append(key)
        while self._ahead and len(self._running) < THREADS:
            shard = self._ahead.popleft()
            if shard not in self.shelf.sizes:
                self._start(shard, wanted=False)

    def _start(self, key, wanted):
        if key in self._running or key in self._not_before:
            return
        directory, name = key
        if name.endswith(INDEX):
            self._running[key] = self._pool.submit(self.shelf.copy_index, directory, name.removesuffix(INDEX))
        else:
            self._running[key] = self._pool.submit(self.shelf.copy, key, wanted)

    def _end(self, key, copy: Future):
        directory, name = key
        error = copy.exception()
        if error is None:
            _answer(directory, name)
        elif isinstance(error, NotThereError | ValueError):  # ValueError: it is no shard
            self._not_before[key] = time.monotonic() + RETRY_S
            self._warn(str(error), always=True)
            atomic_write(Path(directory, FAILED, request_name(name)), str(error).encode())
            _answer(directory, name)
        elif isinstance(error, NoRoomError) and key not in _requests(self.shelf.stores):
            self._ahead.clear()  # until the next plan
        elif isinstance(error, OSError):
            self._not_before[key] = time.monotonic() + RETRY_S
            self._warn(f"{error}; trying again until it works")
        else:
            raise error

    def _warn(self, text, always=False):
        if always or time.monotonic() > self._last_warning + _WARN_EVERY_S:
            self._last_warning = time.monotonic()
            warn(text)


def _requests(directories) -> Iterator[tuple[str, str]]:
    """Yields (directory, name) of what is asked for."""
    for directory in directories:
        for request in sorted(os.listdir(Path(directory, WANTED))):
            yield directory, request.replace("~", "/")


def _answer(directory, name):
    Path(directory, WANTED, request_name(name)).unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    sets, limit = argv or sys.argv[1:]
    sys.argv[0] = "shard fetcher"  # in messages
    sets = json.loads(sets)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # training still needs shards for its last steps
        signal.signal(number, signal.SIG_IGN)
    with ExitStack() as locks:
        for directory in sets:
            locks.enter_context(locked_directory(directory))
            for of in (WANTED, FAILED):
                shutil.rmtree(Path(directory, of), ignore_errors=True)
                Path(directory, of).mkdir()
        copies = Copies(Shelf(sets, int(limit) or None))
        print("ready", flush=True)
        plans = queue.SimpleQueue()
        threading.Thread(target=_read_plans, args=(plans,), daemon=True).start()
        while True:
            copies.go_on()
            try:
                plan = plans.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if plan is None:
                break
            copies.shelf.plan(plan)
    os._exit(0)  # does not wait for copies, which would be of no use


def _read_plans(plans):
    for line in sys.stdin:
        plans.put(json.loads(line))
    plans.put(None)


if __name__ == "__main__":
    cli.run(main)
