"""What a cache run counts and times, and what it prints at the end."""

import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from cachetrain.caching import ranks
from cachetrain.caching.buckets import Coverage, UpscaledList, is_upscaled, upscaling
from cachetrain.caching.freshness import CORRUPT, FOREIGN, FRESH, STALE
from cachetrain.caching.messages import failure_line, print_line, say
from cachetrain.caching.unknown_words import UnknownWords
from cachetrain.data.sidecar import caption_lengths, num_truncated
from cachetrain.data.walk import Leftovers
from cachetrain.log import counted, printable, warn

_MAX_LISTED = 50
_MAX_FIRST = 32


class RunSummary:
    """Counts what a run does, for its last lines and its exit code.

    Args:
        kind, suffix: of the sidecars.
        roots: the data roots. Enlarged images are listed in `_upscaled<suffix>.txt` of the first.
        mask: --mask of the image cache scripts.

    Attributes:
        unit: what is encoded: "image" or "caption".
        counts: number of sidecars by state ("fresh", "stale", ...), and of those "encoded", "failed", "masked",
            "upscaled" and "with_variants"; "failed_before", in shards that are there; number of captions "truncated",
            and of "variants" where there are several.
        unknown_words: UnknownWords of the captions encoded.
        leftovers: walk.Leftovers: sidecars without an image, and what this run does not use.
        times_s: "encoding", the whole loop; "waiting", the part of it in which the encoder had no data.
        recorded: list to which `fail` adds (path, line), if it is not None.
    """

    def __init__(self, kind: str, roots: Sequence[str], suffix: str, mask: str | None = None):
        self.kind = kind
        self.unit = "caption" if kind.startswith("txt_") else "image"
        self.mask = mask
        self.leftovers = Leftovers(suffix, masks=mask == "files" or self.unit == "caption")
        self.upscaled = UpscaledList(os.path.join(roots[0], f"_upscaled{suffix}.txt"))
        self._count_anew()
        self.started_s = time.perf_counter()
        self._first_sizes = []  # headers of the first _MAX_FIRST images that are encoded, as far as all are upscaled

    def _count_anew(self):
        self.counts = Counter()
        self.times_s = Counter()
        self.unknown_words = UnknownWords()
        self.failures = []  # the first _MAX_LISTED
        self.recorded = None
        self.coverage = Coverage()
        self.upscaled.lines.clear()

    def fail(self, path: str, reason: str | Exception) -> None:
        """Names and counts a file that gets no sidecar; the run goes on."""
        line = failure_line(path, reason)
        self.counts["failed"] += 1
        if len(self.failures) < _MAX_LISTED:
            self.failures.append(line)
        if self.recorded is not None:
            self.recorded.append((path, line))
        print_line(line)

    def add_sidecar(self, source: str, metadata: dict[str, str]) -> None:
        """Adds what the header of a good sidecar, found or written, says about its captions, mask and image size."""
        self.counts["truncated"] += num_truncated(metadata)
        self.counts["masked"] += "mask_share" in metadata
        if "variants" in metadata:
            self.counts["with_variants"] += 1
            self.counts["variants"] += len(caption_lengths(metadata))
        if "crop_box" in metadata:
            self.coverage.add(metadata)
            if is_upscaled(metadata):
                self.upscaled.add(source, metadata)
                self.counts["upscaled"] += 1

    def check_sizes(self, decoded: Iterable[tuple[str, dict[str, str]]]) -> None:
        """Warns after the first _MAX_FIRST images if all of them are enlarged, and not hours later at the end.

        Args:
            decoded: (path, header fields) of the images of a batch.
        """
        if self._first_sizes is None or ranks.rank():
            return
        decoded = list(decoded)
        self._first_sizes += decoded
        if not all(is_upscaled(metadata) for _, metadata in decoded):
            self._first_sizes = None
        elif len(self._first_sizes) >= _MAX_FIRST:
            path, metadata = self._first_sizes[0]
            print_line(
                f"warning: all {len(self._first_sizes)} images so far are smaller than what they are encoded at, "
                f"like {path}, {upscaling(metadata)}; if that is not intended, stop and choose a smaller size"
            )
            self._first_sizes = None

    @contextmanager
    def time_encoding(self) -> Iterator[None]:
        """Times the body, which encodes; on errors as `telling_what_was_done`."""
        started_s = time.perf_counter()
        with self.telling_what_was_done():
            yield
        self.times_s["encoding"] = time.perf_counter() - started_s

    @contextmanager
    def telling_what_was_done(self) -> Iterator[None]:
        """Prints what was done so far if an error or a signal ends the body early."""
        try:
            yield
        except (KeyboardInterrupt, OSError):
            print_line(f"stopped; run again to continue. {self.line()}")
            raise
        except RuntimeError as error:
            advice = _advice(error)
            if advice is None:
                raise
            print_line(self.line())
            raise OSError(f"{advice} ({error}); what was encoded is kept") from error

    def time_waiting(self, batches: Iterable, progress: tqdm) -> Iterator:
        """Yields the batches, and times how long the encoder waits for them."""
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

    def line(self) -> str:
        """One line: `img_sdxl: 12 encoded (2 stale), 30 fresh in 4.1 s, 2.9 images/s, 3% data wait`."""
        counts, times_s = self.counts, self.times_s
        elapsed_s = time.perf_counter() - self.started_s
        states = [f"{counts[state]} {state}" for state in (STALE, CORRUPT) if counts[state]]
        parts = [
            f"{counts['encoded']} encoded" + (f" ({', '.join(states)})" if states else ""),
            f"{counts[FRESH]} fresh",
        ]
        for key, words in (
            (FOREIGN, f"{counts[FOREIGN]} foreign kept (no header; --overwrite replaces them)"),
            ("truncated", f"{counted(counts['truncated'], 'caption')} truncated"),
            ("masked", f"{counted(counts['masked'], 'image')} masked"),
            ("upscaled", f"{counted(counts['upscaled'], 'image')} upscaled"),
            ("failed", f"{counts['failed']} failed"),
            ("failed_before", f"{counts['failed_before']} failed before"),
        ):
            parts += [words] if counts[key] else []
        if counts["variants"]:
            parts.append(f"{counts['with_variants']} with variants, {counts['variants']} in all")
        line = f"{self.kind}: {', '.join(parts)} in {elapsed_s:.1f} s, "
        line += f"{counts['encoded'] / elapsed_s:.1f} {self.unit}s/s"
        return line + (f", {times_s['waiting'] / times_s['encoding']:.0%} data wait" if times_s["encoding"] else "")

    def finish(self, show_coverage: bool = False) -> int:
        """Adds up the counts of all ranks; rank 0 prints failures, coverage and summary.

        Returns:
            exit code, the same on all ranks: 1 if anything failed on any.
        """
        part = self._listed(self.upscaled.write_part) if ranks.rank() else None
        record = {**self._record(), "upscaled": part}
        with ranks.gather_records(record, part) as records:
            for other in records[: ranks.rank()] + records[ranks.rank() + 1 :]:
                self.add(other)
            if ranks.rank() == 0:
                self._listed(self.upscaled.publish, [record["upscaled"] for record in records if record["upscaled"]])
                self._print(show_coverage)
        return 1 if self.counts["failed"] else 0

    def take(self) -> dict:
        """What was counted so far, for `add` of another summary; this one starts to count anew."""
        record = self._record()
        self._count_anew()
        return record

    def add(self, record: dict) -> None:
        """Adds what another summary has counted, which may be in another process."""
        self.counts.update(record["counts"])
        self.times_s.update(record["times_s"])
        self.failures += record["failures"]
        self.unknown_words.counts.update(record["captions"])
        self.unknown_words.words.update(record["words"])
        self.coverage.images.update(record["images"])
        self.coverage.kept.update(record["kept"])

    def _record(self):
        return {
            "counts": self.counts,
            "times_s": self.times_s,
            "failures": self.failures,
            "captions": self.unknown_words.counts,
            "words": self.unknown_words.words,
            "images": self.coverage.images,
            "kept": self.coverage.kept,
        }

    def finish_alone(self, show_coverage: bool = False) -> int:
        """Prints failures and summary of this process, which waits for no other; returns its exit code."""
        self._print(show_coverage)
        return 1 if self.counts["failed"] or self.counts["failed_before"] else 0

    def _listed(self, write, *parts):
        """Writes the list of upscaled images or a part of it. All sidecars are made: an error is only a warning."""
        try:
            return write(*parts)
        except OSError as error:
            print_line(f"warning: upscaled images are not listed: {error}")
            return None

    def _print(self, show_coverage):
        if self.failures:
            lines = [f"{self.counts['failed']:,} failed:", *self.failures[:_MAX_LISTED]]
            if self.counts["failed"] > _MAX_LISTED:
                lines.append(f"... and {self.counts['failed'] - _MAX_LISTED:,} more")
            print("\n  ".join(map(printable, lines)), file=sys.stderr)
        if show_coverage and self.coverage.images:
            say(*self.coverage.table())
        say(self.line())
        self.unknown_words.report()
        if self.mask and not self.counts["masked"] and self.counts["encoded"] + self.counts[FRESH]:
            where = "has a .mask.png beside it" if self.mask == "files" else "is transparent"
            warn(f"--mask {self.mask}: no image {where}, so that nothing is masked")
        if self.counts["upscaled"] and self.upscaled.target.exists():
            say(f"upscaled images are listed in {self.upscaled.target}")
        if line := self.leftovers.unused.line():
            say(line)
        if orphans := self.leftovers.orphans:
            roots = shlex.join(word for root in orphans for word in ("--data_root", root))
            warn(
                f"no image beside {sum(orphans.values()):,} *{self.leftovers.suffix}, which train all the same; "
                f"to delete them: cache/cache_status.py {roots} --prune"
            )


def _advice(error):
    """What to do about a RuntimeError that a smaller run would avoid; None for any other."""
    if "DataLoader worker" in str(error):
        return "a process that decodes images died; if it ran out of memory, run again with fewer --num_workers"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return "out of device memory; run again with a smaller --batch_size"
    return None
