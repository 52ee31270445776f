"""Checks the headers of sidecars against each other, and reads those of all pairs of a PairIndex."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from cachetrain.data.many_files import in_threads
from cachetrain.data.shard_set import Columns
from cachetrain.data.sidecar import RUN_KEYS, Header, SidecarError
from cachetrain.data.variants import sources_of
from cachetrain.log import counted
from cachetrain.modeling.conditioning import check_tensor, check_text

if TYPE_CHECKING:
    from cachetrain.data.index import PairIndex
    from cachetrain.distributed import World


class Contents:
    """What the headers of an index's sidecars say; `read` fills it.

    Args:
        index: with the headers of the first pairs, but without contents.

    Attributes:
        shapes, shape_ids, image_bytes, tokens, all_tokens, caption_sources, num_foreign, num_masked: as of PairIndex.
    """

    def __init__(self, index: PairIndex):
        self.num_foreign = self.num_masked = 0
        self.shape_ids = np.zeros(len(index), np.uint16)
        self.image_bytes = np.zeros(len(index), np.uint32)
        self.tokens = np.zeros(len(index), np.uint16)
        self.all_tokens = np.zeros(len(index), np.uint32)
        self.shapes = []
        self.caption_sources = []
        self._index = index
        self._shapes = {}  # latent shape -> its place in `shapes`
        self._sources = set()

    def read(self, sets: dict[int, Columns], world: World | None) -> None:
        """Reads and checks all headers.

        Args:
            sets: number of a directory that is a shard set -> what its indexes say; emptied, to free the memory.
            world: the ranks that read together; None: this process reads all.

        Raises:
            ValueError: caches are unreadable, of the wrong shape, or mixed (the message names two files that differ),
                or the ranks list different pairs.
        """
        rank, ranks = (world.rank, world.ranks) if world else (0, 1)
        shares = [span[(rank - span.start) % ranks :: ranks] for span in self._index.spans]
        num_files = sum(len(share) for number, share in enumerate(shares) if number not in sets)
        with tqdm(desc="headers", total=num_files, unit="pair", disable=None if not rank else 1) as progress:
            for number, share in enumerate(shares):
                if number in sets:
                    self._add_set(number, share, sets.pop(number))
                    continue
                for pair, (images, text) in in_threads(self._index.headers_of, share):
                    self._add_pair(pair, images, text)
                    progress.update()
        self.shapes = list(self._shapes)
        self.caption_sources = sorted(self._sources)
        if ranks > 1:
            self._merge(world)

    def _add_pair(self, pair, images, text):
        """Checks the headers of a pair of sidecars, and adds what they say."""
        index, i = self._index, pair * self._index.sizes
        for sample, image in enumerate(images, start=i):
            path, first = index.image_path(sample), index.first_like(sample)
            if image.run_identity != index.image_headers[first].run_identity:
                check_same_run(index.image_headers[first], image, first, path)
            shape = latent_shape(path, image)
            self.shape_ids[sample] = self._shapes.setdefault(shape, len(self._shapes))
            self.image_bytes[sample] = image.num_bytes
            self.num_masked += "mask" in image.shapes
        if text.run_identity != index.text_header.run_identity:
            check_same_run(index.text_header, text, index.text_path(0), index.text_path(i))
        lengths, widths = check_text(index.text_kind, index.text_path(i), text)
        self.tokens[i : i + index.sizes], self.all_tokens[i : i + index.sizes] = max(lengths), sum(lengths)
        if len(lengths) > 1:
            self._sources.update(sources_of(index.text_path(i), text.metadata, len(lengths)))
        self._check_widths(i, widths)
        self.num_foreign += text.foreign or any(image.foreign for image in images)

    def _add_set(self, number, share, columns):
        """Checks what the indexes of a shard set say, and adds what they say of some of its pairs.

        Args:
            number: of the directory.
            share: range of pairs.
            columns: Columns.
        """
        index, start = self._index, self._index.spans[number].start
        pairs = np.arange(share.start, share.stop, share.step)
        samples, of_set = index.samples_of(pairs), index.samples_of(pairs - start)
        ids = np.array([self._shapes.setdefault(shape, len(self._shapes)) for shape in columns.shapes], np.uint16)
        self.shape_ids[samples] = ids[columns.shape_ids[of_set]]
        self.image_bytes[samples] = columns.image_bytes[of_set]
        self.num_masked += int(columns.masked[of_set].sum())
        self._sources.update(columns.sources)
        if index.one_text:
            lengths, widths = check_text(index.text_kind, index.one_text, index.text_header)
            self.tokens[samples], self.all_tokens[samples] = max(lengths), sum(lengths)
        else:
            widths = columns.widths
            self.tokens[samples] = columns.tokens[pairs - start].repeat(index.sizes)
            self.all_tokens[samples] = columns.all_tokens[pairs - start].repeat(index.sizes)
            first = start * index.sizes
            check_same_run(index.text_header, index.headers_of(start)[1], index.text_path(0), index.text_path(first))
        self._check_widths(start * index.sizes, widths)

    def _check_widths(self, i, widths):
        index = self._index
        if widths != index.text_widths:
            raise ValueError(
                f"{index.text_path(i)}: has tensors of width {widths}, {index.text_path(0)} of {index.text_widths}; "
                "encode both with the same model"
            )

    def _merge(self, world):
        """Combines the headers read by all ranks; checks that all ranks list the same pairs."""
        index = self._index
        paths = index.num_pairs, index.stem(0), index.stems_checksum()
        summary = (*paths, self.shapes, self.caption_sources, np.array((self.num_foreign, self.num_masked)))
        summaries = world.gather(summary)
        if len({(number, first, checksum) for number, first, checksum, *_ in summaries}) > 1:
            listed = "; ".join(f"{counted(number, 'pair')}, the first {first}" for number, first, *_ in summaries)
            raise ValueError(f"the ranks list different pairs: {listed}; wait until the cache scripts are done")
        shapes = sorted({shape for _, _, _, shapes_of_rank, *_ in summaries for shape in shapes_of_rank})
        share = index.samples_of(np.arange(world.rank, index.num_pairs, world.ranks))
        new_ids = np.array([shapes.index(shape) for shape in self.shapes] or [0], np.uint16)
        self.shape_ids[share] = new_ids[self.shape_ids[share]]
        self.shapes = shapes
        self.caption_sources = sorted({source for *_, sources, _ in summaries for source in sources})
        self.num_foreign, self.num_masked = sum(counts for *_, counts in summaries).tolist()
        for name in ("shape_ids", "image_bytes", "tokens", "all_tokens"):  # each rank's array is 0 outside its share
            setattr(self, name, world.sum_array(getattr(self, name)))


def latent_shape(path: str, header: Header) -> tuple[int, ...]:
    """Shape (C, h, w) of an image sidecar's latents; mirrored ones and other crops have the same, masks fit.

    Raises:
        ValueError: they do not.
    """
    shape = check_tensor(path, header, "latent", 3)
    for name in header.shapes:
        expected = {"latent": shape, "latent_flip": shape, "mask": (1, *shape[1:])}.get(name.partition(".")[0])
        if expected is not None and check_tensor(path, header, name, 3) != expected:
            found = f"latent is {shape}, but {name} {header.shapes[name]}"
            raise ValueError(f"{path}: {found}; run the cache script again")
    return shape


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


def check_unchanged(path: str, was: tuple[str, ...], now: tuple[str, ...]) -> None:
    """Checks the run_identity of a sidecar that is read again.

    Raises:
        SidecarError: it differs.
    """
    for key, a, b in zip(RUN_KEYS, was, now, strict=True):
        if a != b:
            raise SidecarError(f"{path}: replaced since the run started: {key} was {a or 'not given'}, is {b!r}")
