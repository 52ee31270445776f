"""Finished batches from sidecars: loading, scaling and every random draw happen here, in the loader's workers."""

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from cachetrain.data import rng
from cachetrain.data.sidecar import read_sidecar
from cachetrain.diffusion.objective import timestep_fraction


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
        dropped = self._chance(visit, rng.DROPOUT) < self.cond_dropout
        embedding = self.null_embedding if dropped else self.store.text(visit.sample)["emb"]
        latents = self._latents(visit)
        first, end = self.timestep_range
        uniform = self._chance(visit, rng.TIMESTEP) if visit.uniform is None else visit.uniform
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
        return rng.generator(self.seed, visit.epoch, visit.sample, purpose, visit.repeat)

    def _chance(self, visit, purpose):
        return self._generator(visit, purpose).random()

    def _noise(self, visit, shape):
        noise = self._generator(visit, rng.NOISE).standard_normal(shape, dtype=np.float32)
        if self.offset_noise:
            offset = self._generator(visit, rng.OFFSET).standard_normal(shape[0], dtype=np.float32)
            noise += self.offset_noise * offset[:, None, None]
        return noise

    def _latents(self, visit):
        tensors = self.store.image(visit.sample)
        name = "latent"
        if self.flip_p and self._chance(visit, rng.FLIP) < self.flip_p:
            name = "latent_flip"
            if name not in tensors:
                path = self.index.image_path(visit.sample)
                raise ValueError(f"{path}: holds no latent_flip for --flip_p; cache with --flip")
        return (tensors[name].float() - self.shift_factor) * self.scaling_factor
