"""Turns sidecars into training samples: loading, scaling and all random draws, in the loader's workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from cachetrain.data import rng
from cachetrain.data.index import PairIndex
from cachetrain.data.sidecar import num_crops, numbered, of_crop
from cachetrain.data.variants import draw_variant, sources_of
from cachetrain.diffusion.objective import timestep_fraction
from cachetrain.modeling.conditioning import Conditioning, num_variants
from cachetrain.modeling.normalisation import LatentScaling


class SampleKey(NamedTuple):
    """Identifies one visit of a sample; with the seed, the key determines all random draws.

    Attributes:
        epoch: from 0.
        sample: position of the pair in the index.
        repeat: how often the sample has come up in this epoch, from 0.
        uniform: number in [0, 1) that sets the timestep; None: drawn at random.
    """

    epoch: int
    sample: int
    repeat: int = 0
    uniform: float | None = None


class Sidecars:
    """Reads the sidecars of an index from files or shards; verifies their content, and that they still fit the run.

    All methods raise ValueError or OSError with the path for a sidecar that cannot be used.
    """

    def __init__(self, index: PairIndex):
        self.index = index

    def image(self, i: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Returns (tensors by name, header metadata) of the image sidecar of pair `i`."""
        return self.index.image_tensors(i)

    def text(self, i: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Returns (tensors by name, header metadata) of the text sidecar of pair `i`, with all of its variants."""
        return self.index.text_tensors(i)


@dataclass(frozen=True)
class Draws:
    """Settings of the random draws for each sample.

    Attributes:
        seed: seed of all draws.
        cond_dropout: probability of replacing the caption by the null condition.
        flip_p: probability of using the mirrored image.
        continuous: timesteps are floats, 1000 * sigma (flow matching), instead of integers.
        timestep_sampling, logit_mean, logit_std, timestep_shift: see objective.timestep_fraction.
        timestep_range: (first, end) of the timesteps, from 0 to 1000; end is exclusive.
        crop: draw one of an image's crops; False: take the first, which is centered.
        offset_noise: standard deviation of a per-channel constant that is added to the noise
            (Guttenberg 2023, "Diffusion with offset noise").
        fixed: repeat the draws of a sample's first visit on every visit (--overfit).
        noise_purpose: rng.NOISE, or rng.VALIDATION for noise that training never draws.
        variants: draw one of a caption's variants; False: always the first, which is the caption as written.
        caption_weights: {source of captions: weight}, see variants.draw_variant.
    """

    seed: int = 0
    cond_dropout: float = 0.0
    flip_p: float = 0.0
    continuous: bool = False
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    timestep_shift: float = 1.0
    timestep_range: tuple[int, int] = (0, 1000)
    crop: bool = True
    offset_noise: float = 0.0
    fixed: bool = False
    noise_purpose: int = rng.NOISE
    variants: bool = True
    caption_weights: Mapping[str, float] = field(default_factory=dict)


class CachedPairs(Dataset):
    """Samples by SampleKey: the same key gives the same tensors in every worker, rank and run.

    A sample whose sidecars cannot be used does not end the run: zeros of its shape take its place, with a `fault`.

    Args:
        index: the image and text pairs.
        scaling: applied to the latents.
        conditioning: applied to the text embeddings.
        draws: settings of the random draws; default: Draws().
        null: condition of the empty caption (from Conditioning.of_caption); required if draws.cond_dropout is not 0.
        sidecars: Sidecars or ram.RamCache of the index; default: Sidecars.
        masked: whether samples have masks.
    """

    def __init__(
        self,
        index: PairIndex,
        scaling: LatentScaling,
        conditioning: Conditioning,
        draws: Draws | None = None,
        null: Mapping[str, torch.Tensor] | None = None,
        sidecars=None,
        masked: bool = False,
    ):
        self.index = index
        self.scaling = scaling
        self.conditioning = conditioning
        self.draws = draws or Draws()
        self.null = null
        self.sidecars = sidecars or Sidecars(index)
        self.masked = masked

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: SampleKey) -> dict:
        """Returns a dict: latents, noise float32 [C, h, w]; timesteps; condition; dropped; sample; fault or None;
        waited_s, seconds that its shards were waited for; if samples have masks, mask float32 [1, h, w], 1 where the
        image counts in full."""
        if self.draws.fixed:
            key = key._replace(epoch=0, repeat=0)
        dropped = self._uniform(key, rng.DROPOUT) < self.draws.cond_dropout
        fault, waited_s = None, self.index.waited_s
        try:
            latents, mask, condition = self._read(key, dropped)
        except (ValueError, OSError) as error:
            latents, condition = self._blank(key)
            mask, fault = torch.ones_like(latents[:1]), str(error)
        first, end = self.draws.timestep_range
        uniform = self._uniform(key, rng.TIMESTEP) if key.uniform is None else key.uniform
        timestep = first + self._timestep_fraction(uniform) * (end - first)
        return {
            "latents": latents,
            "noise": torch.from_numpy(self._noise(key, latents.shape)),
            "timesteps": timestep if self.draws.continuous else int(timestep),
            "condition": condition,
            "dropped": dropped,
            "sample": key.sample,
            "fault": fault,
            "waited_s": self.index.waited_s - waited_s,
        } | ({"mask": mask} if self.masked else {})

    def _read(self, key, dropped):
        """Returns (latents, mask, condition) of a sample."""
        tensors, header = self.sidecars.image(key.sample)
        flipped = bool(self.draws.flip_p) and self._uniform(key, rng.FLIP) < self.draws.flip_p
        crop = self._crop(key, tensors)
        latents = self._latents(key, tensors, flipped, crop)
        mask = self._mask(key, tensors, flipped, crop) if self.masked else None
        caption = self.null if dropped else self._caption(key)
        return latents, mask, {**caption, **self.conditioning.of_image(of_crop(header, crop), flipped)}

    def _caption(self, key):
        tensors, header = self.sidecars.text(key.sample)
        number, variant = num_variants(tensors, self.conditioning.row.sequence), 0
        if number > 1 and self.draws.variants:
            sources = sources_of(self.index.text_path(key.sample), header, number)
            variant = draw_variant(self._uniform(key, rng.VARIANT), sources, self.draws.caption_weights)
        return self.conditioning.of_caption(tensors, variant)

    def _blank(self, key):
        """Returns (latents, condition) of zeros, without reading a file."""
        num_tokens = int(self.index.tokens[key.sample])
        condition = self.conditioning.blank(self.index.text_widths, num_tokens)
        return torch.zeros(self.index.shape(key.sample)), condition

    def _generator(self, key, purpose):
        return rng.generator(self.draws.seed, key.epoch, key.sample, purpose, key.repeat)

    def _uniform(self, key, purpose):
        return self._generator(key, purpose).random()

    def _timestep_fraction(self, uniform):
        draws = self.draws
        settings = draws.timestep_sampling, uniform, draws.logit_mean, draws.logit_std, draws.timestep_shift
        return timestep_fraction(*settings)

    def _noise(self, key, shape):
        noise = self._generator(key, self.draws.noise_purpose).standard_normal(shape, dtype=np.float32)
        if self.draws.offset_noise:
            offset = self._generator(key, rng.OFFSET).standard_normal(shape[0], dtype=np.float32)
            noise += self.draws.offset_noise * offset[:, None, None]
        return noise

    def _crop(self, key, tensors):
        number = num_crops(tensors)
        return int(self._uniform(key, rng.CROP) * number) if self.draws.crop and number > 1 else 0

    def _mask(self, key, tensors, flipped, crop):
        """Returns the mask of a crop, float32 [1, h, w]; ones for an image without one."""
        mask = tensors.get(numbered("mask", crop))
        if mask is None:
            return torch.ones_like(tensors["latent"][:1], dtype=torch.float32)
        mask = mask.float()
        if not ((mask >= 0) & (mask <= 1)).all():
            path = self.index.image_path(key.sample)
            raise ValueError(f"{path}: its mask has values outside of 0 to 1; run the image cache script again")
        return mask.flip(-1) if flipped else mask  # mirrored pixels have the mirrored averages

    def _latents(self, key, tensors, flipped, crop):
        name = numbered("latent_flip" if flipped else "latent", crop)
        if name not in tensors:
            path = self.index.image_path(key.sample)
            raise ValueError(f"{path}: has no latent_flip, which --flip_p needs; cache the images with --flip")
        return self.scaling(tensors[name])
