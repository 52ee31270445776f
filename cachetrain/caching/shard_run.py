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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tqdm import tqdm

from cachetrain.caching import ranks
from cachetrain.caching.inputs import Input, Inputs
from cachetrain.caching.messages import how_to_mend, print_line, say
from cachetrain.caching.samples import Samples
from cachetrain.caching.selection import TOO_LONG
from cachetrain.caching.summary import RunSummary
from cachetrain.caching.writer import Writer
from cachetrain.data.objects import exists, open_store, put_new
from cachetrain.data.set_files import Bucket, Entry, read_indexes
from cachetrain.data.shard_set import folder_name, shard_name, shard_number
from cachetrain.data.shards import build_shard, failed_rows
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


class Half(NamedTuple):
    """One half of a set, as a run makes it.

    Attributes:
        folder: of its shards, in the set.
        options: what else changes the rows, beside RUN_KEYS: CaptionSettings.in_header; "" in a half of images.
    """

    folder: str
    options: str = ""

    def name(self, one: Input) -> str:
        """The name of the shard of an input, in the set."""
        content = (*one.content, self.options) if self.options else one.content
        return f"{self.folder}/{shard_name(one.number, content)}"


class ShardRun:
    """Makes the shards of one half of a set.

    Attributes:
        half: the Half.

    Args:
        fields: header fields of the run, with all of RUN_KEYS that the sidecars have.
        options: as of Half.
    """

    def __init__(self, args: Namespace, fields: Mapping[str, str], summary: RunSummary, options: str = ""):
        self.args = args
        self.inputs = Inputs(args.data_root[0])
        self.store = open_store(args.out)
        self.suffix = args.cache_suffix
        self.half = Half(folder_name(args.cache_suffix, [fields.get(key, "") for key in RUN_KEYS]), options)
        self.summary = summary

    def make(self, encode: Encode) -> int:
        """Makes the shards that are missing; returns the exit code: 1 if a sample or an input failed.

        Raises:
            OSError: a shard cannot be written.
        """
        inputs, there, num_written = self.inputs.inputs, shards_there(self.args.out), 0
        missing = iter([one for one in _in_turn(inputs) if self.half.name(one) not in there])
        with self.summary.time_encoding():
            for one, samples in self._read_inputs(missing):
                num_written += self._put(one, samples, encode)
                del samples  # before the next one is read
        return finish(self.args, inputs, self.half, there, num_written, self.summary)

    def make_one(self, one: Input, encode: Encode) -> bool:
        """Makes the shard of an input, unless it is there; returns whether this call wrote it. Raises like `make`."""
        return any(self._put(one, samples, encode) for one, samples in self._read_inputs(iter([one])))

    def put_null_caption(self, encode: Callable[[Writer], None]) -> None:
        """Makes the sidecar of the null caption, unless it is there; encode(writer) submits its row."""
        name = f"{self.half.folder}/{NULL_STEM}{self.suffix}"
        if not exists(self.store, name):
            with self.summary.time_encoding(), _Collected(self.summary, tqdm(disable=True)) as writer:
                encode(writer)
            for data in writer.sidecars.values():
                put_new(self.store, name, data)

    def _read_inputs(self, missing) -> Iterator[tuple[Input, Samples]]:
        """Yields the inputs that can be read and whose shards are missing, with their Samples.

        If reading takes long enough, the next input is read while one is encoded; two are in memory then.

        Args:
            missing: iterator of Input.
        """
        with ThreadPoolExecutor(1) as thread:
            ahead, helps = None, False
            while True:
                start_s = time.perf_counter()
                entry = ahead.result() if ahead else self._read_next(missing)
                if entry is None:
                    return
                self.summary.times_s["waiting"] += time.perf_counter() - start_s
                one, samples, read_s = entry
                del entry
                ahead = thread.submit(self._read_next, missing) if helps else None
                if isinstance(samples, Exception):  # here, where it is not taken for one of another input's samples
                    self.summary.fail(one.where, samples)
                    continue
                start_s = time.perf_counter()
                yield one, samples
                del samples
                helps = read_s > _WORTH_AHEAD * (time.perf_counter() - start_s)

    def _read_next(self, missing):
        """(Input, Samples or an exception, seconds) of the next that has no shard; None: there are no more."""
        for one in missing:
            if exists(self.store, self.half.name(one)):  # another process has made it meanwhile
                continue
            start_s = time.perf_counter()
            try:
                samples = self.inputs.open(one)
            except (OSError, ValueError) as error:
                samples = error
            return one, samples, time.perf_counter() - start_s
        return None

    def _put(self, one, samples, encode):
        """Makes and writes the shard of an input; returns whether this call wrote it."""
        name = self.half.name(one)
        data = None if exists(self.store, name) else self._shard(samples, encode)
        return data is not None and put_new(self.store, name, data)

    def _shard(self, samples: Samples, encode):
        """The bytes of the shard of an input; None if all of its samples fail."""
        from cachetrain.caching.packing import shard_row  # imports torch

        self.summary.recorded = []
        for path, reason in samples.faults:
            self.summary.fail(path, reason)
        for pair in samples.drop_long_names(self.suffix):
            self.summary.fail(pair.image, TOO_LONG)
        name, unit = os.path.basename(samples.where), self.summary.unit
        progress = tqdm(total=len(samples.pairs), desc=name, unit=unit, disable=None, leave=False)
        with progress, _Collected(self.summary, progress) as writer:
            if samples.pairs:
                encode(samples, writer)
        kind = self.summary.kind if unit == "caption" else None
        made = [(pair, data) for pair in samples.pairs if (data := writer.sidecars.pop(pair.image, None))]
        rows = [shard_row(samples.name(pair), pair.image, data, kind) for pair, data in made]
        failed, self.summary.recorded = _failed(samples, self.summary.recorded), None
        return build_shard([row for row, _ in rows], self.suffix, rows[0][1], failed) if rows else None


def shards_there(out: str) -> dict[str, Entry]:
    """{name: Entry} of what is in a set; raises OSError if it cannot be listed."""
    return {entry.name: entry for entry in Bucket(out).entries()}


def finish(
    args: Namespace,
    inputs: Sequence[Input],
    half: Half,
    there: dict[str, Entry],
    num_written: int,
    summary: RunSummary,
) -> int:
    """Says what was made, and what is wrong with what was there before; returns the exit code.

    Args:
        there: of `shards_there`, before the run.
    """
    say(f"{args.out}/{half.folder}: {counted(num_written, 'shard')} of {counted(len(inputs), 'input')} written")
    names = {half.name(one): one for one in inputs}
    numbers = {one.number for one in inputs}
    places = {name: name.rpartition("/") for name in sorted(there.keys() - names.keys())}
    # Training refuses two shards of one number.
    old = [name for name, (in_, _, base) in places.items() if in_ == half.folder and shard_number(base) in numbers]
    if old:
        others = f", and {counted(len(old) - 1, 'shard')} like it," if len(old) > 1 else ""
        warn(
            f"{args.out}/{old[0]}: is of an earlier state of its input, or made with other options; "
            f"delete it{others} before training"
        )
    own = {there[name]: one for name, one in names.items() if name in there and _is_own(one)}
    _warn_of_failed(args.out, own, summary)
    return summary.finish_alone(getattr(args, "bucket", False))


def _warn_of_failed(out, inputs, summary):
    """Warns of rows that failed when shards were made, and of shards that are damaged.

    Args:
        inputs: {Entry of a shard that was there: its Input}.
    """
    files, number, first = Bucket(out), 0, None
    for entry, index in read_indexes(files, inputs):
        if isinstance(index, SidecarError):
            summary.fail(files.path(entry.name), how_to_mend(index))
            continue
        earlier = failed_rows(index.fields)
        if earlier.number:
            number += earlier.number
            first = first or f"{inputs[entry].where}#{': '.join(earlier.first[0])}"
    if number:
        summary.counts["failed_before"] = number
        print_line(  # on all ranks: each looks at its own
            f"warning: {out}/{os.path.dirname(entry.name)}: {counted(number, 'row')} failed when the shards were "
            f"made, the first {first}; to try again, delete the shard"
        )


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
