"""The map from a VAE's latents to those that the UNet sees: per channel, (latents - shift_factor) * scaling_factor.

It is read from the VAE (`of_vae`) or from a file of measured numbers (`of_file`), kept in the headers of image caches
and in cachetrain.json of checkpoints, applied by training and inverted by drawing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cachetrain import cli
from cachetrain.reading import read_json

if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin

shift_factor = cli.Number(float, -1000, 1000)
_RANGES = {"scaling_factor": cli.scaling_factor, "shift_factor": shift_factor}
FIELDS = tuple(_RANGES)
_DEFAULT_OF_KL = 0.18215  # scaling_factor of an AutoencoderKL whose config.json has none
HOW_TO_SAY = (
    "measure it with cache/calculate_vae_scaling.py --per_channel --out norm.json and pass --norm norm.json to the "
    "image cache script, or pass --vae_scaling_factor to train_from_cached.py"
)


@dataclass(frozen=True)
class LatentScaling:
    """Normalises the VAE's latents for the UNet: (latents - shift_factor) * scaling_factor, in float32.

    Attributes:
        scaling_factor, shift_factor: a number, or a tuple of one for each channel.
    """

    scaling_factor: float | tuple[float, ...]
    shift_factor: float | tuple[float, ...] = 0.0

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns float32 latents of the same shape, [..., C, h, w]."""
        latents = latents.float()
        return (latents - _column(self.shift_factor, latents)) * _column(self.scaling_factor, latents)

    def inverse(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the VAE's latents of what `__call__` returned, [..., C, h, w]."""
        return latents / _column(self.scaling_factor, latents) + _column(self.shift_factor, latents)

    def has_factor(self, factor: float) -> bool:
        """Whether the scaling_factor of all channels is this one, to 1%."""
        return all(math.isclose(number, factor, rel_tol=0.01) for number in self._factors)

    @property
    def mean_factor(self) -> float:
        """The mean of scaling_factor over the channels."""
        return sum(self._factors) / len(self._factors)

    @property
    def _factors(self):
        return self.scaling_factor if isinstance(self.scaling_factor, tuple) else (self.scaling_factor,)

    @property
    def is_number(self) -> bool:
        """Whether one scaling_factor for all channels is all there is, as in Stable Diffusion."""
        return not isinstance(self.scaling_factor, tuple) and self.shift_factor == 0

    def header_fields(self) -> dict[str, str]:
        """Returns the header fields of sidecars: numbers, separated by commas where there is one for each channel."""
        return {name: str(value).strip("()").replace(" ", "").strip(",") for name, value in vars(self).items()}

    def as_json(self) -> dict:
        """Returns what cachetrain.json and files of --norm hold."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def check_channels(self, channels: int, where: str) -> None:
        """Refuses latents with another number of channels.

        Raises:
            ValueError: there are numbers for another number of channels; the message begins with `where`.
        """
        for name, value in vars(self).items():
            if isinstance(value, tuple) and len(value) != channels:
                raise ValueError(f"{where}: gives a {name} for each of {len(value)} channels, expected {channels}")


def _column(value, latents):
    """A factor in a form that torch multiplies with latents [..., C, h, w]."""
    return latents.new_tensor(value)[:, None, None] if isinstance(value, tuple) else value


def _number_or_tuple(value):
    return tuple(map(float, value)) if isinstance(value, list | tuple) else float(value)


def of_values(values: Mapping, where: str | Path) -> LatentScaling:
    """Returns the LatentScaling of {"scaling_factor": ..., "shift_factor": ...}, numbers or lists of numbers.

    Raises:
        ValueError: a number is missing or out of range; the message begins with `where`.
    """
    values = {"shift_factor": 0.0, **values}
    for name, number in _RANGES.items():
        value = values.get(name)
        numbers = value if isinstance(value, list | tuple) else [value]
        if not numbers or not all(_is_number(entry, number.holds) for entry in numbers):
            raise ValueError(
                f"{where}: {name} is {value!r:.60}; expected {number.expected}, or a list of one for each channel"
            )
    return LatentScaling(*(_number_or_tuple(values[name]) for name in FIELDS))


def of_header(metadata: Mapping[str, str], where: str | Path) -> LatentScaling | None:
    """Returns the LatentScaling in the header of an image sidecar, where other programs may have written anything.

    Returns:
        None if the header has none.

    Raises:
        ValueError: the header has something else.
    """
    if not metadata.get("scaling_factor"):
        return None
    values = {}
    for name, number in _RANGES.items():
        text = metadata.get(name) or "0.0"
        try:
            numbers = [*map(float, text.split(","))]
        except ValueError:
            numbers = [math.nan]
        if not all(map(number.holds, numbers)):
            raise ValueError(
                f"{where}: its header says {name} {text!r:.40}, expected {number.expected}; cache the images again"
            )
        values[name] = numbers if "," in text else numbers[0]
    return of_values(values, where)


def of_file(path: str | Path, encoder: str | None = None) -> LatentScaling:
    """Reads a file of --norm, which cache/calculate_vae_scaling.py writes.

    Args:
        encoder: fingerprint of the VAE that the numbers are for, if known.

    Raises:
        OSError, ValueError: it cannot be read, holds something else, or was measured on latents of another VAE.
    """
    values = read_json(path)
    if encoder and values.get("encoder", encoder) != encoder:
        raise ValueError(
            f"{path}: was measured on latents of another VAE (fingerprint {values['encoder']!r:.14}, expected "
            f"{encoder[:12]}); measure it again with cache/calculate_vae_scaling.py --out"
        )
    return of_values(values, path)


def to_file_text(scaling: LatentScaling, **fields: str | int) -> str:
    """Returns the content of a file of --norm: JSON. `fields`: what else to keep, like the VAE's fingerprint."""
    return json.dumps({**scaling.as_json(), **fields}, indent=1) + "\n"


def of_vae(vae: ModelMixin) -> LatentScaling | None:
    """Returns the LatentScaling that a VAE's config or batch norm says; None: nothing is known of it."""
    from cachetrain.modeling.t5_pipeline import latent_statistics

    statistics = latent_statistics(vae)
    if statistics is None:
        return None
    return of_values(dict(zip(FIELDS, statistics, strict=True)), type(vae).__name__)


def of_config(config: Mapping, where: str | Path) -> LatentScaling | None:
    """Returns the LatentScaling that a VAE's config.json says, like `of_vae` but without torch and weights.

    Returns:
        None if it takes the VAE to know it: of other classes than Stable Diffusion's.

    Raises:
        ValueError: of `check_config`.
    """
    check_config(config, where)
    scaling_factor = config.get("scaling_factor", _DEFAULT_OF_KL)
    if config.get("_class_name") != "AutoencoderKL" or config.get("latents_mean") or scaling_factor is None:
        return None
    return LatentScaling(float(scaling_factor), float(config.get("shift_factor") or 0.0))


def check_config(config: Mapping, where: str | Path) -> None:
    """Checks the fields of a VAE's config.json that `of_vae` reads.

    Raises:
        ValueError: one of them is no number, no list of numbers, or out of range.
    """
    for name, is_right in (("scaling_factor", cli.scaling_factor.holds), ("shift_factor", math.isfinite)):
        value = config.get(name)
        if value is not None and not _is_number(value, is_right):
            raise ValueError(f"{where} has {name} {value!r:.40}, expected a number; get the file again")
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    if config.get("_class_name") == "AutoencoderRAE" or mean is None is std:  # AutoencoderRAE: it reads them itself
        return
    for name, value, is_right in (("latents_mean", mean, math.isfinite), ("latents_std", std, _is_positive)):
        if not (isinstance(value, list) and value and all(_is_number(entry, is_right) for entry in value)):
            raise ValueError(
                f"{where} has {name} {value!r:.40}, expected a number for each channel, and latents_mean and "
                "latents_std together; get the file again"
            )
    if config.get("shift_factor") or len(mean) != len(std):
        raise ValueError(
            f"{where} has latents_mean of {len(mean)} and latents_std of {len(std)} channels, shift_factor "
            f"{config.get('shift_factor')}; expected as many of both, and no shift_factor beside them"
        )


def _is_positive(value):
    return math.isfinite(value) and value > 0


def _is_number(value, is_right):
    return type(value) in (int, float) and is_right(value)
