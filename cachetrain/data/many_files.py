"""What millions of files need: lists of paths without a Python object each, and several files looked at at a time."""

import heapq
import os
import random
import time
import zlib
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Event

# Items that are looked at together, and threads where looking means waiting.
_CHUNK, _THREADS = 64, 8


class PackedStrings:
    """An append-only list of strings: their bytes one after another, and 8 more each for where they end.

    Forked loader workers share it, since reading it writes no reference counts into its memory. File names that are
    not UTF-8 survive, as they do in `os.fsdecode`.
    """

    def __init__(self):
        self._bytes, self._ends = bytearray(), array("Q")

    def append(self, string):
        self._bytes += os.fsencode(string)
        self._ends.append(len(self._bytes))

    def __len__(self):
        return len(self._ends)

    def checksum(self):
        """A number that tells lists apart, at a gigabyte a second."""
        return zlib.crc32(self._ends, zlib.crc32(self._bytes))

    def __getitem__(self, index):
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(bytes(self._bytes[start : self._ends[index]]))


def random_subset(items, number, seed):
    """Returns `number` of the items, each equally likely, in their order, and holds no more than these; 0: all."""
    if not number:
        return items
    draw = random.Random(seed).random
    drawn = heapq.nsmallest(number, ((draw(), index, item) for index, item in enumerate(items)))
    return [item for _, _, item in sorted(drawn, key=lambda one: one[1])]


def in_threads(function, items):
    """Yields (item, function(item)) in order; as few items as keep the threads busy are held at a time.

    Threads are for storage that lets one wait, a millisecond a file on a network. Where the first items take mostly
    computing, as with warm local files, there are none: they would only fight for Python's lock, at twice the time.
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
            stopped.set()  # an interrupted run does not wait for what is queued, which may be much to hash
