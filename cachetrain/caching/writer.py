"""Writes sidecars on threads, so that encoding does not wait for them."""

import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from errno import EDQUOT, ENOSPC, EROFS
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from cachetrain.caching.summary import RunSummary
from cachetrain.data.sidecar import write_sidecar

if TYPE_CHECKING:
    import torch


class Row(NamedTuple):
    """One sidecar to write. `source`: the image, which messages name if writing fails."""

    source: str
    target: Path
    tensors: "dict[str, torch.Tensor]"
    metadata: dict[str, str]


class Writer:
    """Writes sidecars on threads, so that encoding waits neither for the disk nor for copies from the device.

    A context manager: when the block ends, even by an exception, everything submitted has been written.
    """

    def __init__(self, summary: RunSummary, progress: tqdm, num_threads: int = 4):
        self.summary = summary
        self.progress = progress
        self.pool = ThreadPoolExecutor(num_threads)
        self.max_pending = 2 * num_threads
        self.pending = deque()

    def write(self, row: Row) -> None:
        """Writes one row; called on the threads."""
        write_sidecar(row.target, row.tensors, row.metadata)

    def submit(self, rows: Iterable[Row]) -> None:
        """Queues rows, which are consumed on a thread; waits while too many batches are queued."""
        batch = _Batch(rows, self.write)
        self.pending.append(batch)  # first: a signal between the two must not lose its account
        self.pool.submit(batch.write)
        while len(self.pending) > self.max_pending:
            self._collect()

    def _collect(self):
        """Counts the oldest batch; interrupted by a signal, it goes on where it was when called again."""
        batch = self.pending[0]
        batch.done.wait()
        while batch.written:
            source, metadata = batch.written.popleft()
            self.summary.counts["encoded"] += 1
            self.summary.add_sidecar(source, metadata)
            self.progress.update()
        while batch.failures:
            self.summary.fail(*batch.failures.popleft())
            self.progress.update()
        self.pending.popleft()
        if batch.error:
            raise batch.error

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_):
        # Waits for batches and not for threads: that wait could not be resumed once a signal has interrupted it.
        try:
            if kind is not None and self.pending:
                self.pool.submit(self.pending[-1].write)  # in case a signal came before it was queued
            self._collect_rest()
        except KeyboardInterrupt:
            if kind is None:  # the first signal ends the run, a second one ends this wait
                self._collect_rest()
            raise
        finally:
            self.pool.shutdown(wait=False)

    def _collect_rest(self):
        """Counts all batches before it raises the error of one of them."""
        failed = None
        while self.pending:
            try:
                self._collect()
            except (OSError, RuntimeError) as error:
                failed = error
        if failed:
            raise failed


class _Batch:
    """Rows that a thread writes, once.

    Attributes:
        done: set when all are written.
        written: deque of (source, header).
        failures: deque of (source, reason) not written.
        error: the exception that ends the run, or None.
    """

    def __init__(self, rows, write_row):
        self._rows = rows
        self._write_row = write_row
        self._unclaimed = threading.Lock()
        self.done = threading.Event()
        self.written, self.failures, self.error = deque(), deque(), None

    def write(self):
        if not self._unclaimed.acquire(blocking=False):
            return
        try:
            self._write()
        except Exception as error:  # any: the main thread raises it
            self.error = error
        finally:
            self.done.set()

    def _write(self):
        for row in self._rows:
            if not all(tensor.isfinite().all() for tensor in row.tensors.values()):
                reason = "the encoder gave values that are not finite; try --dtype fp32 or bf16"
                self.failures.append((row.source, reason))
                continue
            try:
                self._write_row(row)
            except OSError as error:
                if error.errno in (ENOSPC, EDQUOT, EROFS):
                    raise  # every other file would fail too
                self.failures.append((row.source, f"its sidecar cannot be written: {error}"))
            else:
                self.written.append((row.source, row.metadata))
