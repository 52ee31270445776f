"""Which samples make which batch: an endless, seeded sequence that any rank and any resumed run can enter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch

from cachetrain.data import rng
from cachetrain.data.dataset import SampleKey
from cachetrain.data.index import PairIndex
from cachetrain.diffusion.objective import stratified
from cachetrain.modeling.conditioning import Conditioning


class BatchSampler:
    """The endless sequence of batches of SampleKey, cut at `num_batches`; each rank takes its part of every batch.

    In an epoch every sample comes up as often as its `repeats` say, in a permutation of that epoch. A batch is of one
    latent shape over all ranks; samples that do not fill one are carried into the next epoch, never dropped.

    Args:
        index: PairIndex.
        batch_size: of one rank.
        seed: of the order.
        num_batches: where the sequence ends.
        strata: number of batches that make one step, over which timesteps are to be stratified; 0: they are not.
        rank, ranks: this rank's number, and how many there are.
        first: number of the first batch to give: a resumed run starts in the middle of the sequence.

    Attributes:
        waiting: {shape id: number of samples that wait until their batch is full}.
        trained: bool [N], the samples that were in a batch.
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
    ):
        self.index = index
        self.batch_size = batch_size
        self.seed = seed
        self.num_batches = num_batches
        self.strata = strata
        self.rank = rank
        self.ranks = ranks
        self.first = first
        self.waiting = {}
        self.trained = np.zeros(len(index), bool)

    def __len__(self):
        return self.num_batches - self.first

    def __iter__(self):
        num_made, filling = 0, {}
        for epoch in count():
            samples, repeats = rng.epoch_order(self.seed, epoch, self.index.repeats)
            if num_made < self.first:
                skipped, used = self._skip(epoch, samples, repeats, filling, self.first - num_made)
                num_made, samples, repeats = num_made + skipped, samples[used:], repeats[used:]
            for sample, repeat in zip(samples, repeats, strict=True):
                bucket = filling.setdefault(self.index.shape_ids[sample], [])
                bucket.append(SampleKey(epoch, int(sample), int(repeat)))
                if len(bucket) < self.batch_size * self.ranks:
                    continue
                batch = filling.pop(self.index.shape_ids[sample])
                self.trained[[key.sample for key in batch]] = True
                num_made += 1
                if num_made == self.num_batches:
                    self.waiting = {int(shape): len(bucket) for shape, bucket in filling.items()}
                yield self._stratified(batch, num_made - 1)[self.rank :: self.ranks]
                if num_made == self.num_batches:
                    return

    def _skip(self, epoch, samples, repeats, filling, wanted):
        """Passes over up to `wanted` batches of an epoch without making them.

        Args:
            samples, repeats: int64 [M], the epoch in its order, as of rng.epoch_order.
            filling: {shape id: list of SampleKey} that wait for their batch; becomes what waits afterwards.

        Returns:
            (number of batches passed over, number of samples of the epoch that are used up).
        """
        size, shape_ids = self.batch_size * self.ranks, self.index.shape_ids[samples]
        places = {shape: np.flatnonzero(shape_ids == shape) for shape in np.unique(shape_ids)}
        ends = [of_shape[size - 1 - len(filling.get(shape, [])) :: size] for shape, of_shape in places.items()]
        ends = np.sort(np.concatenate(ends)) if ends else np.zeros(0, np.int64)
        used = len(samples) if len(ends) < wanted else int(ends[wanted - 1]) + 1
        for shape, of_shape in places.items():
            of_shape, bucket = of_shape[: np.searchsorted(of_shape, used)], filling.pop(shape, [])
            waiting = (len(bucket) + len(of_shape)) % size
            if len(bucket) + len(of_shape) >= size:
                self.trained[[key.sample for key in bucket]] = True
                self.trained[samples[of_shape[: len(of_shape) - waiting]]] = True
                bucket, of_shape = [], of_shape[len(of_shape) - waiting :]
            bucket = bucket + [SampleKey(epoch, int(samples[place]), int(repeats[place])) for place in of_shape]
            if bucket:
                filling[shape] = bucket
        return min(len(ends), wanted), used

    def _stratified(self, batch, number):
        """Gives each sample of batch `number` its part of the range of timesteps."""
        if not self.strata:
            return batch
        step, part = divmod(number, self.strata)
        offset = rng.generator(self.seed, 0, step, rng.STRATA).random()
        return [
            key._replace(uniform=stratified(offset, slot * self.strata + part, self.strata * len(batch)))
            for slot, key in enumerate(batch)
        ]


def collate(samples: Sequence[dict], conditioning: Conditioning, multiple: int = 8) -> dict:
    """Stacks samples of CachedPairs.

    Args:
        multiple: of text lengths, as for Conditioning.collate.

    Returns:
        dict: latents, noise float32 [B, C, h, w]; timesteps [B]; conditioning, the UNet's keyword arguments; dropped
        bool [B]; samples int64 [B], positions in the index.
    """
    return {
        "latents": torch.stack([sample["latents"] for sample in samples]),
        "noise": torch.stack([sample["noise"] for sample in samples]),
        "timesteps": torch.tensor([sample["timesteps"] for sample in samples]),
        "conditioning": conditioning.collate([sample["condition"] for sample in samples], multiple),
        "dropped": torch.tensor([sample["dropped"] for sample in samples]),
        "samples": torch.tensor([sample["sample"] for sample in samples]),
    }
