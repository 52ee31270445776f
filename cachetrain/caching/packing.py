"""Packs a folder of sidecars into a shard set."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator

from tqdm import tqdm

from cachetrain.caching import ranks
from cachetrain.caching.messages import how_to_mend, print_line, say
from cachetrain.data.index import PairIndex
from cachetrain.data.pairs import null_caption_path
from cachetrain.data.set_files import Bucket, read_indexes
from cachetrain.data.shard_set import folder_name, folders_of, shard_name, shard_number
from cachetrain.data.shards import Row, build_shard
from cachetrain.data.sidecar import NULL_STEM, SidecarError, header_of, read_header, read_verified
from cachetrain.data.variants import sources_of
from cachetrain.log import counted, info, warn
from cachetrain.modeling.conditioning import check_text


def pack(args: Namespace) -> int:
    """Packs the pairs of args.data_root; returns the exit code: 1 if a shard that was there is damaged.

    Raises:
        ValueError: there are no pairs, they do not train together, or the set holds shards of another state of them.
        OSError: a sidecar cannot be read, or a shard cannot be written.
    """
    _check_args(args)
    files = Bucket(args.out)
    index = PairIndex([args.data_root], args.imgcache_suffix, args.txtcache_suffix)
    if index.num_foreign:
        raise ValueError(
            f"{counted(index.num_foreign, 'pair')} without a header cannot be packed, since they cannot be verified; "
            "run the cache scripts with --overwrite"
        )
    halves = list(_halves(index))
    there, names = {entry.name: entry for entry in files.entries()}, {}
    spans = [range(first, min(first + args.rows, index.num_pairs)) for first in range(0, index.num_pairs, args.rows)]
    for number, pairs in enumerate(tqdm(spans, desc="comparing", unit="shard", disable=None, leave=False)):
        for half in halves:
            names[f"{half.folder}/{shard_name(number, list(half.content(pairs)))}"] = half, pairs
    _check_no_others(args.out, there, names)
    mine = sorted(names)[ranks.rank() :: ranks.world_size()]
    num_damaged = _name_damaged(files, [there[name] for name in mine if name in there])
    mine, num_bytes = [name for name in mine if name not in there], 0
    for name in tqdm(mine, desc="packing", unit="shard", disable=None):
        half, pairs = names[name]
        data = half.shard(pairs)
        files.put_new(name, data)
        num_bytes += len(data)
    if ranks.rank() == 0:
        _put_null_caption(files, index, halves[-1].folder)
    shards = f"{counted(len(mine), 'shard')} written, {num_bytes / 2**30:.2f} GiB"
    say(f"{args.out}: {counted(index.num_pairs, 'pair')} in {counted(len(names), 'shard')}; {shards}")
    if index.num_unpaired:
        warn(f"not packed: {counted(index.num_unpaired, 'sidecar')} without a partner")
    return 1 if num_damaged else 0


def _check_args(args):
    if folders_of(args.data_root):
        raise ValueError(f"{args.data_root}: is a shard set already; give a folder of sidecars")
    if len(set(args.imgcache_suffix)) < len(args.imgcache_suffix):
        raise ValueError(f"--imgcache_suffix {' '.join(args.imgcache_suffix)}: has a suffix twice; give each once")
    if os.path.realpath(args.data_root) == os.path.realpath(os.path.expanduser(args.out)):
        raise ValueError(f"--out {args.out}: is the folder that is packed; choose another")


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
        """What a shard of these pairs holds: names, hashes of headers, which cover the tensors' hashes, and repeats
        other than 1."""
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


def _name_damaged(files, entries):
    """Names the shards that are cut off, or whose indexes are damaged; returns how many."""
    damaged = [index for _, index in read_indexes(files, entries) if isinstance(index, SidecarError)]
    for error in damaged:
        print_line(how_to_mend(error))
    return len(damaged)


def _check_no_others(out, there, expected):
    """Checks that the set has no other shards beside the expected ones, as of an earlier state of the folder."""
    folders = {
        half.folder: "text sidecars" if half.size is None else "image sidecars" for half, _ in expected.values()
    }
    for name in sorted(there.keys() - expected.keys()):
        folder, _, base = name.rpartition("/")
        if folder in folders and shard_number(base) is not None:
            raise ValueError(
                f"{out}/{name}: is of an earlier state of the folder's {folders[folder]} or multiply.txt, "
                f"or of another folder; delete {out}/{folder}, or choose another --out"
            )


def _put_null_caption(files, index, folder):
    path = null_caption_path(index.directories, index.text_suffix)
    if path is None:
        info(f"no {NULL_STEM}{index.text_suffix}, which training needs unless --cond_dropout is 0")
        return
    name = f"{folder}/{os.path.basename(path)}"
    files.put_new(name, read_verified(path)[0])
