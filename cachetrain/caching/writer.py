"""Writes sidecars off the encode path."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from errno import EDQUOT, ENOSPC, EROFS
from pathlib import Path
from typing import NamedTuple

from cachetrain.data.sidecar import write_sidecar


class Row(NamedTuple):
    """One sidecar to write. `source` is whom to name when that fails."""

    source: str
    target: Path
    tensors: dict
    metadata: dict[str, str]


class Writer:
    """Writes sidecars on threads, so that encoding waits neither for the disk nor for copies from the device.

    A context manager: what was submitted is written when the block ends, however it ends.
    """

    def __init__(self, tally, progress, num_threads=4):
        self.tally, self.progress = tally, progress
        self.pool = ThreadPoolExecutor(num_threads)
        self.max_pending = 2 * num_threads
        self.pending = deque()

    def submit(self, rows):
        """Queues an iterable of Row, which is consumed on a thread; waits while too many are queued."""
        self.pending.append(self.pool.submit(_write_rows, rows))
        while len(self.pending) > self.max_pending:
            self._collect()

    def _collect(self):
        self.pending[0].exception()  # waits; should a signal end that, the batch is still listed
        written, failures, error = self.pending.popleft().result()
        for source, metadata in written:
            self.tally.counts["encoded"] += 1
            self.tally.observe(source, metadata)
        for source, reason in failures:
            self.tally.fail(source, reason)
        self.progress.update(len(written) + len(failures))
        if error:
            raise error

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # Waits for batches, not for threads: those are not waited for again once a signal interrupts that.
        try:
            self._collect_rest()
        except KeyboardInterrupt:
            if kind is None:  # a first signal ends the run, a second one this wait
                self._collect_rest()
            raise
        finally:
            self.pool.shutdown(wait=False)

    def _collect_rest(self):
        """Counts all batches; only then raises the error of one of them."""
        failed = None
        while self.pending:
            try:
                self._collect()
            except (OSError, RuntimeError) as error:
                failed = error
        if failed:
            raise failed


def _write_rows(rows):
    """Returns (list of (source, header) written, list of (source, reason) not written, error that ends the run)."""
    written, failures = [], []
    for row in rows:
        if not all(tensor.isfinite().all() for tensor in row.tensors.values()):
            failures.append((row.source, "the encoder gave values that are not finite; try --dtype fp32 or bf16"))
            continue
        try:
            write_sidecar(row.target, row.tensors, row.metadata)
        except OSError as error:
            if error.errno in (ENOSPC, EDQUOT, EROFS):
                return written, failures, error  # no other file would fare better
            failures.append((row.source, f"its sidecar cannot be written: {error}"))
        else:
            written.append((row.source, row.metadata))
    return written, failures, None
