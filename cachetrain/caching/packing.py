"""Packs a folder of sidecars into a shard set."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator

from tqdm import tqdm

from cachetrain.caching import ranks
from cachetrain.caching.messages import say
from cachetrain.data.index import PairIndex
from cachetrain.data.objects import names_in, open_store, put_new
from cachetrain.data.pairs import null_caption_path
from cachetrain.data.shard_set import folder_name, shard_name, shard_number
from cachetrain.data.shards import Row, build_shard
from cachetrain.data.sidecar import NULL_STEM, header_of, read_header, read_verified
from cachetrain.data.variants import sources_of
from cachetrain.log import counted, info, warn
from cachetrain.modeling.conditioning import check_text


def pack(args: Namespace) -> int:
    """Packs the pairs of args.data_root; returns the exit code.

    Raises:
        ValueError: there are no pairs, they do not train together, or the set holds shards of another state of them.
        OSError: a sidecar cannot be read, or a shard cannot be written.
    """
    store = open_store(args.out)
    index = PairIndex([args.data_root], args.imgcache_suffix, args.txtcache_suffix)
    if index.num_foreign:
        raise ValueError(
            f"{counted(index.num_foreign, 'pair')} without a header cannot be packed, since they cannot be verified; "
            "run the cache scripts with --overwrite"
        )
    halves = list(_halves(index))
    there, names = set(names_in(store)), {}
    spans = [range(first, min(first + args.rows, index.num_pairs)) for first in range(0, index.num_pairs, args.rows)]
    for number, pairs in enumerate(tqdm(spans, desc="comparing", unit="shard", disable=None, leave=False)):
        for half in halves:
            names[f"{half.folder}/{shard_name(number, list(half.content(pairs)))}"] = half, pairs
    _check_no_others(args.out, there, names)
    mine = [name for name in sorted(names)[ranks.rank() :: ranks.world_size()] if name not in there]
    num_bytes = 0
    for name in tqdm(mine, desc="packing", unit="shard", disable=None):
        half, pairs = names[name]
        data = half.shard(pairs)
        put_new(store, name, data)
        num_bytes += len(data)
    if ranks.rank() == 0:
        _put_null_caption(store, index, halves[-1].folder)
    shards = f"{counted(len(mine), 'shard')} written, {num_bytes / 2**30:.2f} GiB"
    say(f"{args.out}: {counted(index.num_pairs, 'pair')} in {counted(len(names), 'shard')}; {shards}")
    if index.num_unpaired:
        warn(f"not packed: {counted(index.num_unpaired, 'sidecar')} without a partner")
    return 0


def shard_row(name: str, path: str, data: bytes, text_kind: str | None) -> tuple[Row, dict[str, int]]:
    """Returns (the row of a verified sidecar, {name of a text tensor: width}).

    Args:
        path: names the sidecar in messages.
        text_kind: of a text sidecar; None: it is one of an image.

    Raises:
        ValueError: of `check_text`.
    """
    header = header_of(data)
    if text_kind is None:
        return Row(name, data, header, shape=header.shapes["latent"]), {}
    lengths, widths = check_text(text_kind, path, header)
    sources = sources_of(path, header.metadata, len(lengths)) if len(lengths) > 1 else {}
    return Row(name, data, header, tokens=tuple(lengths), sources=tuple(sources)), widths


class _Half:
    """The image sidecars of one suffix of an index, or its text sidecars.

    Attributes:
        size: number of the image suffix; None: text.
        folder: of the shards, in the set.
    """

    def __init__(self, index: PairIndex, size: int | None):
        self.index = index
        self.size = size
        self.suffix = index.text_suffix if size is None else index.image_suffixes[size]
        self.folder = folder_name(self.suffix, read_header(self._path(0)).run_identity)

    def content(self, pairs: range) -> Iterator[str]:
        """What a shard of these pairs holds: each name, a hash of each header, which covers the tensors' hash, and the
        repeats where they are not 1."""
        for pair in pairs:
            path = self._path(pair)
            yield self._name(pair)
            yield read_header(path).metadata["header_sha256"]
            if (repeats := self._repeats(pair)) != 1:
                yield f"x{repeats}"

    def shard(self, pairs: range) -> bytes:
        """Returns the bytes of a shard of these pairs; raises like `read_verified`."""
        widths = self.index.text_widths if self.size is None else {}
        return build_shard([self._row(pair) for pair in pairs], self.suffix, widths)

    def _row(self, pair):
        path = self._path(pair)
        data, _ = read_verified(path)
        row, _ = shard_row(self._name(pair), path, data, self.index.text_kind if self.size is None else None)
        return row._replace(repeats=self._repeats(pair))

    def _repeats(self, pair):
        return float(self.index.repeats[pair * self.index.sizes + (self.size or 0)])

    def _name(self, pair):
        return self.index.relative_name(pair * self.index.sizes)

    def _path(self, pair):
        sample = pair * self.index.sizes
        return self.index.text_path(sample) if self.size is None else self.index.image_path(sample + self.size)


def _halves(index):
    for size in range(index.sizes):
        yield _Half(index, size)
    yield _Half(index, None)


def _check_no_others(out, there, expected):
    """Checks that the set has no other shards beside the expected ones, as of an earlier state of the folder."""
    folders = {half.folder: "text" if half.size is None else "image" for half, _ in expected.values()}
    for name in sorted(there - expected.keys()):
        folder, _, base = name.rpartition("/")
        if folder in folders and shard_number(base) is not None:
            raise ValueError(
                f"{out}/{name}: is of an earlier state of the {folders[folder]} sidecars or multiply.txt of the "
                f"folder, or of another folder; delete {out}/{folder}, or choose another --out"
            )


def _put_null_caption(store, index, folder):
    path = null_caption_path(index.directories, index.text_suffix)
    if path is None:
        info(f"no {NULL_STEM}{index.text_suffix}, which training needs unless --cond_dropout is 0")
        return
    name = f"{folder}/{os.path.basename(path)}"
    put_new(store, name, read_verified(path)[0])
