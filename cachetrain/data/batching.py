"""Which samples form which batch: an endless, seeded sequence that a rank or a resumed run can enter at any batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import torch

from cachetrain.data import rng
from cachetrain.data.dataset import SampleKey
from cachetrain.data.index import PairIndex
from cachetrain.data.order import EpochOrder, WindowOrder, table_of
from cachetrain.diffusion.objective import stratified
from cachetrain.modeling.conditioning import Conditioning

if TYPE_CHECKING:
    from cachetrain.data.near import Fetcher


class BatchSampler:
    """Yields batches of SampleKey; each rank gets its share of every batch.

    In an epoch every sample comes up as often as its `repeats` value says, in an order shuffled anew for each epoch
    (data/order.py); of several sizes of an image, one of them.
    All samples of a batch have the same latent shape, on all ranks; samples that do not fill a batch are carried over
    to the next epoch, never dropped.

    Args:
        index: the pairs to draw from.
        batch_size: samples per rank.
        seed: seed of the order.
        num_batches: length of the sequence.
        strata: number of batches per optimizer step, over which timesteps are stratified; 0: not stratified.
        rank, ranks: number of this rank, and number of ranks.
        first: number of the first batch to yield; above 0 in a resumed run.
        window: blocks of a lane that are mixed at a time, in WindowOrder; 0: all samples are, in EpochOrder.
        fetcher: is told which shards come up.

    Attributes:
        waiting: {shape id: number of samples whose batch is not full yet}, at the end of the sequence.
        trained: bool [N], the samples that have been in a batch.
    """

    def __init__(
        self,
        index: PairIndex,
        batch_size: int,
        seed: int,
        num_batches: int,
        *,
        strata: int = 0,
        rank: int = 0,
        ranks: int = 1,
        first: int = 0,
        window: int = 0,
        fetcher: Fetcher | None = None,
    ):
        self.index = index
        self.batch_size = batch_size
        self.seed = seed
        self.num_batches = num_batches
        self.strata = strata
        self.rank = rank
        self.ranks = ranks
        self.first = first
        self.order = WindowOrder(table_of(index), seed, window) if window else EpochOrder(index, seed)
        self.fetcher = fetcher
        self.waiting = {}
        self.trained = np.zeros(len(index), bool)

    def __len__(self) -> int:
        return self.num_batches - self.first

    def __iter__(self) -> Iterator[list[SampleKey]]:
        entry = self.order.entry(self.first, self.batch_size * self.ranks)
        num_made, filling, self.trained = entry.made, entry.waiting, self.order.trained(entry)
        for number in count(entry.chunk):
            self._plan(number)
            epoch, samples, repeats = self.order.chunk(number)
            if num_made < self.first:
                skipped, used = self._skip(epoch, samples, repeats, filling, self.first - num_made)
                num_made, samples, repeats = num_made + skipped, samples[used:], repeats[used:]
            shape_ids = self.index.shape_ids[samples].tolist()
            for sample, repeat, shape in zip(samples.tolist(), repeats.tolist(), shape_ids, strict=True):
                bucket = filling.setdefault(shape, [])
                bucket.append(SampleKey(epoch, sample, repeat))
                if len(bucket) < self.batch_size * self.ranks:
                    continue
                batch = filling.pop(shape)
                self.trained[[key.sample for key in batch]] = True
                num_made += 1
                if num_made == self.num_batches:
                    self.waiting = {shape: len(bucket) for shape, bucket in filling.items()}
                yield self._stratified(batch, num_made - 1)[self.rank :: self.ranks]
                if num_made == self.num_batches:
                    return

    def _plan(self, number):
        """Tells the fetcher which shards are read in a chunk and in the next one."""
        if self.fetcher:
            blocks = dict.fromkeys([*self.order.blocks_of(number), *self.order.blocks_of(number + 1)])
            self.fetcher.plan(list(self.index.shards_of(blocks)))

    def _skip(self, epoch, samples, repeats, filling, num_to_skip):
        """Skips up to `num_to_skip` batches of a chunk without building them.

        Args:
            epoch, samples, repeats: the chunk.
            filling: {shape id: list of SampleKey} of batches that are not full yet; updated.

        Returns:
            (number of batches skipped, number of samples of the chunk that were consumed).
        """
        size, shape_ids = self.batch_size * self.ranks, self.index.shape_ids[samples]
        positions_of_shape = {shape: np.flatnonzero(shape_ids == shape) for shape in np.unique(shape_ids).tolist()}
        ends = [
            positions[size - 1 - len(filling.get(shape, [])) :: size]
            for shape, positions in positions_of_shape.items()
        ]
        ends = np.sort(np.concatenate(ends)) if ends else np.zeros(0, np.int64)
        used = len(samples) if len(ends) < num_to_skip else int(ends[num_to_skip - 1]) + 1
        for shape, positions in positions_of_shape.items():
            positions, bucket = positions[: np.searchsorted(positions, used)], filling.pop(shape, [])
            waiting = (len(bucket) + len(positions)) % size
            if len(bucket) + len(positions) >= size:
                self.trained[[key.sample for key in bucket]] = True
                self.trained[samples[positions[: len(positions) - waiting]]] = True
                bucket, positions = [], positions[len(positions) - waiting :]
            bucket = bucket + [SampleKey(epoch, int(samples[i]), int(repeats[i])) for i in positions]
            if bucket:
                filling[shape] = bucket
        return min(len(ends), num_to_skip), used

    def _stratified(self, batch, number):
        """Assigns each sample of batch `number` a stratum of the timestep range."""
        if not self.strata:
            return batch
        step, part = divmod(number, self.strata)
        offset = rng.generator(self.seed, 0, step, rng.STRATA).random()
        return [
            key._replace(uniform=stratified(offset, slot * self.strata + part, self.strata * len(batch)))
            for slot, key in enumerate(batch)
        ]


def collate(samples: Sequence[dict], conditioning: Conditioning, multiple: int = 8) -> dict:
    """Stacks samples of CachedPairs into a batch.

    Args:
        multiple: text lengths are padded to a multiple of this, as in Conditioning.collate.

    Returns:
        dict: latents, noise float32 [B, C, h, w]; timesteps [B]; conditioning, the UNet's keyword arguments; dropped
        bool [B], True where the null caption is used; samples int64 [B], positions in the index; weights float32 [B],
        of the samples in the loss: 0 where a sample could not be read, else 1; faults, a list of (position in the
        index, reason) of those samples; waited_s, seconds that shards from object storage were waited for; mask
        float32 [B, 1, h, w], if the samples have masks.
    """
    return {
        "latents": torch.stack([sample["latents"] for sample in samples]),
        "noise": torch.stack([sample["noise"] for sample in samples]),
        "timesteps": torch.tensor([sample["timesteps"] for sample in samples]),
        "conditioning": conditioning.collate([sample["condition"] for sample in samples], multiple),
        "dropped": torch.tensor([sample["dropped"] for sample in samples]),
        "samples": torch.tensor([sample["sample"] for sample in samples]),
        "weights": torch.tensor([0.0 if sample["fault"] else 1.0 for sample in samples]),
        "waited_s": sum(sample["waited_s"] for sample in samples),
        "faults": [(sample["sample"], sample["fault"]) for sample in samples if sample["fault"]],
    } | ({"mask": torch.stack([sample["mask"] for sample in samples])} if "mask" in samples[0] else {})
