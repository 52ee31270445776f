"""The list of all (image sidecar, text sidecar) pairs, as arrays that loader workers share."""

from __future__ import annotations

import copy
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from cachetrain import cli
from cachetrain.data.headers import Contents, check_same_run, check_unchanged, latent_shape
from cachetrain.data.pairs import PairList
from cachetrain.data.sidecar import (
    SUFFIXES,
    Header,
    SidecarError,
    metadata_of,
    read_header,
    read_verified,
    settings_of,
    tensors_of,
)
from cachetrain.data.unused import MULTIPLY
from cachetrain.log import counted, warn
from cachetrain.modeling.conditioning import check_text

if TYPE_CHECKING:
    import torch

    from cachetrain.data.saved_index import IndexFiles
    from cachetrain.data.shard_set import ShardSet
    from cachetrain.distributed import World


class PairIndex(PairList):
    """The pairs in some directories and the contents of their headers, without a Python object per pair.

    A directory is a folder of sidecars or a shard set.

    With several image suffixes, a pair has an image sidecar of each: it is as many samples, which follow each other.
    Else samples and pairs are the same. Methods take the number of a sample.

    Attributes:
        sizes: number of samples of each pair.
        choices: a visit draws one of so many samples: `sizes`, or 1 if an epoch visits each.
        shapes: distinct latent shapes (C, h, w); `shape_ids` uint16 [N] are indices into this list.
        image_bytes: uint32 [N], size of the tensors of an image sidecar.
        tokens: uint16 [N], text length in tokens, of the longest variant of the caption.
        all_tokens: uint32 [N], the same of all variants together.
        caption_sources: list of the suffixes of the files that variants come from, as ".txt".
        text_widths: {name of a text tensor: width D}.
        repeats: float32 [N], how often each pair comes up in an epoch, on average.
        blocks: int64 array, the first sample of each block, and N. A block is what is read from one shard, or of a
            folder of sidecars FOLDER_BLOCK pairs in a row.
        item_bytes: size of an element of the text tensors.
        image_header, text_header: headers of the first pair.
        image_headers: {path of an image sidecar: its header}, of the first pair of each directory.
        num_masked: number of image sidecars with a mask.
        num_unpaired: number of sidecars without a partner.
        num_without_image: number of pairs without an image beside them, in directories that hold images.
        num_alone: number of pairs in directories that hold none.
        num_without_pair: number of images without a pair.
        links: Links.
        numbered_folders: PackedStrings of folders like 10_name without a multiply.txt; their number counts only with
            kohya_repeats.
        num_foreign: number of pairs in which at least one sidecar has no cachetrain header.
    """

    def __init__(
        self,
        directories: Iterable[str | os.PathLike],
        image_suffix: str | Sequence[str],
        text_suffix: str,
        repeats: Sequence[float] | None = None,
        one_text: str | None = None,
        world: World | None = None,
        kohya_repeats: bool = False,
        every_size: bool = False,
        index_files: IndexFiles | None = None,
        sets: Mapping[str, ShardSet] | None = None,
    ):
        """Lists `directories` and reads every header once; several ranks share the reading.

        A folder that lies in several of the directories belongs to the first of them.

        Args:
            image_suffix: several: pairs have an image sidecar of each.
            repeats: for each directory, how often the pairs in it come up in an epoch; default 1. Multiplied by the
                number in the nearest multiply.txt in or above a pair's folder, up to the directory.
            one_text: path of the text sidecar to use for all images; other text sidecars are ignored.
            world: the ranks that read together; None: this process reads all headers.
            kohya_repeats: a folder like 10_name without a multiply.txt has its number as if it were in one.
            every_size: an epoch visits all samples of a pair, not one of them.
            index_files: to use, and to save if they say so; None: all folders are listed and all headers read.
            sets: {directory: ShardSet}, for those that are not to be read as they are there.

        Raises:
            ValueError: there are no pairs, or caches are unreadable, of the wrong shape, or mixed (the message names
                two files that differ).
        """
        super().__init__(directories, image_suffix, text_suffix, one_text)
        self.choices = 1 if every_size else self.sizes
        self.kohya_repeats = kohya_repeats
        repeats = repeats or [1.0] * len(self.directories)

        def listed():
            self.repeats = self._list_pairs(repeats, kohya_repeats, index_files, sets or {})
            return vars(self)

        vars(self).update(world.share(listed, places_of(self.directories)) if world else listed())
        self.blocks = self._list_blocks()
        self._check_repeats()
        self._read_headers(world, index_files)

    @property
    def samples_per_epoch(self) -> float:
        """Expected number of samples in an epoch; epochs differ where repeats have a fractional part."""
        return float(self.repeats.sum(dtype=np.float64)) / self.choices

    def subset(self, positions: np.ndarray) -> PairIndex:
        """Returns an index of the samples at `positions`, int array, all samples of some pairs; the two indexes share
        the list of paths.

        Raises:
            ValueError: the repeats of these pairs add up to less than one sample per epoch.
        """
        part = copy.copy(self)
        part._positions = np.asarray(positions) if self._positions is None else self._positions[positions]
        for name in ("shape_ids", "image_bytes", "tokens", "all_tokens", "repeats"):
            setattr(part, name, getattr(self, name)[positions])
        block = np.searchsorted(self.blocks, positions, side="right")
        part.blocks = np.concatenate([[0], 1 + np.flatnonzero(np.diff(block)), [len(positions)]])
        part._check_repeats()
        return part

    def shape(self, i: int) -> tuple[int, int, int]:
        """Latent shape (C, h, w) of pair `i`."""
        return self.shapes[self.shape_ids[i]]

    def image_tensors(self, i: int) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
        """Returns (tensors by name, header fields) of the image sidecar of sample `i`: see `image_sidecar`."""
        if packed := self._packed(i):
            return packed[0].tensors(packed[1], self._place(i) % self.sizes)
        data = self.image_sidecar(i)
        return tensors_of(data, self.image_path, i), metadata_of(data)

    def text_tensors(self, i: int) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
        """Like `image_tensors`, for the text sidecar of sample `i`, with all variants of the caption."""
        if (packed := self._packed(i)) and not self.one_text:
            return packed[0].tensors(packed[1], self.sizes)
        data = self.text_sidecar(i)
        return tensors_of(data, self.text_path, i), metadata_of(data)

    def image_sidecar(self, i: int) -> bytes:
        """Returns the bytes of the image sidecar of sample `i`, verified.

        Raises:
            SidecarError: it is damaged, or no longer of the run's shape, encoder or settings.
            OSError: it cannot be read.
        """
        if packed := self._packed(i):
            return packed[0].read(packed[1], self._place(i) % self.sizes)
        path = self.image_path(i)
        data, header = read_verified(path)
        first = self.image_headers[self.first_like(i)]
        check_unchanged(path, first.run_identity, header.run_identity)
        if (shape := latent_shape(path, header)) != self.shape(i):
            raise SidecarError(f"{path}: replaced since it was listed: the latent was {self.shape(i)}, is {shape}")
        return data

    def text_sidecar(self, i: int) -> bytes:
        """Like `image_sidecar`, for the text sidecar of sample `i`; its tokens and variants may have changed."""
        if (packed := self._packed(i)) and not self.one_text:
            return packed[0].read(packed[1], self.sizes)
        path = self.text_path(i)
        data, header = read_verified(path)
        check_unchanged(path, self.text_header.run_identity, header.run_identity)
        if (widths := check_text(self.text_kind, path, header)[1]) != self.text_widths:
            raise SidecarError(
                f"{path}: replaced since it was listed: its widths were {self.text_widths}, are {widths}"
            )
        return data

    def checksum(self) -> int:
        """Checksum of the list of pairs: names relative to data directories, order, sizes, repeats and encoders.

        Takes a second for a million pairs.
        """
        total, directory = 0, -1
        for place, stem in enumerate(self._stems):
            directory += directory + 1 < len(self._starts) and place == self._starts[directory + 1]
            total = zlib.crc32(os.fsencode(stem[len(self.directories[directory]) :].lstrip(os.sep)), total)
        positions = [] if self._positions is None else [np.asarray(self._positions, np.int64)]
        variants = [self.all_tokens] if self.num_with_variants else []
        for array in (*positions, self.shape_ids, self.tokens, self.repeats, *variants):
            total = zlib.crc32(np.ascontiguousarray(array).tobytes(), total)
        images = [header.run_identity for header in list(self.image_headers.values())[: self.sizes]]
        encoders = repr((self.shapes, *images, self.text_header.run_identity))
        return zlib.crc32(encoders.encode(), total)

    @property
    def num_with_variants(self) -> int:
        """Number of pairs whose caption has variants."""
        return int((self.all_tokens > self.tokens).sum()) // self.sizes

    @property
    def max_tokens(self) -> int:
        """Text length in tokens, of the longest caption."""
        return int(self.tokens.max())

    @property
    def num_tokens(self) -> int:
        """Text length in tokens, of all captions and their variants together."""
        return int(self.all_tokens[:: self.sizes].sum(dtype=np.int64))

    @property
    def num_image_bytes(self) -> int:
        """Size of the tensors of all image sidecars."""
        return int(self.image_bytes.sum(dtype=np.int64))

    @property
    def counts(self) -> np.ndarray:
        """int64 [shapes], the number of samples of each latent shape."""
        return np.bincount(self.shape_ids, None, len(self.shapes))

    @property
    def visits(self) -> np.ndarray:
        """float64 [shapes], how often samples of each latent shape come up in an epoch, on average."""
        return np.bincount(self.shape_ids, self.repeats, len(self.shapes)) / self.choices

    @property
    def varies(self) -> bool:
        """Whether epochs differ in which samples come up, and how often."""
        return self.choices > 1 or bool((self.repeats != np.floor(self.repeats)).any())

    def counts_of_blocks(self, weighted: bool) -> np.ndarray:
        """[blocks, shapes], the number of samples of each latent shape in each block; `weighted`: times repeats."""
        counts = [
            np.bincount(self.shape_ids[start:end], self.repeats[start:end] if weighted else None, len(self.shapes))
            for start, end in pairwise(self.blocks)
        ]
        return np.array(counts)

    def shards_of(self, blocks: Iterable[int]) -> Iterator[tuple[str, str]]:
        """Yields (directory, name) of the shards that hold these blocks."""
        for block in blocks:
            if packed := self._packed(int(self.blocks[block])):
                shard_set, pair = packed
                yield from ((shard_set.directory, name) for name in shard_set.names_of(pair))

    @property
    def waited_s(self) -> float:
        """Seconds that this process has waited for shards from object storage."""
        return sum(shard_set.waited_s for shard_set in self._sets.values())

    @property
    def is_fetched(self) -> bool:
        """Whether some of the shards come from object storage."""
        return any(shard_set.is_fetched for shard_set in self._sets.values())

    def folders(self) -> list[str]:
        """The distinct folders of the pairs, sorted; of shard sets, those that `tar xf` would make there."""
        return sorted({os.path.dirname(self.stem(i)) for i in range(len(self))})

    @property
    def image_settings(self) -> dict:
        """The settings with which the image caches were made; {} if not recorded."""
        return settings_of(self.image_path(0), self.image_header)

    @property
    def text_settings(self) -> dict:
        """The settings with which the text caches were made; {} if not recorded."""
        return settings_of(self.text_path(0), self.text_header)

    @property
    def text_kind(self) -> str:
        """Kind of the text caches, a key of conditioning.KINDS.

        Without a header the suffix decides; caches with an unknown suffix are taken to be T5's.
        """
        kinds = {suffix: kind for kind, suffix in SUFFIXES.items()}
        return self.text_header.metadata.get("kind") or kinds.get(self.text_suffix, "txt_t5cache")

    def headers_of(self, pair: int) -> tuple[list[Header], Header]:
        """Reads (headers of the image sidecars, header of the text sidecar) of a pair of the whole index."""
        first = pair * self.sizes
        images = [self._image_header(i) for i in range(first, first + self.sizes)]
        if self.one_text and pair:
            return images, self.text_header
        packed = None if self.one_text else self._packed(first)
        return images, packed[0].header(packed[1], self.sizes) if packed else read_header(self.text_path(first))

    def identities(self, directory: int) -> list[tuple[str, ...]]:
        """run_identity of a directory's image sidecars of each size and, unless one serves all, the text sidecars."""
        firsts = self.samples_of(np.array([self._starts[directory]])).tolist()
        images = [self.image_headers[self._image_path_at(place)].run_identity for place in firsts]
        return images if self.one_text else [*images, self.text_header.run_identity]

    def check_null(self, path: str | os.PathLike, header: Header) -> None:
        """Checks that the sidecar of the null caption fits the text sidecars; warns if headers cannot tell.

        Raises:
            ValueError: it was made by another encoder, with other settings, or has another width.
        """
        _, widths = check_text(self.text_kind, path, header)
        if widths != self.text_widths:
            raise ValueError(
                f"{path}: has tensors of width {widths}, {self.text_path(0)} of {self.text_widths}; delete it, and "
                "run the text cache script with the model of the other sidecars"
            )
        if not header.foreign and not self.text_header.foreign:
            check_same_run(self.text_header, header, self.text_path(0), path)
        elif not (header.foreign and self.text_header.foreign):
            warn(f"{path} and {self.text_path(0)}: as only one has a header, one encoder may not have made both")

    def _check_repeats(self):
        if len(self.repeats) and self.repeats.max() > cli.repeats.most:
            raise ValueError(
                f"{self.stem(int(self.repeats.argmax()))}: comes up {self.repeats.max():g} times in an epoch, more "
                f"than {cli.repeats.most}; lower --repeats, --train_data_dir DIR:REPEATS or the number in {MULTIPLY}"
            )
        if len(self.repeats) and self.samples_per_epoch < 1:
            raise ValueError(
                f"an epoch of {counted(self.num_pairs, 'pair')} has {self.samples_per_epoch:g} samples; check "
                f"--repeats, --train_data_dir DIR:REPEATS and {MULTIPLY}"
            )

    def _read_headers(self, world, index_files):
        (self.image_header, *_), self.text_header = self.headers_of(0)
        _, self.text_widths = check_text(self.text_kind, self.text_path(0), self.text_header)
        self.item_bytes = self.text_header.item_bytes
        # Directories and sizes may differ in settings; within a directory all settings of a size must agree.
        firsts = [int(place) for place in self.samples_of(np.array(self._starts))]
        self.image_headers = {self.image_path(i): self._image_header(i) for i in firsts}
        for path, image in self.image_headers.items():
            check_same_run(self.image_header, image, self.image_path(0), path, may_differ="settings")
        contents = Contents(self)
        contents.read(self._columns, self._known, world)
        self.shapes, self.shape_ids, self.image_bytes = contents.shapes, contents.shape_ids, contents.image_bytes
        self.tokens, self.all_tokens = (of.repeat(self.sizes) for of in (contents.tokens, contents.all_tokens))
        self.caption_sources = sorted(set().union(*contents.sources))
        self.num_foreign, self.num_masked = int((contents.foreign > 0).sum()), int((contents.masked > 0).sum())
        if index_files:
            index_files.write(self, contents)

    def _image_header(self, i):
        packed = self._packed(i)
        return packed[0].header(packed[1], i % self.sizes) if packed else read_header(self.image_path(i))


def places_of(directories: Iterable[str]) -> list[tuple]:
    """(path, device, number) of each directory: the same for ranks that see the same directories."""

    def place_of(directory):
        try:
            state = os.stat(directory)
        except OSError:
            return directory, None, None
        return directory, state.st_dev, state.st_ino

    return list(map(place_of, directories))
