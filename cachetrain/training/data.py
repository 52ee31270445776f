"""Finished batches from sidecars: loading, scaling and every random draw happen here, in the loader's workers."""

from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from cachetrain.modeling.t5_pipeline import pad_embeddings
from cachetrain.sidecar import read_sidecar
from cachetrain.training import draws
from cachetrain.training.objective import stratified, timestep_fraction


class Visit(NamedTuple):
    """One visit to one sample: it determines every draw."""

    epoch: int
    sample: int
    repeat: int = 0  # which visit of the epoch
    uniform: float | None = None  # in [0, 1), decides the timestep; None: it is drawn


class Files:
    """Reads the sidecars of an index, verified each time."""

    def __init__(self, index):
        self.index = index

    def image(self, i):
        """Tensors by name."""
        return read_sidecar(self.index.image_path(i))[0]

    def text(self, i):
        return read_sidecar(self.index.text_path(i))[0]


class CachedPairs(Dataset):
    """Samples keyed by Visit: the same key gives the same tensors, whoever asks.

    Args:
        index: PairIndex.
        null_embedding: [T, D], takes the caption's place with probability `cond_dropout`.
        scaling_factor, shift_factor: of the VAE: latents become (latent - shift) * scaling.
        text_scaling_factor: multiplies all embeddings.
        cond_dropout, flip_p: probabilities, per sample and visit.
        continuous: timestep is 1000 * sigma (flow matching), not an integer.
        timestep_sampling: of objective.timestep_fraction.
        timestep_range: (first, end) of the timesteps, within 0 and 1000.
        offset_noise: standard deviation of noise that is the same over all pixels of a channel, added to the noise
            (Guttenberg 2023, "Diffusion with offset noise").
        text_dtype: of the embeddings. bfloat16 halves what is copied to a device that computes in it anyway.
        fixed: every visit to a sample draws what its first one drew (--overfit).
        store: Files or ram.RamCache of the index; default: Files.
    """

    def __init__(
        self, index, seed, null_embedding, scaling_factor, shift_factor=0.0, text_scaling_factor=1.0,
        cond_dropout=0.0, flip_p=0.0, continuous=False, timestep_sampling="uniform", timestep_range=(0, 1000),
        offset_noise=0.0, text_dtype=torch.float32, fixed=False, store=None,
    ):  # fmt: skip
        self.index, self.seed = index, seed
        self.null_embedding = null_embedding
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        self.text_scaling_factor = text_scaling_factor
        self.cond_dropout, self.flip_p = cond_dropout, flip_p
        self.continuous, self.timestep_sampling, self.timestep_range = continuous, timestep_sampling, timestep_range
        self.offset_noise, self.text_dtype, self.fixed = offset_noise, text_dtype, fixed
        self.store = store or Files(index)

    def __len__(self):
        return len(self.index)

    def __getitem__(self, visit):
        """Returns a dict: latents, noise float32 [C, h, w]; timestep; embedding [T, D]; dropped; sample."""
        if self.fixed:
            visit = visit._replace(epoch=0, repeat=0)
        dropped = self._chance(visit, draws.DROPOUT) < self.cond_dropout
        embedding = self.null_embedding if dropped else self.store.text(visit.sample)["emb"]
        latents = self._latents(visit)
        first, end = self.timestep_range
        uniform = self._chance(visit, draws.TIMESTEP) if visit.uniform is None else visit.uniform
        timestep = first + timestep_fraction(self.timestep_sampling, uniform) * (end - first)
        return {
            "latents": latents,
            "noise": torch.from_numpy(self._noise(visit, latents.shape)),
            "timesteps": timestep if self.continuous else int(timestep),
            "embedding": (embedding.float() * self.text_scaling_factor).to(self.text_dtype),
            "dropped": dropped,
            "sample": visit.sample,
        }

    def _generator(self, visit, purpose):
        return draws.generator(self.seed, visit.epoch, visit.sample, purpose, visit.repeat)

    def _chance(self, visit, purpose):
        return self._generator(visit, purpose).random()

    def _noise(self, visit, shape):
        noise = self._generator(visit, draws.NOISE).standard_normal(shape, dtype=np.float32)
        if self.offset_noise:
            offset = self._generator(visit, draws.OFFSET).standard_normal(shape[0], dtype=np.float32)
            noise += self.offset_noise * offset[:, None, None]
        return noise

    def _latents(self, visit):
        tensors = self.store.image(visit.sample)
        name = "latent"
        if self.flip_p and self._chance(visit, draws.FLIP) < self.flip_p:
            name = "latent_flip"
            if name not in tensors:
                path = self.index.image_path(visit.sample)
                raise ValueError(f"{path}: holds no latent_flip for --flip_p; cache with --flip")
        return (tensors[name].float() - self.shift_factor) * self.scaling_factor


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
            samples, repeats = draws.visits(self.seed, epoch, self.index.weights)
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
        offset = draws.generator(self.seed, 0, step, draws.STRATA).random()
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
