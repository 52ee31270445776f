"""What image and text caching share: the plan, the writer, and the account given at the end."""

import os
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC, EROFS
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from cachetrain.caching.freshness import CORRUPT, FOREIGN, FRESH, STALE, sidecar_state
from cachetrain.caching.scan import scan
from cachetrain.sidecar import sidecar_path, write_sidecar

_MAX_LISTED = 50


class Row(NamedTuple):
    """One sidecar to write. `source` is whom to name when that fails."""

    source: str
    target: Path
    tensors: dict
    metadata: dict[str, str]


class Tally:
    """Counts what a run did, for its last line and its exit code."""

    def __init__(self, kind):
        self.kind = kind
        self.counts = Counter()
        self.failures = []
        self.started_s = time.perf_counter()

    def fail(self, path, reason):
        """Names a file that gets no sidecar; the run goes on."""
        self.failures.append(f"{path}: {reason}")
        self.say(self.failures[-1])

    def say(self, message):
        """A line on stderr that does not break a progress bar."""
        tqdm.write(message, file=sys.stderr)

    def summary(self):
        """One line: `img_sdxl: 12 encoded (2 stale), 30 fresh in 4.1 s, 2.9 images/s`."""
        counts, elapsed_s = self.counts, time.perf_counter() - self.started_s
        why = [f"{counts[state]} {state}" for state in (STALE, CORRUPT) if counts[state]]
        parts = [f"{counts['encoded']} encoded" + (f" ({', '.join(why)})" if why else ""), f"{counts[FRESH]} fresh"]
        if counts[FOREIGN]:
            parts.append(f"{counts[FOREIGN]} foreign kept (no header; --overwrite replaces them)")
        if counts["truncated"]:
            parts.append(f"{counts['truncated']} captions truncated")
        if self.failures:
            parts.append(f"{len(self.failures)} failed")
        return f"{self.kind}: {', '.join(parts)} in {elapsed_s:.1f} s, {counts['encoded'] / elapsed_s:.1f} images/s"

    def finish(self):
        """Prints the failures again and the summary, and returns the exit code: 1 if anything failed."""
        if self.failures:
            lines = [f"{len(self.failures)} failed:", *self.failures[:_MAX_LISTED]]
            if len(self.failures) > _MAX_LISTED:
                lines.append(f"... and {len(self.failures) - _MAX_LISTED} more")
            print("\n  ".join(lines), file=sys.stderr)
        print(self.summary())
        return 1 if self.failures else 0


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
        written, failures = self.pending.popleft().result()
        self.tally.counts["encoded"] += written
        for path, reason in failures:
            self.tally.fail(path, reason)
        self.progress.update(written + len(failures))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown(wait=True)
        while self.pending:
            self._collect()


def _write_rows(rows):
    """Returns (number written, list of (path, reason))."""
    written, failures = 0, []
    for row in rows:
        if not all(tensor.isfinite().all() for tensor in row.tensors.values()):
            failures.append((row.source, "the encoder gave values that are not finite; try --dtype fp32 or bf16"))
            continue
        try:
            write_sidecar(row.target, row.tensors, row.metadata)
        except OSError as error:
            if error.errno in (ENOSPC, EDQUOT, EROFS):
                raise  # no other file would fare better
            failures.append((row.source, f"its sidecar cannot be written: {error}"))
        else:
            written += 1
    return written, failures


@contextmanager
def account(tally):
    """Around encoding: says what was done so far when Ctrl-C or a dead worker ends it."""
    try:
        yield
    except KeyboardInterrupt:
        tally.say(f"interrupted; run again to continue. {tally.summary()}")
        raise
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        tally.say(tally.summary())
        raise OSError(
            f"a process that decodes images died ({error}); what was encoded is kept. Out of memory? "
            "Run again with fewer --num_workers or a smaller --batch_size"
        ) from error


def find_pairs(args, tally):
    """Returns all pairs under --data_root, in an order that every process agrees on.

    Raises:
        ValueError: there are none.
    """
    pairs = list(scan(args.data_root, args.cache_suffix, tally.fail))
    if not pairs and not tally.failures:
        raise ValueError(f"no images under {', '.join(args.data_root)}")
    return pairs


def select(pairs, source_of, wanted, args, tally):
    """Returns those pairs whose sidecar has to be made, and counts the others.

    Args:
        pairs: iterable of Pair.
        source_of: Pair -> freshness.Source.
        wanted: header fields of this run.
    """
    if args.overwrite:
        return list(pairs)
    selected = []
    for pair in tqdm(pairs, desc="checking", unit="image", disable=None, leave=False):
        target = sidecar_path(pair.image, args.cache_suffix)
        try:
            state = sidecar_state(target, source_of(pair), wanted, args.verify)
        except (OSError, ValueError) as error:
            tally.fail(pair.image, error)
            continue
        tally.counts[state] += 1
        if state == CORRUPT:
            tally.say(f"{target}: damaged; making it again")
        if state not in (FRESH, FOREIGN):
            selected.append(pair)
    return selected


def model_fields(args, model_dir):
    """Header fields that say which model: a hub id with the commit that was fetched, or an absolute path."""
    if os.path.isdir(os.path.expanduser(args.model)):
        return {"model": str(model_dir), "revision": ""}
    return {"model": args.model, "revision": model_dir.name}
