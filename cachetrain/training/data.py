"""Finished batches from sidecars: loading, scaling and every random draw happen here, in the loader's workers."""

from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cachetrain.modeling.t5_pipeline import pad_embeddings
from cachetrain.sidecar import read_sidecar
from cachetrain.training import draws
from cachetrain.training.objective import stratified, timestep_fraction


class CachedPairs(Dataset):
    """Samples keyed by (epoch, i): the same key gives the same tensors, whoever asks.

    Args:
        index: PairIndex.
        null_embedding: float32 [T, D], takes the caption's place with probability `cond_dropout`.
        scaling_factor, shift_factor: of the VAE: latents become (latent - shift) * scaling.
        text_scaling_factor: multiplies all embeddings.
        cond_dropout, flip_p: probabilities, per sample and visit.
        continuous: timestep is 1000 * sigma (flow matching), not an integer.
        timestep_sampling: of objective.timestep_fraction.
        timestep_range: (first, end) of the timesteps, within 0 and 1000.
        offset_noise: standard deviation of noise that is the same over all pixels of a channel, added to the noise
            (Guttenberg 2023, "Diffusion with offset noise").
    """

    def __init__(
        self, index, seed, null_embedding, scaling_factor, shift_factor=0.0, text_scaling_factor=1.0,
        cond_dropout=0.0, flip_p=0.0, continuous=False, timestep_sampling="uniform", timestep_range=(0, 1000),
        offset_noise=0.0,
    ):  # fmt: skip
        self.index, self.seed = index, seed
        self.null_embedding = null_embedding
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        self.text_scaling_factor = text_scaling_factor
        self.cond_dropout, self.flip_p = cond_dropout, flip_p
        self.continuous, self.timestep_sampling, self.timestep_range = continuous, timestep_sampling, timestep_range
        self.offset_noise = offset_noise

    def __len__(self):
        return len(self.index)

    def __getitem__(self, key):
        """Returns a dict: latents, noise float32 [C, h, w]; timestep; embedding float32 [T, D]; dropped; sample.

        Args:
            key: (epoch, i), or (epoch, i, the uniform number that decides the timestep).
        """
        epoch, i, *given = key
        dropped = self._chance(epoch, i, draws.DROPOUT) < self.cond_dropout
        embedding = self.null_embedding if dropped else read_sidecar(self.index.text_path(i))[0]["emb"].float()
        latents = self._latents(epoch, i)
        first, end = self.timestep_range
        uniform = given[0] if given else self._chance(epoch, i, draws.TIMESTEP)
        timestep = first + timestep_fraction(self.timestep_sampling, uniform) * (end - first)
        return {
            "latents": latents,
            "noise": torch.from_numpy(self._noise(epoch, i, latents.shape)),
            "timesteps": timestep if self.continuous else int(timestep),
            "embedding": embedding * self.text_scaling_factor,
            "dropped": dropped,
            "sample": i,
        }

    def _chance(self, epoch, i, purpose):
        return draws.generator(self.seed, epoch, i, purpose).random()

    def _noise(self, epoch, i, shape):
        noise = draws.generator(self.seed, epoch, i, draws.NOISE).standard_normal(shape, dtype=np.float32)
        if self.offset_noise:
            offset = draws.generator(self.seed, epoch, i, draws.OFFSET).standard_normal(shape[0], dtype=np.float32)
            noise += self.offset_noise * offset[:, None, None]
        return noise

    def _latents(self, epoch, i):
        tensors, _ = read_sidecar(self.index.image_path(i))
        name = "latent"
        if self.flip_p and self._chance(epoch, i, draws.FLIP) < self.flip_p:
            name = "latent_flip"
            if name not in tensors:
                raise ValueError(f"{self.index.image_path(i)}: holds no latent_flip for --flip_p; cache with --flip")
        return (tensors[name].float() - self.shift_factor) * self.scaling_factor


class Batches:
    """The endless sequence of batches of (epoch, i), cut at `num_batches`.

    Each epoch visits every sample once, in permutation(seed, epoch). A batch is of one latent shape; samples that do
    not fill one are carried into the next epoch, never dropped.

    Args:
        strata: number of batches that make one step, over which timesteps are to be stratified; 0: they are not.
    """

    def __init__(self, index, batch_size, seed, num_batches, strata=0):
        self.index, self.batch_size, self.seed, self.num_batches = index, batch_size, seed, num_batches
        self.strata = strata

    def __len__(self):
        return self.num_batches

    def __iter__(self):
        made, filling = 0, {}
        for epoch in count():
            for i in draws.permutation(self.seed, epoch, len(self.index)):
                bucket = filling.setdefault(self.index.shape_ids[i], [])
                bucket.append((epoch, int(i)))
                if len(bucket) < self.batch_size:
                    continue
                if made == self.num_batches:
                    return
                yield self._stratified(filling.pop(self.index.shape_ids[i]), made)
                made += 1

    def _stratified(self, batch, made):
        """Gives each sample of batch number `made` its part of the range of timesteps."""
        if not self.strata:
            return batch
        step, part = divmod(made, self.strata)
        offset = draws.generator(self.seed, 0, step, draws.STRATA).random()
        return [
            (epoch, i, stratified(offset, slot * self.strata + part, self.strata * self.batch_size))
            for slot, (epoch, i) in enumerate(batch)
        ]


def collate(samples, masked):
    """Stacks samples. `masked`: T5, pad and mask; else CLIP: every position is seen, as SD1.5 expects.

    Returns:
        dict: latents, noise float32 [B, C, h, w]; timesteps [B]; encoder_hidden_states float32 [B, T, D];
        encoder_attention_mask bool [B, T] or None; dropped bool [B]; samples int64 [B].
    """
    embeddings = [sample["embedding"] for sample in samples]
    hidden, mask = pad_embeddings(embeddings) if masked else (torch.stack(embeddings), None)
    return {
        "latents": torch.stack([sample["latents"] for sample in samples]),
        "noise": torch.stack([sample["noise"] for sample in samples]),
        "timesteps": torch.tensor([sample["timesteps"] for sample in samples]),
        "encoder_hidden_states": hidden,
        "encoder_attention_mask": mask,
        "dropped": torch.tensor([sample["dropped"] for sample in samples]),
        "samples": torch.tensor([sample["sample"] for sample in samples]),
    }


def make_loader(dataset, batches, masked, num_workers, pin_memory):
    """DataLoader whose workers deliver finished batches; it draws from no global generator."""
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=num_workers, pin_memory=pin_memory,
        collate_fn=_Collate(masked), prefetch_factor=4 if num_workers else None,
        generator=torch.Generator().manual_seed(0), persistent_workers=num_workers > 0,
    )  # fmt: skip


class _Collate:
    """`collate` with its flag bound; a class, so that spawned workers can pickle it."""

    def __init__(self, masked):
        self.masked = masked

    def __call__(self, samples):
        return collate(samples, self.masked)
