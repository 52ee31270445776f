"""Writes sidecars on threads, so that encoding does not wait for them."""

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

    def submit(self, rows: Iterable[Row]) -> None:
        """Queues rows, which are consumed on a thread; waits while too many batches are queued."""
        self.pending.append(self.pool.submit(_write_rows, rows))
        while len(self.pending) > self.max_pending:
            self._collect()

    def _collect(self):
        self.pending[0].exception()  # waits; if a signal interrupts it, the batch is still in the queue
        written, failures, error = self.pending.popleft().result()
        for source, metadata in written:
            self.summary.counts["encoded"] += 1
            self.summary.add_sidecar(source, metadata)
        for source, reason in failures:
            self.summary.fail(source, reason)
        self.progress.update(len(written) + len(failures))
        if error:
            raise error

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_):
        # Waits for batches and not for threads: that wait could not be resumed once a signal has interrupted it.
        try:
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
                return written, failures, error  # every other file would fail too
            failures.append((row.source, f"its sidecar cannot be written: {error}"))
        else:
            written.append((row.source, row.metadata))
    return written, failures, None
