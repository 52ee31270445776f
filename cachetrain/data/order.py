"""In which order an epoch visits the samples: any order, or one that reads from few shards at a time.

Both are pure functions of the seed and the list of pairs; they know neither ranks nor workers. An order is a sequence
of chunks without end, each a part of one epoch or a whole one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cachetrain.data import rng
from cachetrain.data.dataset import SampleKey
from cachetrain.data.index import PairIndex

LANES = 32


class Entry(NamedTuple):
    """Where a sequence of batches is entered.

    Attributes:
        made: number of batches before the chunk.
        chunk: number of the chunk.
        waiting: {shape id: the visits before the chunk whose batch is not full yet, in order}.
    """

    made: int
    chunk: int
    waiting: dict[int, list[SampleKey]]


class EpochOrder:
    """Each epoch is a chunk, and a permutation of all its visits."""

    def __init__(self, index: PairIndex, seed: int):
        self._index = index
        self._seed = seed

    def chunk(self, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(epoch, samples, repeats) of a chunk, in order; see rng.epoch_order."""
        return number, *rng.epoch_order(self._seed, number, self._index.repeats, self._index.choices)

    def blocks_of(self, number: int) -> Sequence[int]:
        """The blocks that a chunk visits."""
        return range(len(self._index.blocks) - 1)

    def entry(self, first: int, size: int) -> Entry:
        """The latest chunk from which batch `first` is found without the chunks before it, for batches of `size`."""
        return Entry(0, 0, {})

    def trained(self, entry: Entry) -> np.ndarray:
        """bool [N], the samples that have been in a batch before the chunk of an Entry."""
        return np.zeros(len(self._index), bool)


class Table(NamedTuple):
    """What WindowOrder knows of the samples, which lie in B blocks.

    Attributes:
        starts: int64 [B + 1], the first sample of each block, and the number of samples.
        histogram: int64 [B, shapes], how often samples of each latent shape come up in an epoch; if `drawn`, 0 only
            where there are none.
        shape_ids: gives the shape ids of an array of samples, as an array does.
        repeats: float32 [N], as of PairIndex.
        choices: as of PairIndex.
        drawn: whether the numbers in the histogram differ from epoch to epoch.
    """

    starts: np.ndarray
    histogram: np.ndarray
    shape_ids: np.ndarray
    repeats: np.ndarray
    choices: int = 1
    drawn: bool = False


def table_of(index: PairIndex) -> Table:
    """Counts the shapes in each block of an index."""
    histogram = index.counts_of_blocks(weighted=not index.varies).astype(np.int64)
    return Table(index.blocks, histogram, index.shape_ids, index.repeats, index.choices, index.varies)


class WindowOrder:
    """A chunk is a round, in which each lane visits the samples of `window` blocks, in an order of its own.

    For each epoch the blocks are permuted and dealt to LANES lanes. In a round, the visits of the lanes are spread
    evenly over its length, so that up to LANES x window blocks are read from at a time. A pair comes up as often as
    in EpochOrder; all of its visits of an epoch are in one round.
    """

    def __init__(self, table: Table, seed: int, window: int):
        self._table = table
        self._seed = seed
        self._span = LANES * window  # blocks of a round
        self._rounds = -(-len(table.histogram) // self._span)  # of an epoch
        self._permuted = -1, None  # (epoch, its blocks in order)

    def chunk(self, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Like EpochOrder.chunk."""
        epoch, round_ = divmod(number, self._rounds)
        return epoch, *self._mixed(epoch, round_, range(LANES))

    def blocks_of(self, number: int) -> Sequence[int]:
        """Like EpochOrder.blocks_of."""
        epoch, round_ = divmod(number, self._rounds)
        return self._blocks(epoch)[round_ * self._span : (round_ + 1) * self._span].tolist()

    def entry(self, first: int, size: int) -> Entry:
        """Like EpochOrder.entry; from the histogram, and visits of the last rounds only."""
        epoch, before = 0, np.zeros(self._table.histogram.shape[1], np.int64)
        while True:
            after = before + np.cumsum(self._visits_of_rounds(epoch), 0)
            made = (after // size).sum(1)
            if made[-1] > first:
                break
            epoch, before = epoch + 1, after[-1]
        round_ = int(np.searchsorted(made, first, side="right"))
        before = after[round_ - 1] if round_ else before
        chunk = epoch * self._rounds + round_
        return Entry(int((before // size).sum()), chunk, self._last_visits(chunk, before % size))

    def trained(self, entry: Entry) -> np.ndarray:
        """Like EpochOrder.trained."""
        starts, (epoch, round_) = self._table.starts, divmod(entry.chunk, self._rounds)
        epochs = np.full(len(starts) - 1, epoch)  # that have visited each block
        epochs[self._blocks(epoch)[: round_ * self._span]] += 1
        trained = np.repeat(epochs > 0, np.diff(starts))
        np.logical_and(trained, self._table.repeats, out=trained)
        waiting = np.sort(np.array([key.sample for keys in entry.waiting.values() for key in keys], np.int64))
        of_waiting = np.unique(np.searchsorted(starts, waiting, side="right") - 1)
        for block in np.flatnonzero(epochs) if self._table.drawn else of_waiting:
            start, end = starts[block : block + 2]
            of_block = waiting[slice(*np.searchsorted(waiting, (start, end)))] - start
            num_waiting = np.bincount(of_block, minlength=end - start)
            trained[start:end] = self._times(block, epochs[block]) > num_waiting
        return trained

    def _blocks(self, epoch):
        if self._permuted[0] != epoch:
            self._permuted = epoch, rng.permutation(self._seed, epoch, len(self._table.histogram))
        return self._permuted[1]

    def _lane(self, epoch, round_, lane):
        """The blocks that a lane visits in a round."""
        return self._blocks(epoch)[round_ * self._span : (round_ + 1) * self._span][lane::LANES]

    def _visits(self, epoch, block):
        """(samples, repeats) of the visits to a block, sorted by pair."""
        start, end = self._table.starts[block : block + 2]
        choices = self._table.choices
        repeats = self._table.repeats[start:end:choices]
        pairs, numbers = rng.visits(self._seed, epoch, repeats, int(start) // choices)
        if choices == 1:
            return pairs, numbers
        drawn = rng.generator(self._seed, epoch, int(block), rng.SIZE).random(len(pairs))
        return pairs * choices + (drawn * choices).astype(np.int64), numbers

    def _mixed(self, epoch, round_, lanes):
        """(samples, repeats) of the visits of some lanes in a round, in the order that they have among all lanes."""
        samples, numbers, places = [], [], []
        for lane in lanes:
            visits = [self._visits(epoch, block) for block in self._lane(epoch, round_, lane)]
            if not visits:
                continue
            of_lane = [np.concatenate(arrays) for arrays in zip(*visits, strict=True)]
            generator = rng.generator(self._seed, epoch, 1 + round_ * LANES + lane, rng.ORDER)
            order = generator.permutation(len(of_lane[0]))
            samples.append(of_lane[0][order])
            numbers.append(of_lane[1][order])
            places.append((np.arange(len(order)) + 0.5) / len(order))
        order = np.argsort(np.concatenate(places), kind="stable")  # of visits at one place, the first lane's is first
        return np.concatenate(samples)[order], np.concatenate(numbers)[order]

    def _visits_of_rounds(self, epoch):
        """int64 [rounds, shapes], the number of visits to samples of each shape in each round of an epoch."""
        counts = self._table.histogram
        if self._table.drawn:
            visited = (self._visits(epoch, block)[0] for block in range(len(counts)))
            counts = [np.bincount(self._table.shape_ids[samples], minlength=counts.shape[1]) for samples in visited]
            counts = np.array(counts, np.int64)
        return np.add.reduceat(counts[self._blocks(epoch)], np.arange(0, len(counts), self._span), 0)

    def _last_visits(self, chunk, numbers):
        """{shape id: list of SampleKey}, the last visits before a chunk, so many of each shape as `numbers` says."""
        found, missing = {}, numbers.copy()
        while missing.any():
            chunk -= 1
            epoch, round_ = divmod(chunk, self._rounds)
            blocks = self._blocks(epoch)[round_ * self._span : (round_ + 1) * self._span]
            holding = np.flatnonzero(self._table.histogram[blocks][:, missing > 0].any(1))
            if not len(holding):
                continue
            lanes = np.unique(holding % LANES).tolist()
            samples, repeats = self._mixed(epoch, round_, lanes)
            shape_ids = self._table.shape_ids[samples]
            for shape in np.flatnonzero(missing).tolist():
                places = np.flatnonzero(shape_ids == shape)[-missing[shape] :].tolist()
                keys = [SampleKey(epoch, int(samples[i]), int(repeats[i])) for i in places]
                found[shape] = keys + found.get(shape, [])
                missing[shape] -= len(places)
        return {shape: keys for shape, keys in found.items() if keys}

    def _times(self, block, epochs):
        """int64 array, how often each sample of a block has come up in the first epochs."""
        start, end = self._table.starts[block : block + 2]
        if not self._table.drawn:
            return self._table.repeats[start:end].astype(np.int64) * epochs
        visited = [self._visits(epoch, block)[0] - start for epoch in range(epochs)]
        return np.bincount(np.concatenate(visited), minlength=end - start)
