"""The list of all (image sidecar, text sidecar) pairs, as arrays that loader workers share."""

from __future__ import annotations

import argparse
import codecs
import copy
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from cachetrain import cli
from cachetrain.data.links import Links
from cachetrain.data.many_files import PackedStrings, in_threads
from cachetrain.data.shard_set import ShardSet, folder_suffix, shard_folders
from cachetrain.data.sidecar import (
    NULL_STEM,
    RUN_KEYS,
    SUFFIXES,
    Header,
    SidecarError,
    metadata_of,
    read_header,
    read_verified,
    settings_of,
    tensors_of,
)
from cachetrain.data.unused import MULTIPLY, is_numbered, repeats_in_name
from cachetrain.data.variants import sources_of
from cachetrain.data.walk import image_stems, is_image, walk_folders
from cachetrain.log import counted, warn
from cachetrain.modeling.conditioning import check_tensor, check_text
from cachetrain.reading import read_bytes

if TYPE_CHECKING:
    import torch

    from cachetrain.distributed import World

FOLDER_BLOCK = 2048  # as many pairs as a shard has by default

_MULTIPLE = cli.Number(float, 0, cli.repeats.most)


class PairIndex:
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

        Raises:
            ValueError: there are no pairs, or caches are unreadable, of the wrong shape, or mixed (the message names
                two files that differ).
        """
        self.image_suffixes = (image_suffix,) if isinstance(image_suffix, str) else tuple(image_suffix)
        self.text_suffix = text_suffix
        self.sizes = len(self.image_suffixes)
        self.choices = 1 if every_size else self.sizes
        self.one_text = one_text
        self.kohya_repeats = kohya_repeats
        self.directories = [os.fspath(directory) for directory in directories]
        self.num_unpaired = self.num_without_image = self.num_alone = self.num_without_pair = 0
        self.links = Links(self.image_suffixes[0], text_suffix)
        self.numbered_folders = PackedStrings()
        self._stems = PackedStrings()
        self._starts = []  # for each directory, the place of its first pair in _stems
        self._positions = None  # in a subset, its samples in the whole index
        self._sets = {}  # number of a directory that is a shard set -> (ShardSet, list of Part)
        of_pairs = self._list_pairs(repeats or [1.0] * len(self.directories))
        self.repeats = np.concatenate(of_pairs).astype(np.float32).repeat(self.sizes)
        self.blocks = self._list_blocks()
        self._check_repeats()
        self._read_headers(world)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._stems) * self.sizes if self._positions is None else len(self._positions)

    @property
    def num_pairs(self) -> int:
        return len(self) // self.sizes

    @property
    def samples_per_epoch(self) -> float:
        """Expected number of samples in an epoch; epochs differ where repeats have a fractional part."""
        return float(self.repeats.sum(dtype=np.float64)) / self.choices

    def samples_of(self, pairs: np.ndarray) -> np.ndarray:
        """The samples of these pairs, numbered from 0; int arrays."""
        return (pairs[:, None] * self.sizes + np.arange(self.sizes)).ravel()

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

    def stem(self, i: int) -> str:
        """Path of sample `i` without a suffix."""
        return self._stems[self._place(i) // self.sizes]

    def relative_name(self, i: int) -> str:
        """Path of pair `i` without a suffix, relative to its data directory."""
        return os.path.relpath(self.stem(i), self.directories[self._directory_of(i)])

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
        first = self.image_headers[self._first_like(i)]
        _check_unchanged(path, first.run_identity, header.run_identity)
        if (shape := _latent_shape(path, header)) != self.shape(i):
            raise SidecarError(f"{path}: replaced since the run started: the latent was {self.shape(i)}, is {shape}")
        return data

    def text_sidecar(self, i: int) -> bytes:
        """Like `image_sidecar`, for the text sidecar of sample `i`; its tokens and variants may have changed."""
        if (packed := self._packed(i)) and not self.one_text:
            return packed[0].read(packed[1], self.sizes)
        path = self.text_path(i)
        data, header = read_verified(path)
        _check_unchanged(path, self.text_header.run_identity, header.run_identity)
        if (widths := check_text(self.text_kind, path, header)[1]) != self.text_widths:
            raise SidecarError(
                f"{path}: replaced since the run started: its widths were {self.text_widths}, are {widths}"
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

    def image_path(self, i: int) -> str:
        return self._image_path_at(self._place(i))

    def text_path(self, i: int) -> str:
        """Path of the text sidecar of sample `i`; for messages, as in a shard set it is no path."""
        if (packed := self._packed(i)) and not self.one_text:
            return packed[0].where(packed[1], self.sizes)
        return self.one_text or self.stem(i) + self.text_suffix

    def caption_stem(self, i: int) -> str:
        """Path without suffix of the text sidecar of pair `i`, beside which its caption lies."""
        return os.path.splitext(self.one_text)[0] if self.one_text else self.stem(i)

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

    def _list_pairs(self, repeats):
        """Lists the pairs of all directories; returns a list of arrays, the repeats of all pairs."""
        of_pairs, visited, directories = [], set(), []
        for directory, number in zip(self.directories, repeats, strict=True):
            start, num_repeated = len(self._stems), self.links.num_repeated
            if shard_folders(directory, self.image_suffixes[0]) and not self._was_listed(directory, visited):
                of_pairs.append(number * self._list_set(directory, len(directories)))
            else:
                for multiple, stems in self._folders(directory, visited):
                    for stem in stems:
                        self._stems.append(stem)
                    of_pairs.append(np.full(len(stems), number * multiple))
            if len(self._stems) > start:
                self._starts.append(start)
                directories.append(directory)
            elif self.links.num_repeated > num_repeated or _overlaps(directory, directories):
                warn(
                    f"{directory}: all of its pairs are also in a directory given before it; they count once, with "
                    "the repeats of that directory"
                )
            else:
                suffixes = [*self.image_suffixes, *([] if self.one_text else [self.text_suffix])]
                expected = " and ".join(f"*{suffix}" for suffix in suffixes)
                raise ValueError(f"{directory}: no pairs of {expected}; run the cache scripts on it first")
        self.directories = directories
        return of_pairs

    def _was_listed(self, directory, visited):
        real_path = os.path.realpath(directory)
        self.links.num_repeated += real_path in visited
        return real_path in visited or visited.add(real_path)

    def _list_set(self, directory, number):
        """Lists the pairs of a shard set, directory `number` of those with pairs; returns their repeats."""
        shard_set = ShardSet(directory, (*self.image_suffixes, *([] if self.one_text else [self.text_suffix])))
        root = os.fsencode(os.path.join(directory, ""))
        columns = shard_set.read_indexes(self.sizes, lambda name: self._stems.append_bytes(root + name))
        self.num_unpaired += shard_set.num_unpaired
        self._sets[number] = shard_set, columns
        return columns.repeats

    def _list_blocks(self):
        ends = [[0]]
        for number, (start, end) in enumerate(zip(self._starts, [*self._starts[1:], self.num_pairs], strict=True)):
            of_folder = np.arange(start + FOLDER_BLOCK, end, FOLDER_BLOCK)
            ends += [start + self._sets[number][0].ends if number in self._sets else of_folder, [end]]
        return np.unique(np.concatenate(ends)) * self.sizes

    def _packed(self, i):
        """(ShardSet, number of the pair in it) of sample `i`; None if its sidecars are files."""
        if not self._sets:
            return None
        directory = self._directory_of(i)
        if directory not in self._sets:
            return None
        return self._sets[directory][0], self._place(i) // self.sizes - self._starts[directory]

    def _place(self, i):
        """The number of sample `i` in the whole index, of which this may be a subset."""
        return i if self._positions is None else int(self._positions[i])

    def _directory_of(self, i):
        return self._directory_at(self._place(i))

    def _directory_at(self, place):
        """Number of the directory of a sample of the whole index."""
        return bisect_right(self._starts, place // self.sizes) - 1

    def _image_path_at(self, place):
        directory = self._directory_at(place)
        if directory in self._sets:
            pair = place // self.sizes - self._starts[directory]
            return self._sets[directory][0].where(pair, place % self.sizes)
        return self._stems[place // self.sizes] + self.image_suffixes[place % self.sizes]

    def _first_like(self, i):
        """The path of the first image sidecar of the directory and size of sample `i`."""
        start = self._starts[self._directory_of(i)]
        return self._image_path_at(start * self.sizes + self._place(i) % self.sizes)

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

    def _folders(self, directory, visited):
        """Yields (number from multiply.txt, sorted stems that have both sidecars) for each folder not yet visited.

        Counts sidecars without a partner, and pairs without an image.
        """
        if not Path(directory).is_dir():
            raise ValueError(f"{directory}: no such directory")
        suffixes = (*self.image_suffixes, self.text_suffix)
        multiples = {}  # folder -> number that applies in and below the folder, where not 1
        num_without_image, has_images = 0, False

        def keep(name):
            return name.endswith(suffixes) or is_image(name) or name == MULTIPLY

        for found in walk_folders(directory, visited, keep, _warn_of_skipped_folder):
            folder, names, _ = found
            self._check_no_shards(folder, directory)
            multiple = multiples.get(os.path.dirname(folder), 1.0)
            if MULTIPLY in names:
                multiple = _read_multiple(os.path.join(folder, MULTIPLY))
            numbered = MULTIPLY not in names and is_numbered(folder)
            if numbered and self.kohya_repeats:
                multiple = repeats_in_name(folder)
            if multiple != 1.0:
                multiples[os.path.dirname(os.path.join(folder, ""))] = multiple
            stems = self._paired(names)
            images = image_stems(names)
            has_images = has_images or bool(images)
            num_with_image = sum(stem in images for stem in stems)
            num_without_image += len(stems) - num_with_image
            self.num_without_pair += len(images) - num_with_image - (NULL_STEM in images)
            if not self.one_text:
                stems = self.links.without_repeated(found, stems, visited)
            if stems and numbered and (self.kohya_repeats or multiple == 1.0):
                self.numbered_folders.append(folder)
            yield multiple, [os.path.join(folder, stem) for stem in stems]
        if has_images:
            self.num_without_image += num_without_image
        else:
            self.num_alone += num_without_image

    def _check_no_shards(self, folder, directory):
        """Refuses a folder of shards inside a directory that is listed for its sidecars."""
        shard_set, name = os.path.split(os.path.abspath(folder))
        if (suffix := folder_suffix(name)) and shard_folders(shard_set, suffix):
            raise ValueError(
                f"{folder}: is part of the shard set {shard_set}, which is not read as part of {directory}; give the "
                "set as a directory of its own, or move it elsewhere"
            )

    def _paired(self, names):
        """The sorted stems that have all sidecars."""
        suffixes = self.image_suffixes if self.one_text else (*self.image_suffixes, self.text_suffix)
        stems = [{name.removesuffix(suffix) for name in names if name.endswith(suffix)} for suffix in suffixes]
        paired = set.intersection(*stems) - {NULL_STEM}
        self.num_unpaired += sum(len(of_suffix - paired - {NULL_STEM}) for of_suffix in stems)
        return sorted(paired)

    def _read_headers(self, world):
        rank, ranks = (world.rank, world.ranks) if world else (0, 1)
        self.num_foreign = self.num_masked = 0
        self.shape_ids = np.zeros(len(self), np.uint16)
        self.image_bytes = np.zeros(len(self), np.uint32)
        self.tokens = np.zeros(len(self), np.uint16)
        self.all_tokens = np.zeros(len(self), np.uint32)
        (self.image_header, *_), self.text_header = self._headers(0)
        _, self.text_widths = check_text(self.text_kind, self.text_path(0), self.text_header)
        self.item_bytes = self.text_header.item_bytes
        # Directories and sizes may differ in settings; within a directory all settings of a size must agree.
        firsts = [int(place) for place in self.samples_of(np.array(self._starts))]
        self.image_headers = {self.image_path(i): self._image_header(i) for i in firsts}
        for path, image in self.image_headers.items():
            check_same_run(self.image_header, image, self.image_path(0), path, may_differ="settings")
        shapes, sources = {}, set()
        ends = [*self._starts[1:], self.num_pairs]
        spans = [range(start, end) for start, end in zip(self._starts, ends, strict=True)]
        shares = [span[(rank - span.start) % ranks :: ranks] for span in spans]
        num_files = sum(len(share) for number, share in enumerate(shares) if number not in self._sets)
        with tqdm(desc="headers", total=num_files, unit="pair", disable=None if not rank else 1) as progress:
            for number, share in enumerate(shares):
                if number in self._sets:
                    self._add_set(number, share, shapes, sources)
                    continue
                for pair, (images, text) in in_threads(self._headers, share):
                    self._add_headers(pair, images, text, shapes, sources)
                    progress.update()
        self.shapes = list(shapes)
        self.caption_sources = sorted(sources)
        if ranks > 1:
            self._merge(world)

    def _add_headers(self, pair, images, text, shapes, sources):
        """Checks the headers of a pair of sidecars, and adds what they say."""
        i = pair * self.sizes
        for sample, image in enumerate(images, start=i):
            path, first = self.image_path(sample), self._first_like(sample)
            if image.run_identity != self.image_headers[first].run_identity:
                check_same_run(self.image_headers[first], image, first, path)
            shape = _latent_shape(path, image)
            self.shape_ids[sample] = shapes.setdefault(shape, len(shapes))
            self.image_bytes[sample] = image.num_bytes
            self.num_masked += "mask" in image.shapes
        if text.run_identity != self.text_header.run_identity:
            check_same_run(self.text_header, text, self.text_path(0), self.text_path(i))
        lengths, widths = check_text(self.text_kind, self.text_path(i), text)
        self.tokens[i : i + self.sizes], self.all_tokens[i : i + self.sizes] = max(lengths), sum(lengths)
        if len(lengths) > 1:
            sources.update(sources_of(self.text_path(i), text.metadata, len(lengths)))
        self._check_widths(i, widths)
        self.num_foreign += text.foreign or any(image.foreign for image in images)

    def _add_set(self, number, share, shapes, sources):
        """Checks what the indexes of a shard set say, and adds what they say of some of its pairs.

        Args:
            number: of the directory.
            share: range of pairs.
        """
        start, columns = self._starts[number], self._sets[number][1]
        pairs = np.arange(share.start, share.stop, share.step)
        samples, of_set = self.samples_of(pairs), self.samples_of(pairs - start)
        ids = np.array([shapes.setdefault(shape, len(shapes)) for shape in columns.shapes], np.uint16)
        self.shape_ids[samples] = ids[columns.shape_ids[of_set]]
        self.image_bytes[samples] = columns.image_bytes[of_set]
        self.num_masked += int(columns.masked[of_set].sum())
        sources.update(columns.sources)
        if self.one_text:
            lengths, widths = check_text(self.text_kind, self.one_text, self.text_header)
            self.tokens[samples], self.all_tokens[samples] = max(lengths), sum(lengths)
        else:
            widths = columns.widths
            self.tokens[samples] = columns.tokens[pairs - start].repeat(self.sizes)
            self.all_tokens[samples] = columns.all_tokens[pairs - start].repeat(self.sizes)
            first = start * self.sizes
            check_same_run(self.text_header, self._headers(start)[1], self.text_path(0), self.text_path(first))
        self._check_widths(start * self.sizes, widths)
        self._sets[number] = self._sets[number][0], None  # frees the columns

    def _check_widths(self, i, widths):
        if widths != self.text_widths:
            raise ValueError(
                f"{self.text_path(i)}: has tensors of width {widths}, {self.text_path(0)} of {self.text_widths}; "
                "encode both with the same model"
            )

    def _merge(self, world):
        """Combines the headers read by all ranks; checks that all ranks list the same pairs."""
        paths, counts = (self.num_pairs, self.stem(0), self._stems.checksum()), (self.num_foreign, self.num_masked)
        summary = (*paths, self.shapes, self.caption_sources, np.array(counts))
        summaries = world.gather(summary)
        if len({(number, first, checksum) for number, first, checksum, *_ in summaries}) > 1:
            listed = "; ".join(f"{counted(number, 'pair')}, the first {first}" for number, first, *_ in summaries)
            raise ValueError(f"the ranks list different pairs: {listed}; wait until the cache scripts are done")
        shapes = sorted({shape for _, _, _, shapes_of_rank, *_ in summaries for shape in shapes_of_rank})
        share = self.samples_of(np.arange(world.rank, self.num_pairs, world.ranks))
        new_ids = np.array([shapes.index(shape) for shape in self.shapes] or [0], np.uint16)
        self.shape_ids[share] = new_ids[self.shape_ids[share]]
        self.shapes = shapes
        self.caption_sources = sorted({source for *_, sources, _ in summaries for source in sources})
        self.num_foreign, self.num_masked = sum(counts for *_, counts in summaries).tolist()
        for name in ("shape_ids", "image_bytes", "tokens", "all_tokens"):  # each rank's array is 0 outside its share
            setattr(self, name, world.sum_array(getattr(self, name)))

    def _headers(self, pair):
        """(list of headers of the image sidecars, header of the text sidecar) of a pair."""
        first = pair * self.sizes
        images = [self._image_header(i) for i in range(first, first + self.sizes)]
        if self.one_text and pair:
            return images, self.text_header
        packed = None if self.one_text else self._packed(first)
        return images, packed[0].header(packed[1], self.sizes) if packed else read_header(self.text_path(first))

    def _image_header(self, i):
        packed = self._packed(i)
        return packed[0].header(packed[1], i % self.sizes) if packed else read_header(self.image_path(i))


def _latent_shape(path, header):
    """Shape (C, h, w) of an image sidecar's latents; mirrored ones and other crops have the same, masks fit."""
    shape = check_tensor(path, header, "latent", 3)
    for name in header.shapes:
        expected = {"latent": shape, "latent_flip": shape, "mask": (1, *shape[1:])}.get(name.partition(".")[0])
        if expected is not None and check_tensor(path, header, name, 3) != expected:
            found = f"latent is {shape}, but {name} {header.shapes[name]}"
            raise ValueError(f"{path}: {found}; run the cache script again")
    return shape


def _overlaps(directory, others):
    """Whether a directory is the same as one of the others, or lies in it, or it in the directory."""
    real_path, *real_paths = (os.path.join(os.path.realpath(path), "") for path in (directory, *others))
    return any(real_path.startswith(other) or other.startswith(real_path) for other in real_paths)


def _warn_of_skipped_folder(folder, reason):
    warn(f"{folder}: {reason}; sidecars in this folder are not used")


def _read_multiple(path):
    content = read_bytes(path)
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as Windows' editors and shells write it
    text = content.decode("utf-16" if utf16 else "utf-8-sig", errors="replace").strip()
    try:
        return _MULTIPLE(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(
            f"{path}: {text[:40]!r}; expected one number {_MULTIPLE.range}: how often the images of this folder come "
            "up in an epoch"
        ) from error


def null_caption_path(directories: Iterable[str | os.PathLike], text_suffix: str) -> Path | None:
    """Path of the first `_null_caption` sidecar found in the data directories; None if there is none."""
    folders = ([directory, *shard_folders(directory, text_suffix)] for directory in directories)
    paths = (Path(folder) / (NULL_STEM + text_suffix) for of_directory in folders for folder in of_directory)
    return next((path for path in paths if path.exists()), None)


def check_same_run(
    first: Header, other: Header, first_path: str, other_path: str, *, may_differ: str | None = None
) -> None:
    """Checks that two sidecars were made by the same encoder with the same settings.

    Args:
        may_differ: a key of RUN_KEYS that is not compared.

    Raises:
        ValueError: the headers differ.
    """
    for key, a, b in zip(RUN_KEYS, first.run_identity, other.run_identity, strict=True):
        if a != b and key != may_differ:
            raise ValueError(
                f"mixed caches: {first_path} and {other_path} differ in {key}: {a or 'no header'} against "
                f"{b or 'no header'}; run the cache script again on all data directories"
            )


def _check_unchanged(path, was, now):
    """Checks the run_identity of a sidecar that is read again."""
    for key, a, b in zip(RUN_KEYS, was, now, strict=True):
        if a != b:
            raise SidecarError(f"{path}: replaced since the run started: {key} was {a or 'not given'}, is {b!r}")
