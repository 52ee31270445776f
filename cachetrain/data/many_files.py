"""Helpers for millions of files: compact lists of paths, random subsets, reading in several threads."""

import heapq
import os
import random
import time
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, islice
from threading import Event

# Items handed to a thread at a time, and number of threads.
_CHUNK, _THREADS = 64, 8


class PackedStrings:
    """An append-only list of strings, stored as one byte string plus 8 bytes per string.

    Forked loader workers share the memory, because reading an entry changes no reference counts. File names that are
    not UTF-8 are returned unchanged, as by `os.fsdecode`.
    """

    def __init__(self):
        self._bytes = bytearray()
        self._ends = array("Q")

    def append(self, string: str) -> None:
        self.append_bytes(os.fsencode(string))

    def append_bytes(self, string: bytes) -> None:
        """Appends a string as `os.fsencode` gives it."""
        self._bytes += string
        self._ends.append(len(self._bytes))

    def extend(self, prefix: bytes, strings: Sequence[bytes]) -> None:
        """Appends all of `strings`, each after `prefix`."""
        if strings:
            ends = accumulate((len(prefix) + len(string) for string in strings), initial=len(self._bytes))
            self._ends.extend(islice(ends, 1, None))
            self._bytes += prefix + prefix.join(strings)

    def __getstate__(self) -> tuple:
        import numpy as np  # World.share shares arrays; no other string can be appended to a copy

        return np.frombuffer(self._bytes, np.uint8), np.frombuffer(self._ends, np.uint64)

    def __setstate__(self, state: tuple) -> None:
        self._bytes, self._ends = map(memoryview, state)

    def __len__(self) -> int:
        return len(self._ends)

    def checksum(self) -> int:
        """CRC-32 of the list; takes a second per gigabyte."""
        return zlib.crc32(self._ends, zlib.crc32(self._bytes))

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(bytes(self._bytes[start : self._ends[index]]))


def random_subset(items: Iterable, number: int, seed: int) -> Iterable:
    """Returns `number` random items in their original order, holding only these in memory; 0: all items."""
    if not number:
        return items
    draw = random.Random(seed).random
    drawn = heapq.nsmallest(number, ((draw(), index, item) for index, item in enumerate(items)))
    return [item for _, _, item in sorted(drawn, key=lambda entry: entry[1])]


def in_threads(function: Callable, items: Iterable) -> Iterator[tuple]:
    """Yields (item, function(item)) in order; holds only as many items in memory as keep the threads busy.

    Threads help where each call waits for storage, such as a millisecond per file on a network. If the first items
    spend most of their time computing, as with local files in the page cache, no threads are used: they would compete
    for Python's global lock and take twice as long.
    """
    items, running, stopped = iter(items), deque(), Event()

    def results_of(chunk):
        return [function(item) for item in chunk if not stopped.is_set()]

    chunk = list(islice(items, _CHUNK))
    start_s, start_cpu_s = time.perf_counter(), time.thread_time()
    results = results_of(chunk)
    busy = time.thread_time() - start_cpu_s > 0.5 * (time.perf_counter() - start_s)
    yield from zip(chunk, results, strict=True)
    if busy:
        yield from ((item, function(item)) for item in items)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            while True:
                while len(running) < 2 * _THREADS and (chunk := list(islice(items, _CHUNK))):
                    running.append((chunk, pool.submit(results_of, chunk)))
                if not running:
                    return
                chunk, results = running.popleft()
                yield from zip(chunk, results.result(), strict=True)
        finally:
            stopped.set()  # an interrupted run does not wait for queued items, which may take long
