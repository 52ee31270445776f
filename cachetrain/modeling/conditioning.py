"""What a UNet is told besides its latents: from a sample's sidecars to the UNet's keyword arguments.

A row of KINDS says which tensors the text sidecars of one kind hold and how a UNet takes them. No other module knows
how many there are. They pass through three forms:

    tensors    of one text sidecar, as stored: {"emb": [T, D]}
    condition  of one sample: the same names, scaled, in the dtype of training; and time ids, where the kind has them
    arguments  of a batch: the UNet's keyword arguments, {"encoder_hidden_states": [B, T, D], ...}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from cachetrain.modeling import load
from cachetrain.modeling.t5_pipeline import pad_embeddings

# SDXL's micro-conditioning (Podell et al. 2023, section 2.2), from the header of an image sidecar.
TIME_IDS = "time_ids"


class TextKind(NamedTuple):
    """The tensors of one kind of text sidecar.

    Attributes:
        encoder: architecture of the text encoder that made them: "clip" or "t5".
        masked: sequences differ in length; padding is hidden from cross-attention. Otherwise all positions are seen.
        sequence: name of the tensor [T, D] that becomes encoder_hidden_states.
        vectors: {name of a tensor [D]: its name in added_cond_kwargs}.
        time_ids: the UNet is also told each image's size and crop.
    """

    encoder: str
    masked: bool
    sequence: str = "emb"
    vectors: Mapping[str, str] = {}
    time_ids: bool = False


KINDS = {
    "txt_clipl": TextKind("clip", masked=False),  # SD1.5 was trained to see all 77 positions, padding included
    "txt_t5cache": TextKind("t5", masked=True),
}


def text_kind(name: str) -> TextKind:
    """The row of KINDS of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in KINDS:
        raise ValueError(f"text caches of kind {name!r}; this version trains with {', '.join(KINDS)}")
    return KINDS[name]


def check_shapes(kind: str, path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, dict[str, int]]:
    """Checks what a text sidecar holds, from its header.

    Returns:
        (number of tokens, {name of each tensor: its width}).

    Raises:
        ValueError: a tensor is missing or has another number of dimensions.
    """
    row, widths = text_kind(kind), {}
    for name, dimensions in ((row.sequence, 2), *((vector, 1) for vector in row.vectors)):
        if len(shapes.get(name, ())) != dimensions:
            raise ValueError(f"{path}: expected a tensor {name!r} of {dimensions} dimensions, found {dict(shapes)}")
        widths[name] = shapes[name][-1]
    return shapes[row.sequence][0], widths


def num_elements(kind: str, widths: Mapping[str, int], num_tokens: int, num_samples: int) -> int:
    """How many numbers the text sidecars of `num_samples` samples hold, which are `num_tokens` long together."""
    row = text_kind(kind)
    return num_tokens * widths[row.sequence] + num_samples * sum(widths[name] for name in row.vectors)


def check_unet(kind: str, widths: Mapping[str, int], unet_config: Mapping, where: str) -> None:
    """Checks that a UNet of this config takes such captions.

    Args:
        where: the caches, for the message.

    Raises:
        ValueError: it wants another width.
    """
    width, wanted = widths[text_kind(kind).sequence], load.text_width(unet_config)
    if width != wanted:
        raise ValueError(
            f"{where}: embeddings are {width} wide, the UNet wants {wanted}; cache the captions with this model"
        )


@dataclass(frozen=True)
class Conditioning:
    """How the captions of a run, or of a checkpoint, condition its UNet.

    Attributes:
        kind: of the text sidecars, a key of KINDS.
        scale: multiplies every text tensor.
        dtype: of the conditions. bfloat16 halves what is copied to a device that computes in it anyway.
    """

    kind: str
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    row: TextKind = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "row", text_kind(self.kind))

    def of_caption(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The condition of a caption, from the tensors of its sidecar or of a text encoder."""
        names = (self.row.sequence, *self.row.vectors)
        return {name: (tensors[name].float() * self.scale).to(self.dtype) for name in names}

    def of_image(self, header: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """The part of a condition that an image's sidecar adds; {} for kinds without time ids.

        Args:
            header: metadata of the image sidecar.

        Returns:
            time_ids: float32 [6]: original height and width, crop top and left in pixels of the resized image,
            height and width.

        Raises:
            ValueError: the header does not say them.
        """
        if not self.row.time_ids:
            return {}
        try:
            height, width = int(header["height"]), int(header["width"])
            original = int(header["original_height"]), int(header["original_width"])
            left, top, right, _ = map(float, header["crop_box"].split(","))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"captions of kind {self.kind} need each image's size and crop, which an image cache does not say "
                f"({error}); run the image cache script again"
            ) from error
        resized = width / (right - left)  # the crop box is given in pixels of the original
        return {TIME_IDS: torch.tensor([*original, top * resized, left * resized, height, width])}

    def collate(self, conditions: Sequence[Mapping[str, torch.Tensor]], multiple: int = 8) -> dict:
        """The UNet's keyword arguments for a batch of conditions.

        Args:
            conditions: B of them.
            multiple: sequences that are masked are padded to a common length, a multiple of this.

        Returns:
            encoder_hidden_states [B, T, D]; encoder_attention_mask bool [B, T], True where there is text, or None;
            where the kind has vectors or time ids, added_cond_kwargs: a dict of [B, D].
        """
        sequences = [condition[self.row.sequence] for condition in conditions]
        hidden, mask = pad_embeddings(sequences, multiple) if self.row.masked else (torch.stack(sequences), None)
        arguments = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        added = dict(self.row.vectors) | ({TIME_IDS: TIME_IDS} if self.row.time_ids else {})
        if added:
            arguments["added_cond_kwargs"] = {
                argument: torch.stack([condition[name] for condition in conditions])
                for name, argument in added.items()
            }
        return arguments

    def example(self, widths: Mapping[str, int], num_tokens: int) -> dict:
        """Arguments for one sample of that length, without data: for counting operations on the meta device."""
        sequence = {self.row.sequence: torch.empty(num_tokens, widths[self.row.sequence])}
        vectors = {name: torch.empty(widths[name]) for name in self.row.vectors}
        return self.collate([sequence | vectors | ({TIME_IDS: torch.empty(6)} if self.row.time_ids else {})], 1)


def predict(unet, latents: torch.Tensor, timesteps: torch.Tensor, arguments: Mapping) -> torch.Tensor:
    """The UNet's prediction: the only place where training, validation, diagnostics and drawing call a UNet.

    Args:
        unet: UNet2DConditionModel, or a distributed wrapper of one.
        latents: noisy, [B, C, h, w], in the dtype of the UNet's weights.
        timesteps: [B] or 0-dim.
        arguments: of `Conditioning.collate`, on the same device.

    Returns:
        [B, C, h, w].
    """
    return unet(latents, timesteps, **arguments).sample


def moved(arguments: Mapping, *to) -> dict:
    """Arguments with each tensor moved, as by Tensor.to; floating-point dtypes apply to floating-point tensors."""

    def move(tensor):
        places = [place for place in to if tensor.is_floating_point() or not isinstance(place, torch.dtype)]
        return tensor.to(*places) if places else tensor

    return _each(arguments, move)


def rows(arguments: Mapping, part: slice) -> dict:
    """Arguments of some samples of a batch."""
    return _each(arguments, lambda tensor: tensor[part])


def token_norms(arguments: Mapping) -> torch.Tensor:
    """Float32 [3]: sum of the text embeddings' norms, number of tokens seen, number of positions."""
    hidden, mask = arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]
    seen = torch.ones_like(hidden[..., 0]) if mask is None else mask.float()
    norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
    return torch.stack([(norms * seen).sum(), seen.sum(), torch.ones_like(seen).sum()])


def _each(arguments, function):
    return {
        name: _each(value, function) if isinstance(value, Mapping) else None if value is None else function(value)
        for name, value in arguments.items()
    }
