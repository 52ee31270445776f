"""Checks the headers of sidecars against each other, and reads those of all pairs of a PairIndex."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from cachetrain.data.many_files import in_threads
from cachetrain.data.shard_set import Columns
from cachetrain.data.sidecar import RUN_KEYS, Header, SidecarError
from cachetrain.data.variants import sources_of
from cachetrain.log import counted, warn
from cachetrain.modeling.conditioning import check_tensor, check_text

if TYPE_CHECKING:
    from cachetrain.data.index import PairIndex
    from cachetrain.data.saved_index import Known
    from cachetrain.distributed import World


# The arrays of Contents with an element for each sample, or each pair.
OF_SAMPLES = {"shape_ids": np.uint16, "image_bytes": np.uint32, "masked": np.uint8}
OF_PAIRS = {"tokens": np.uint16, "all_tokens": np.uint32, "source_ids": np.uint16, "foreign": np.uint8}


class Contents:
    """What the headers of an index's sidecars say; `read` fills it.

    Args:
        index: with the headers of the first pairs, but without contents.

    Attributes:
        shapes, shape_ids, image_bytes, tokens, all_tokens: as of PairIndex, but tokens and all_tokens of pairs, not
            samples.
        masked: uint8 [N], whether an image sidecar has a mask.
        sources: distinct tuples of suffixes of the files that the variants of a caption come from, () without.
        source_ids: uint16, of each pair the place in this list.
        foreign: uint8, of each pair which sidecars have no cachetrain header: 1 of the images, 2 that of the text.
    """

    def __init__(self, index: PairIndex):
        for of_all, count in ((OF_SAMPLES, len(index)), (OF_PAIRS, index.num_pairs)):
            for name, dtype in of_all.items():
                setattr(self, name, np.zeros(count, dtype))
        self.shapes, self.sources = [], []
        self._index = index
        self._shapes, self._sources = {}, {(): 0}  # value -> its place in the list

    def read(self, sets: dict[int, Columns], known: dict[int, tuple[Known, np.ndarray]], world: World | None) -> None:
        """Reads and checks all headers that are not known.

        Args:
            sets: number of a directory that is a shard set -> what its indexes say; emptied, to free the memory.
            known: number of a directory -> (what its index file says, of each pair the place in it or -1); emptied.
            world: the ranks that read together; None: this process reads all.

        Raises:
            ValueError: caches are unreadable, of the wrong shape, or mixed (the message names two files that differ),
                or the ranks list different pairs.
        """
        rank, ranks = (world.rank, world.ranks) if world else (0, 1)
        shares = []
        for number, span in enumerate(self._index.spans):
            share = span[(rank - span.start) % ranks :: ranks]
            if number in sets:
                self._add_set(number, share, sets.pop(number))
            else:
                shares.append(self._add_known(number, share, *known.pop(number)) if number in known else share)
        total = sum(map(len, shares))
        with tqdm(desc="headers", total=total, unit="pair", disable=None if not rank and total else True) as progress:
            for share in shares:
                for pair, (images, text) in in_threads(self._index.headers_of, share):
                    self._add_pair(int(pair), images, text)
                    progress.update()
        if ranks > 1:
            self._merge(world)
        else:
            self._order()

    def _add_pair(self, pair, images, text):
        """Checks the headers of a pair of sidecars, and adds what they say."""
        index, i = self._index, pair * self._index.sizes
        for sample, image in enumerate(images, start=i):
            path, first = index.image_path(sample), index.first_like(sample)
            if image.run_identity != index.image_headers[first].run_identity:
                check_same_run(index.image_headers[first], image, first, path)
            self.shape_ids[sample] = _place(self._shapes, latent_shape(path, image))
            self.image_bytes[sample] = image.num_bytes
            self.masked[sample] = "mask" in image.shapes
        if text.run_identity != index.text_header.run_identity:
            check_same_run(index.text_header, text, index.text_path(0), index.text_path(i))
        self._add_text(pair, index.text_path(i), text)
        self.foreign[pair] |= any(image.foreign for image in images)

    def _add_text(self, pairs, path, header):
        """Checks the header of the text sidecar of some pairs, a number or an array, and adds what it says."""
        lengths, widths = check_text(self._index.text_kind, path, header)
        self._check_widths(path, widths)
        sources = sources_of(path, header.metadata, len(lengths)) if len(lengths) > 1 else ()
        self.tokens[pairs], self.all_tokens[pairs] = max(lengths), sum(lengths)
        self.source_ids[pairs] = _place(self._sources, tuple(sorted(sources)))
        self.foreign[pairs] |= 2 * header.foreign

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
        ids = np.array([_place(self._shapes, shape) for shape in columns.shapes], np.uint16)
        self.shape_ids[samples] = ids[columns.shape_ids[of_set]]
        self.image_bytes[samples] = columns.image_bytes[of_set]
        self.masked[samples] = columns.masked[of_set]
        if index.one_text:
            self._add_text(pairs, index.one_text, index.text_header)
        else:
            self.tokens[pairs] = columns.tokens[pairs - start]
            self.all_tokens[pairs] = columns.all_tokens[pairs - start]
            self.source_ids[pairs] = _place(self._sources, tuple(sorted(columns.sources)))
            path = index.text_path(start * index.sizes)
            check_same_run(index.text_header, index.headers_of(start)[1], index.text_path(0), path)
            self._check_widths(path, columns.widths)

    def _add_known(self, number, share, known, places):
        """Adds what an index file says of some pairs; returns those of them whose headers have to be read.

        Args:
            number: of the directory.
            share: range of pairs.
            known: Known.
            places: int array, of each pair of the directory the place in the file or -1.
        """
        index, span = self._index, self._index.spans[number]
        if not known.fits(index, number):
            warn(
                f"{index.directories[number]}: its index file is of sidecars made with another model or other "
                f"settings than {index.image_path(span.start * index.sizes)} and {index.text_path(0)}; all headers "
                "are read"
            )
            return share
        pairs = np.arange(share.start, share.stop, share.step)
        places = places[pairs - span.start]
        found, places = pairs[places >= 0], places[places >= 0]
        samples, of_file = index.samples_of(found), index.samples_of(places)
        shapes = np.array([_place(self._shapes, shape) for shape in known.shapes] or [0], np.uint16)
        self.shape_ids[samples] = shapes[known.shape_ids[of_file]]
        self.image_bytes[samples] = known.image_bytes[of_file]
        self.masked[samples] = known.masked[of_file]
        self.foreign[found] = known.foreign[places]
        if index.one_text:
            self.foreign[found] &= 1
            self._add_text(found, index.one_text, index.text_header)
        else:
            sources = np.array([_place(self._sources, one) for one in known.sources], np.uint16)
            self.source_ids[found] = sources[known.source_ids[places]]
            self.tokens[found], self.all_tokens[found] = known.tokens[places], known.all_tokens[places]
        return np.setdiff1d(pairs, found, assume_unique=True)

    def _check_widths(self, path, widths):
        index = self._index
        if widths != index.text_widths:
            raise ValueError(
                f"{path}: has tensors of width {widths}, {index.text_path(0)} of {index.text_widths}; "
                "encode both with the same model"
            )

    def _order(self):
        """Numbers shapes in the order in which pairs have them, wherever their headers come from."""
        self.shapes, self.sources = _present(self._shapes, self.shape_ids), _present(self._sources, self.source_ids)
        self.shape_ids = _places(self._shapes, self.shapes)[self.shape_ids]
        self.source_ids = _places(self._sources, self.sources)[self.source_ids]

    def _merge(self, world):
        """Combines the headers read by all ranks; checks that all ranks list the same pairs."""
        index = self._index
        pairs = np.arange(world.rank, index.num_pairs, world.ranks)
        samples, paths = index.samples_of(pairs), (index.num_pairs, index.stem(0), index.stems_checksum())
        own = _present(self._shapes, self.shape_ids[samples]), _present(self._sources, self.source_ids[pairs])
        summaries = world.gather((*paths, *own))
        if len({(number, first, checksum) for number, first, checksum, *_ in summaries}) > 1:
            listed = "; ".join(f"{counted(number, 'pair')}, the first {first}" for number, first, *_ in summaries)
            raise ValueError(f"the ranks list different pairs: {listed}; wait until the cache scripts are done")
        self.shapes = sorted({shape for *_, shapes_of_rank, _ in summaries for shape in shapes_of_rank})
        self.sources = sorted({source for *_, sources in summaries for source in sources})
        self.shape_ids[samples] = _places(self._shapes, self.shapes)[self.shape_ids[samples]]
        self.source_ids[pairs] = _places(self._sources, self.sources)[self.source_ids[pairs]]
        for name in (*OF_SAMPLES, *OF_PAIRS):  # each rank's array is 0 outside its share
            setattr(self, name, world.sum_array(getattr(self, name)))


def _place(places, value):
    """The place of a value in a list, of which `places` is {value: its place}; appends it if need be."""
    return places.setdefault(value, len(places))


def _present(places, ids):
    """The values of {value: its place} whose places are in an array, in the order in which they come up."""
    present, first = np.unique(ids, return_index=True)
    values = list(places)
    return [values[place] for place in present[np.argsort(first)]]


def _places(values, others):
    """uint16 array: of each value its place in the other list, or 0."""
    place_of = {other: place for place, other in enumerate(others)}
    return np.array([place_of.get(value, 0) for value in values] or [0], np.uint16)


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
            raise SidecarError(f"{path}: replaced since it was listed: {key} was {a or 'not given'}, is {b!r}")
