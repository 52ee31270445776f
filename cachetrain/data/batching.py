"""Which samples make which batch: an endless, seeded sequence that any rank and any resumed run can enter."""

from itertools import count

import numpy as np
import torch

from cachetrain.data import rng
from cachetrain.data.dataset import Visit
from cachetrain.diffusion.objective import stratified
from cachetrain.modeling.t5_pipeline import pad_embeddings


class Batches:
    """The endless sequence of batches of Visit, cut at `num_batches`; each rank takes its part of every batch.

    An epoch visits every sample as often as its weight says, in a permutation of its own. A batch is of one latent
    shape over all ranks; samples that do not fill one are carried into the next epoch, never dropped.

    Args:
        index: PairIndex.
        batch_size: of one rank.
        strata: number of batches that make one step, over which timesteps are to be stratified; 0: they are not.
        first: number of the first batch to give: a resumed run goes on in the middle of the sequence.

    Attributes:
        waiting: {shape id: number of samples that wait until their batch is full}.
        seen: bool [N], the samples that were in a batch.
    """

    def __init__(self, index, batch_size, seed, num_batches, strata=0, rank=0, ranks=1, first=0):
        self.index, self.batch_size, self.seed, self.num_batches = index, batch_size, seed, num_batches
        self.strata, self.rank, self.ranks, self.first = strata, rank, ranks, first
        self.waiting, self.seen = {}, np.zeros(len(index), bool)

    def __len__(self):
        return self.num_batches - self.first

    def __iter__(self):
        made, filling = 0, {}
        for epoch in count():
            samples, repeats = rng.visits(self.seed, epoch, self.index.weights)
            if made < self.first:
                skipped, place = self._skip(epoch, samples, repeats, filling, self.first - made)
                made, samples, repeats = made + skipped, samples[place:], repeats[place:]
            for sample, repeat in zip(samples, repeats, strict=True):
                bucket = filling.setdefault(self.index.shape_ids[sample], [])
                bucket.append(Visit(epoch, int(sample), int(repeat)))
                if len(bucket) < self.batch_size * self.ranks:
                    continue
                full = filling.pop(self.index.shape_ids[sample])
                self.seen[[visit.sample for visit in full]] = True
                made += 1
                if made == self.num_batches:
                    self.waiting = {int(shape): len(bucket) for shape, bucket in filling.items()}
                yield self._stratified(full, made - 1)[self.rank :: self.ranks]
                if made == self.num_batches:
                    return

    def _skip(self, epoch, samples, repeats, filling, wanted):
        """Passes over up to `wanted` batches of an epoch without making them.

        Args:
            samples, repeats: int64 [M], the visits of the epoch in their order.
            filling: {shape id: list of Visit} that wait for their batch; becomes what waits afterwards.

        Returns:
            (number of batches passed over, number of visits that are used up).
        """
        size, shape_ids = self.batch_size * self.ranks, self.index.shape_ids[samples]
        places = {shape: np.flatnonzero(shape_ids == shape) for shape in np.unique(shape_ids)}
        ends = [own[size - 1 - len(filling.get(shape, [])) :: size] for shape, own in places.items()]
        ends = np.sort(np.concatenate(ends)) if ends else np.zeros(0, np.int64)
        used = len(samples) if len(ends) < wanted else int(ends[wanted - 1]) + 1
        for shape, own in places.items():
            own, bucket = own[: np.searchsorted(own, used)], filling.pop(shape, [])
            waiting = (len(bucket) + len(own)) % size
            if len(bucket) + len(own) >= size:
                self.seen[[visit.sample for visit in bucket]] = True
                self.seen[samples[own[: len(own) - waiting]]] = True
                bucket, own = [], own[len(own) - waiting :]
            bucket = bucket + [Visit(epoch, int(samples[place]), int(repeats[place])) for place in own]
            if bucket:
                filling[shape] = bucket
        return min(len(ends), wanted), used

    def _stratified(self, batch, made):
        """Gives each sample of batch number `made` its part of the range of timesteps."""
        if not self.strata:
            return batch
        step, part = divmod(made, self.strata)
        offset = rng.generator(self.seed, 0, step, rng.STRATA).random()
        return [
            visit._replace(uniform=stratified(offset, slot * self.strata + part, self.strata * len(batch)))
            for slot, visit in enumerate(batch)
        ]


def collate(samples, masked, multiple=8):
    """Stacks samples. `masked`: T5, pad to a multiple and mask; else CLIP: every position is seen, as SD1.5 expects.

    Returns:
        dict: latents, noise float32 [B, C, h, w]; timesteps [B]; encoder_hidden_states [B, T, D];
        encoder_attention_mask bool [B, T] or None; dropped bool [B]; samples int64 [B].
    """
    embeddings = [sample["embedding"] for sample in samples]
    hidden, mask = pad_embeddings(embeddings, multiple) if masked else (torch.stack(embeddings), None)
    return {
        "latents": torch.stack([sample["latents"] for sample in samples]),
        "noise": torch.stack([sample["noise"] for sample in samples]),
        "timesteps": torch.tensor([sample["timesteps"] for sample in samples]),
        "encoder_hidden_states": hidden,
        "encoder_attention_mask": mask,
        "dropped": torch.tensor([sample["dropped"] for sample in samples]),
        "samples": torch.tensor([sample["sample"] for sample in samples]),
    }
