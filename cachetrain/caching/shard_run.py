"""The main path of the cache scripts with --out: a tar of samples in, a shard of sidecars out.

Processes need not know of each other. Each makes the shards of its own tars first, then those that are still missing,
and writes a shard by one create-only call: the first writer wins, and a process that dies loses the shard it was at.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from cachetrain.caching import ranks
from cachetrain.caching.messages import say
from cachetrain.caching.summary import RunSummary
from cachetrain.caching.tars import InputTar, InputTars, OpenTar
from cachetrain.caching.writer import Writer
from cachetrain.data.objects import exists, names_in, open_store, put_new
from cachetrain.data.shard_set import folder_name, shard_name, shard_number
from cachetrain.data.shards import build_shard
from cachetrain.data.sidecar import NULL_STEM, RUN_KEYS, sidecar_bytes
from cachetrain.log import counted, warn

# Submits rows of all pairs of a tar to the writer, and reports those that fail.
Encode = Callable[[OpenTar, Writer], None]


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
        "--mask files": getattr(args, "mask", None) == "files",
        "--captions files": "files" in getattr(args, "captions", ()),
    }
    if names := [name for name, given in refused.items() if given]:
        raise ValueError(f"{names[0]} cannot be combined with --out, which reads tars; omit it")


class ShardRun:
    """Makes the shards of one half of a set.

    Args:
        fields: header fields of the run, with all of RUN_KEYS that the sidecars have.
    """

    def __init__(self, args: Namespace, fields: Mapping[str, str], summary: RunSummary):
        self.args = args
        self.inputs = InputTars(args.data_root[0])
        self.store = open_store(args.out)
        self.suffix = args.cache_suffix
        self.folder = folder_name(args.cache_suffix, [fields.get(key, "") for key in RUN_KEYS])
        self.summary = summary

    def make(self, encode: Encode) -> int:
        """Makes the shards that are missing; returns the exit code: 1 if a sample or a tar failed.

        Raises:
            OSError: a shard cannot be written.
        """
        tars, there, num_written = self.inputs.tars, set(names_in(self.store)), 0
        with self.summary.time_encoding():
            for tar in _in_turn(tars):
                if _name(self.folder, tar) not in there:
                    num_written += self.make_one(tar, encode)
        return finish(self.args, tars, self.folder, there, num_written, self.summary)

    def make_one(self, tar: InputTar, encode: Encode) -> bool:
        """Makes the shard of a tar, unless it is there; returns whether this call wrote it. Raises like `make`."""
        name = _name(self.folder, tar)
        data = None if exists(self.store, name) else self._shard(tar, encode)
        return data is not None and put_new(self.store, name, data)

    def put_null_caption(self, encode: Callable[[Writer], None]) -> None:
        """Makes the sidecar of the null caption, unless it is there; encode(writer) submits its row."""
        name = f"{self.folder}/{NULL_STEM}{self.suffix}"
        if not exists(self.store, name):
            with self.summary.time_encoding(), _Collected(self.summary, tqdm(disable=True)) as writer:
                encode(writer)
            for data in writer.sidecars.values():
                put_new(self.store, name, data)

    def _shard(self, tar: InputTar, encode):
        """The bytes of the shard of a tar; None if it cannot be read, or all of its samples fail."""
        from cachetrain.caching.packing import shard_row  # imports torch

        try:
            opened = self.inputs.open(tar)
        except (OSError, ValueError) as error:
            self.summary.fail(tar.where, error)
            return None
        progress = tqdm(total=len(opened.pairs), desc=tar.name, unit=self.summary.unit, disable=None, leave=False)
        with progress, _Collected(self.summary, progress) as writer:
            encode(opened, writer)
        kind = self.summary.kind if self.summary.unit == "caption" else None
        made = [(pair, data) for pair in opened.pairs if (data := writer.sidecars.pop(pair.image, None))]
        rows = [shard_row(opened.name(pair), pair.image, data, kind) for pair, data in made]
        return build_shard([row for row, _ in rows], self.suffix, rows[0][1]) if rows else None


def finish(args: Namespace, tars: Sequence[InputTar], folder: str, there: set[str], num_written: int, summary) -> int:
    """Says what was made, and names the shards of earlier states of the tars; returns the exit code.

    Training refuses two shards of one number.

    Args:
        there: names of shards.
        summary: RunSummary.
    """
    say(f"{args.out}/{folder}: {counted(num_written, 'shard')} of {counted(len(tars), 'tar')} written")
    numbers = {tar.number for tar in tars}
    for name in sorted(there - {_name(folder, tar) for tar in tars}):
        its_folder, _, base = name.rpartition("/")
        if its_folder == folder and shard_number(base) in numbers:
            warn(f"{args.out}/{name}: is of an earlier state of its tar; delete it before training")
    return summary.finish_alone(getattr(args, "bucket", False))


def _name(folder, tar):
    return f"{folder}/{shard_name(tar.number, tar.content)}"


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


def _in_turn(tars):
    """The tars in the order in which this process takes them: its own, then those of others from the end.

    Processes that are done with their own start with different tars.
    """
    me, size = ranks.rank(), ranks.world_size()
    own = [tar for tar in tars if tar.number % size == me]
    others = [tar for tar in tars if tar.number % size != me]
    return own + sorted(others, key=lambda tar: (-(tar.number // size), (tar.number - me) % size))
