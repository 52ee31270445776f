"""An index of the pairs of a freeze file, of which nothing is read before it is needed."""

from __future__ import annotations

import json
import os
import zlib

import numpy as np

from cachetrain.data.folders import Folders
from cachetrain.data.freeze import Freeze
from cachetrain.data.index import PairIndex
from cachetrain.data.shard_set import ShardSet
from cachetrain.modeling.conditioning import check_text


class FrozenIndex(PairIndex):
    """The pairs that a freeze file lists. Memory and start-up do not depend on their number, but for the repeats of
    pairs that come up in different numbers.

    What PairIndex has in arrays of all samples is here read from the indexes of those shards that hold the samples
    asked for.

    Args:
        shard_set: with the shards of the freeze file.
        repeats: how often the pairs come up in an epoch, times what the shards say.
        every_size: as of PairIndex.

    Raises:
        ValueError: the repeats are out of range, or the captions of an unknown kind.
    """

    def __init__(self, freeze: Freeze, shard_set: ShardSet, repeats: float = 1.0, every_size: bool = False):
        common = freeze.common
        self.freeze = freeze
        *self.image_suffixes, self.text_suffix = common["suffixes"]
        self.image_suffixes = tuple(self.image_suffixes)
        self.sizes = len(self.image_suffixes)
        self.choices = 1 if every_size else self.sizes
        self.one_text, self.kohya_repeats = None, False
        self.directories = [shard_set.directory]
        shard_set.assume(freeze.rows, np.flatnonzero(freeze.unequal).tolist(), freeze.seals)
        self._sets, self._starts, self._positions = {0: shard_set}, [0], None
        self._stems = _Stems(shard_set)
        self.blocks = np.concatenate([[0], shard_set.ends]) * self.sizes
        self._weight = repeats
        self.repeats = np.broadcast_to(np.float32(repeats), len(self))
        if freeze.repeated.any():
            of_pairs = _Column(shard_set, "repeats", 1)[np.arange(self.num_pairs)]
            self.repeats = (of_pairs * np.float32(repeats)).repeat(self.sizes)
        self._check_repeats()
        self.shapes = [tuple(shape) for shape in common["shapes"]]
        self.shape_ids = _ShapeIds(shard_set, self.sizes, self.shapes)
        self.image_bytes = _Column(shard_set, "num_bytes", self.sizes)
        self.tokens = _Column(shard_set, "tokens", self.sizes, of_text=True)
        self.all_tokens = _Column(shard_set, "all_tokens", self.sizes, of_text=True)
        self.caption_sources, self.item_bytes = common["sources"], common["item_bytes"]
        self.image_headers = {self.image_path(size): freeze.header(size) for size in range(self.sizes)}
        self.image_header, self.text_header = freeze.header(0), freeze.header(self.sizes)
        _, self.text_widths = check_text(self.text_kind, self.text_path(0), self.text_header)
        self.num_masked = int(freeze.masks.sum())
        self.num_unpaired = self.num_without_image = self.num_without_pair = self.num_foreign = 0
        self.num_alone = self.num_pairs
        nothing = Folders(self.image_suffixes, self.text_suffix, False)
        self.links, self.numbered_folders = nothing.links, nothing.numbered_folders

    def subset(self, positions: np.ndarray) -> PairIndex:
        raise ValueError("a freeze file is trained on as a whole")

    def checksum(self) -> int:
        text = repr((self.freeze.file_name, self._weight, self.choices)) + json.dumps(self.freeze.common)
        return zlib.crc32(self.freeze.rows.tobytes(), zlib.crc32(text.encode()))

    def folders(self) -> list[str]:
        return list(self.directories)

    @property
    def varies(self) -> bool:
        if self.freeze.repeated.any():
            return super().varies
        return self.choices > 1 or self._weight != np.floor(self._weight)

    @property
    def num_with_variants(self) -> int:
        return int(self.freeze.variants.sum())

    @property
    def max_tokens(self) -> int:
        return int(self.freeze.longest.max())

    @property
    def num_tokens(self) -> int:
        return int(self.freeze.tokens.sum())

    @property
    def num_image_bytes(self) -> int:
        return int(self.freeze.image_bytes.sum())

    @property
    def counts(self) -> np.ndarray:
        return self.freeze.counts.sum(0, dtype=np.int64)

    @property
    def visits(self) -> np.ndarray:
        return self.freeze.visits.sum(0) * self._weight / self.choices

    def counts_of_blocks(self, weighted: bool) -> np.ndarray:
        return self.freeze.visits * self._weight if weighted else self.freeze.counts


class _Stems:
    """The paths of the pairs without a suffix, as PackedStrings has them."""

    def __init__(self, shard_set):
        self._set = shard_set

    def __len__(self):
        return int(self._set.ends[-1])

    def __getitem__(self, pair):
        return os.path.join(self._set.directory, self._set.name(pair))


class _Column:
    """An array [N] of the indexes; gives the values of the samples that are asked for.

    Args:
        name: of the array in the indexes.
        sizes: number of samples of a pair.
        of_text: of the text sidecar of a sample, not of its image sidecar.
    """

    def __init__(self, shard_set: ShardSet, name: str, sizes: int, of_text: bool = False):
        self._set, self._name, self._sizes, self._of_text = shard_set, name, sizes, of_text

    def __getitem__(self, samples: int | np.ndarray):
        if np.ndim(samples) == 0:
            return self[np.array([samples])][0]
        pairs, halves = np.divmod(samples, self._sizes)
        halves = np.full_like(halves, self._sizes) if self._of_text else halves
        found = None
        for half in np.unique(halves).tolist():
            of_half = np.flatnonzero(halves == half)
            for places, values, shard in self._set.of_rows(self._name, pairs[of_half], half):
                values = self._converted(values, shard)
                found = np.zeros(len(samples), values.dtype) if found is None else found
                found[of_half[places]] = values
        return np.zeros(0, np.int64) if found is None else found

    def _converted(self, values, shard):
        return values


class _ShapeIds(_Column):
    def __init__(self, shard_set, sizes, shapes):
        super().__init__(shard_set, "shape", sizes)
        self._places = {shape: place for place, shape in enumerate(shapes)}

    def _converted(self, values, shard):
        return np.array([self._places[tuple(shape)] for shape in shard.fields["shapes"]], np.uint16)[values]
