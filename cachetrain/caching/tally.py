"""What a cache run counts, and the account it gives at the end."""

import os
import sys
import time
from collections import Counter
from contextlib import contextmanager

from tqdm import tqdm

from cachetrain.caching import ranks
from cachetrain.caching.buckets import Coverage, UpscaledList, is_upscaled
from cachetrain.caching.freshness import CORRUPT, FOREIGN, FRESH, STALE

_MAX_LISTED = 50


class Tally:
    """Counts what a run did, for its last lines and its exit code.

    Args:
        kind: of the sidecars.
        root, suffix: images that had to be enlarged are listed in `root/_upscaled<suffix>.txt`.
    """

    def __init__(self, kind, root, suffix):
        self.kind = kind
        self.counts = Counter()
        self.failures = []  # the first ones; all are counted
        self.coverage, self.upscaled = Coverage(), UpscaledList(os.path.join(root, f"_upscaled{suffix}.txt"))
        self.started_s = time.perf_counter()
        self.times_s = Counter()  # encoding: the whole loop; waiting: the part in which the encoder had no data

    def fail(self, path, reason):
        """Names a file that gets no sidecar; the run goes on."""
        self.counts["failed"] += 1
        if len(self.failures) < _MAX_LISTED:
            self.failures.append(f"{path}: {reason}")
        self.say(f"{path}: {reason}")

    def say(self, message):
        """A line on stderr that does not break a progress bar."""
        tqdm.write(message, file=sys.stderr)

    def observe(self, source, metadata):
        """Takes account of one good sidecar, found or written, by its header."""
        self.counts["truncated"] += metadata.get("truncated") == "1"
        if "crop_box" in metadata:
            self.coverage.add(metadata)
            if is_upscaled(metadata):
                self.upscaled.add(source, metadata)
                self.counts["upscaled"] += 1

    @contextmanager
    def encoding(self):
        """Around encoding: times it, and says what was done so far when something ends it early."""
        started_s = time.perf_counter()
        try:
            yield
        except (KeyboardInterrupt, OSError):
            self.say(f"stopped; run again to continue. {self.summary()}")
            raise
        except RuntimeError as error:
            reason = _out_of_resources(error)
            if reason is None:
                raise
            self.say(self.summary())
            raise OSError(f"{reason} ({error}); what was encoded is kept") from error
        self.times_s["encoding"] = time.perf_counter() - started_s

    def waiting(self, batches, progress):
        """Yields the batches and takes the time that the encoder waits for them."""
        batches, started_s = iter(batches), time.perf_counter()
        while True:
            asked_s = time.perf_counter()
            batch = next(batches, None)
            now_s = time.perf_counter()
            self.times_s["waiting"] += now_s - asked_s
            if batch is None:
                return
            progress.set_postfix_str(f"{self.times_s['waiting'] / (now_s - started_s):.0%} data wait", refresh=False)
            yield batch

    def summary(self):
        """One line: `img_sdxl: 12 encoded (2 stale), 30 fresh in 4.1 s, 2.9 images/s, 3% data wait`."""
        counts, elapsed_s = self.counts, time.perf_counter() - self.started_s
        why = [f"{counts[state]} {state}" for state in (STALE, CORRUPT) if counts[state]]
        parts = [
            f"{counts['encoded']} encoded" + (f" ({', '.join(why)})" if why else ""),
            f"{counts[FRESH]} fresh",
        ]
        if counts[FOREIGN]:
            parts.append(f"{counts[FOREIGN]} foreign kept (no header; --overwrite replaces them)")
        if counts["truncated"]:
            parts.append(f"{counts['truncated']} captions truncated")
        if counts["upscaled"]:
            parts.append(f"{counts['upscaled']} images upscaled")
        if counts["failed"]:
            parts.append(f"{counts['failed']} failed")
        line = f"{self.kind}: {', '.join(parts)} in {elapsed_s:.1f} s, {counts['encoded'] / elapsed_s:.1f} images/s"
        times_s = self.times_s
        return line + (f", {times_s['waiting'] / times_s['encoding']:.0%} data wait" if times_s["encoding"] else "")

    def finish(self, show_coverage=False):
        """Joins the accounts of all ranks; rank 0 prints failures, coverage and summary.

        Returns:
            exit code, the same on all ranks: 1 if anything failed on any.
        """
        part = self.upscaled.write_part() if ranks.rank() else None
        record = {
            "counts": self.counts, "times_s": self.times_s, "failures": self.failures,
            "images": self.coverage.images, "kept": self.coverage.kept,
            "upscaled": part,
        }  # fmt: skip
        with ranks.meeting(record, part) as records:
            for other in records[: ranks.rank()] + records[ranks.rank() + 1 :]:
                self.counts.update(other["counts"])
                self.times_s.update(other["times_s"])
                self.failures += other["failures"]
                self.coverage.images.update(other["images"])
                self.coverage.kept.update(other["kept"])
            if ranks.rank() == 0:
                self.upscaled.publish([record["upscaled"] for record in records if record["upscaled"]])
                self._print(show_coverage)
        return 1 if self.counts["failed"] else 0

    def _print(self, show_coverage):
        if self.failures:
            lines = [f"{self.counts['failed']:,} failed:", *self.failures[:_MAX_LISTED]]
            if self.counts["failed"] > _MAX_LISTED:
                lines.append(f"... and {self.counts['failed'] - _MAX_LISTED:,} more")
            print("\n  ".join(lines), file=sys.stderr)
        if show_coverage and self.coverage.images:
            print(*self.coverage.table(), sep="\n")
        print(self.summary())
        if self.counts["upscaled"]:
            print(f"the upscaled images are listed in {self.upscaled.target}")


def _out_of_resources(error):
    """What to do about a RuntimeError that a smaller run would not meet; None for any other."""
    if "DataLoader worker" in str(error):
        return "a process that decodes images died; out of memory? Run again with fewer --num_workers"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return "out of device memory; run again with a smaller --batch_size"
    return None
