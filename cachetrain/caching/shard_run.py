"""The main path of the cache scripts with --out: a tar or parquet file of samples in, a shard of sidecars out.

Processes need not know of each other. Each makes the shards of its own inputs first, then those that are still
missing, and writes a shard by one create-only call: the first writer wins, and a process that dies loses the shard it
was at.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping

from tqdm import tqdm

from cachetrain.caching import ranks
from cachetrain.caching.inputs import Input, Inputs
from cachetrain.caching.messages import say
from cachetrain.caching.samples import Samples
from cachetrain.caching.summary import RunSummary
from cachetrain.caching.writer import Writer
from cachetrain.data.objects import exists, names_in, open_store, put_new
from cachetrain.data.shard_set import folder_name, shard_name, shard_number
from cachetrain.data.shards import build_shard
from cachetrain.data.sidecar import NULL_STEM, RUN_KEYS, sidecar_bytes
from cachetrain.log import counted, warn

# Submits rows of all pairs of an input to the writer, and reports those that fail.
Encode = Callable[[Samples, Writer], None]


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
        inputs = self.inputs.inputs
        names = {one: f"{self.folder}/{shard_name(one.number, one.content)}" for one in inputs}
        there, num_written = set(names_in(self.store)), 0
        with self.summary.time_encoding():
            for one in _in_turn(inputs):
                if names[one] not in there and not exists(self.store, names[one]):
                    data = self._shard(one, encode)
                    num_written += data is not None and put_new(self.store, names[one], data)
        say(f"{self.out}/{self.folder}: {counted(num_written, 'shard')} of {counted(len(names), 'input')} written")
        self._warn_of_others(there, set(names.values()))
        return self.summary.finish_alone(self.show_coverage)

    def put_null_caption(self, encode: Callable[[Writer], None]) -> None:
        """Makes the sidecar of the null caption, unless it is there; encode(writer) submits its row."""
        name = f"{self.folder}/{NULL_STEM}{self.suffix}"
        if not exists(self.store, name):
            with self.summary.time_encoding(), _Collected(self.summary, tqdm(disable=True)) as writer:
                encode(writer)
            for data in writer.sidecars.values():
                put_new(self.store, name, data)

    def _shard(self, one: Input, encode):
        """The bytes of the shard of an input; None if it cannot be read, or all of its samples fail."""
        from cachetrain.caching.packing import shard_row  # imports torch

        try:
            samples = self.inputs.open(one)
        except (OSError, ValueError) as error:
            self.summary.fail(one.where, error)
            return None
        for path, reason in samples.faults:
            self.summary.fail(path, reason)
        progress = tqdm(total=len(samples.pairs), desc=one.name, unit=self.summary.unit, disable=None, leave=False)
        with progress, _Collected(self.summary, progress) as writer:
            encode(samples, writer)
        kind = self.summary.kind if self.summary.unit == "caption" else None
        made = [(pair, data) for pair in samples.pairs if (data := writer.sidecars.pop(pair.image, None))]
        rows = [shard_row(samples.name(pair), pair.image, data, kind) for pair, data in made]
        return build_shard([row for row, _ in rows], self.suffix, rows[0][1]) if rows else None

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


def _in_turn(inputs):
    """The inputs in the order in which this process takes them: its own, then those of others from the end.

    Processes that are done with their own start with different ones.
    """
    me, size = ranks.rank(), ranks.world_size()
    own = [one for one in inputs if one.number % size == me]
    others = [one for one in inputs if one.number % size != me]
    return own + sorted(others, key=lambda one: (-(one.number // size), (one.number - me) % size))
