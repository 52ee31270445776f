"""The main path of the cache scripts with --out: a tar or parquet file of samples in, a shard of sidecars out.

Processes need not know of each other. Each makes the shards of its own inputs first, then those that are still
missing, and writes a shard by one create-only call: the first writer wins, and a process that dies loses the shard it
was at.
"""

from __future__ import annotations

import os
import re
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tqdm import tqdm

from cachetrain.caching import ranks
from cachetrain.caching.inputs import Inputs
from cachetrain.caching.messages import print_line, say
from cachetrain.caching.samples import Samples
from cachetrain.caching.summary import RunSummary
from cachetrain.caching.writer import Writer
from cachetrain.data.many_files import in_threads
from cachetrain.data.objects import exists, names_in, open_store, put_new, read_range
from cachetrain.data.shard_set import folder_name, shard_name, shard_number
from cachetrain.data.shards import build_shard, failed_rows, fields_in
from cachetrain.data.sidecar import NULL_STEM, RUN_KEYS, SidecarError, sidecar_bytes
from cachetrain.log import counted, warn

# Submits rows of all pairs of an input to the writer, and reports those that fail.
Encode = Callable[[Samples, Writer], None]

# Reading an input in advance has to save this share of the time of encoding, for the memory that it takes.
_WORTH_AHEAD = 0.05


def check_out_args(args: Namespace) -> None:
    """Checks the arguments of a run with --out.

    Raises:
        ValueError: an option cannot be combined with --out.
    """
    if len(args.data_root) > 1:
        raise ValueError("--out takes one --data_root; make a shard set of each")
    refused = {
        "--overwrite": args.overwrite,
        "--full": args.full,
    }
    if names := [name for name, given in refused.items() if given]:
        raise ValueError(f"{names[0]} cannot be combined with --out, which reads tars and parquet files; omit it")


class ShardRun:
    """Makes the shards of one half of a set.

    Args:
        fields: header fields of the run, with all of RUN_KEYS that the sidecars have.
    """

    def __init__(self, args: Namespace, fields: Mapping[str, str], summary: RunSummary):
        self.inputs = Inputs(args.data_root[0])
        self.out = args.out
        self.store = open_store(args.out)
        self.suffix = args.cache_suffix
        self.folder = folder_name(args.cache_suffix, [fields.get(key, "") for key in RUN_KEYS])
        self.summary = summary
        self.show_coverage = getattr(args, "bucket", False)

    def make(self, encode: Encode) -> int:
        """Makes the shards that are missing; returns the exit code: 1 if a sample or an input failed.

        Raises:
            OSError: a shard cannot be written.
        """
        names = {one: f"{self.folder}/{shard_name(one.number, one.content)}" for one in self.inputs.inputs}
        there, num_written = set(names_in(self.store)), 0
        missing = iter([(one, names[one]) for one in _in_turn(names) if names[one] not in there])
        with self.summary.time_encoding():
            for name, samples in self._read_inputs(missing):
                if not exists(self.store, name):
                    data = self._shard(samples, encode)
                    num_written += data is not None and put_new(self.store, name, data)
                del samples  # before the next one is read
        say(f"{self.out}/{self.folder}: {counted(num_written, 'shard')} of {counted(len(names), 'input')} written")
        self._warn_of_others(there, set(names.values()))
        self._warn_of_failed({name: one for one, name in names.items() if name in there and _is_own(one)})
        return self.summary.finish_alone(self.show_coverage)

    def put_null_caption(self, encode: Callable[[Writer], None]) -> None:
        """Makes the sidecar of the null caption, unless it is there; encode(writer) submits its row."""
        name = f"{self.folder}/{NULL_STEM}{self.suffix}"
        if not exists(self.store, name):
            with self.summary.time_encoding(), _Collected(self.summary, tqdm(disable=True)) as writer:
                encode(writer)
            for data in writer.sidecars.values():
                put_new(self.store, name, data)

    def _read_inputs(self, missing) -> Iterator[tuple[str, Samples]]:
        """Yields (name of the shard, Samples) of the inputs that can be read and whose shards are missing.

        If reading takes long enough, the next input is read while one is encoded; two are in memory then.

        Args:
            missing: iterator of (Input, name of its shard).
        """
        with ThreadPoolExecutor(1) as thread:
            ahead, helps = None, False
            while True:
                start_s = time.perf_counter()
                entry = ahead.result() if ahead else self._read_next(missing)
                if entry is None:
                    return
                self.summary.times_s["waiting"] += time.perf_counter() - start_s
                one, name, samples, read_s = entry
                del entry
                ahead = thread.submit(self._read_next, missing) if helps else None
                if isinstance(samples, Exception):  # here, where it is not taken for one of another input's samples
                    self.summary.fail(one.where, samples)
                    continue
                start_s = time.perf_counter()
                yield name, samples
                del samples
                helps = read_s > _WORTH_AHEAD * (time.perf_counter() - start_s)

    def _read_next(self, missing):
        """(Input, name of its shard, Samples or an exception, seconds) of the next; None: there are no more."""
        for one, name in missing:
            if exists(self.store, name):  # another process has made it meanwhile
                continue
            start_s = time.perf_counter()
            try:
                samples = self.inputs.open(one)
            except (OSError, ValueError) as error:
                samples = error
            return one, name, samples, time.perf_counter() - start_s
        return None

    def _shard(self, samples: Samples, encode):
        """The bytes of the shard of an input; None if all of its samples fail."""
        from cachetrain.caching.packing import shard_row  # imports torch

        self.summary.recorded = []
        for path, reason in samples.faults:
            self.summary.fail(path, reason)
        name, unit = os.path.basename(samples.where), self.summary.unit
        progress = tqdm(total=len(samples.pairs), desc=name, unit=unit, disable=None, leave=False)
        with progress, _Collected(self.summary, progress) as writer:
            encode(samples, writer)
        kind = self.summary.kind if unit == "caption" else None
        made = [(pair, data) for pair in samples.pairs if (data := writer.sidecars.pop(pair.image, None))]
        rows = [shard_row(samples.name(pair), pair.image, data, kind) for pair, data in made]
        failed, self.summary.recorded = _failed(samples, self.summary.recorded), None
        return build_shard([row for row, _ in rows], self.suffix, rows[0][1], failed) if rows else None

    def _warn_of_failed(self, inputs):
        """Warns of rows that failed when shards were made. `inputs`: {name of a shard that is there: Input}."""

        def failed(name):
            try:
                return failed_rows(fields_in(f"{self.out}/{name}", partial(read_range, self.store, name, 0)))
            except SidecarError as error:
                return error

        number, first = 0, None
        for name, earlier in in_threads(failed, inputs):
            if isinstance(earlier, SidecarError):
                self.summary.fail(f"{self.out}/{name}", earlier)
            elif earlier.number:
                number += earlier.number
                first = first or f"{inputs[name].where}#{': '.join(earlier.first[0])}"
        if number:
            self.summary.counts["failed_before"] = number
            print_line(  # on all ranks: each looks at its own
                f"warning: {self.out}/{self.folder}: {counted(number, 'row')} failed when the shards were made, the "
                f"first {first}; to try again, delete the shard"
            )

    def _warn_of_others(self, there, expected):
        """Names the shards of earlier states of the inputs; training refuses two shards of one number."""
        numbers = {one.number for one in self.inputs.inputs}
        for name in sorted(there - expected):
            folder, _, base = name.rpartition("/")
            if folder == self.folder and shard_number(base) in numbers:
                warn(f"{self.out}/{name}: is of an earlier state of its input; delete it before training")


class _Collected(Writer):
    """A Writer that keeps the sidecars in memory.

    Attributes:
        sidecars: {path of the image: bytes of its sidecar}.
    """

    def __init__(self, summary: RunSummary, progress: tqdm):
        super().__init__(summary, progress)
        self.sidecars = {}

    def write(self, row):
        self.sidecars[row.source] = sidecar_bytes(row.tensors, row.metadata)


def _failed(samples, recorded):
    """Returns (name, reason) of the samples that failed, in their order, without what differs between machines.

    Args:
        recorded: list of (path, line) as of `RunSummary.fail`.
    """
    images = {pair.image for pair in samples.pairs}
    places = {path: i for i, pair in enumerate(samples.pairs) for path in (pair.image, *pair.caption_files)}
    root, failed = f"{samples.where}#", []
    for path, line in sorted(recorded, key=lambda entry: (places.get(entry[0], -1), entry)):
        name = os.path.splitext(path)[0].removeprefix(root)
        reason = line.removeprefix(f"{path}: ") if path in images else line
        failed.append((name, re.sub("0x[0-9a-f]{6,}", "0x", reason.replace(root, ""))))
    return failed


def _is_own(one):
    return one.number % ranks.world_size() == ranks.rank()


def _in_turn(inputs):
    """The inputs in the order in which this process takes them: its own, then those of others from the end.

    Processes that are done with their own start with different ones.
    """
    me, size = ranks.rank(), ranks.world_size()
    others = [one for one in inputs if not _is_own(one)]
    return [
        *filter(_is_own, inputs),
        *sorted(others, key=lambda one: (-(one.number // size), (one.number - me) % size)),
    ]
