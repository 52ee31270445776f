"""The UNet's conditioning, from a sample's sidecars to the UNet's keyword arguments.

Each kind of text sidecar has a row in KINDS: which tensors the sidecars hold, and how the UNet takes these tensors.
No other module depends on the number of tensors. The data takes three forms:

    tensors    one text sidecar as stored: {"emb": [T, D]}; variants of the caption are emb.1, emb.2, ...
    condition  one sample: the same names, scaled, in the training dtype; plus time ids, if the UNet takes them
    arguments  a batch: the UNet's keyword arguments, {"encoder_hidden_states": [B, T, D], ...}
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from cachetrain.modeling import load

# Of the tensors in sidecars, as safetensors names them; F64 as other programs may write it.
FLOATS = ("F16", "BF16", "F32", "F64")
MAX_TOKENS = 2**16 - 1  # of a text; PairIndex counts them in 16 bits

# SDXL's micro-conditioning (Podell et al. 2023, section 2.2), from the header of an image sidecar.
TIME_IDS = "time_ids"


class Header(Protocol):
    """What is known of a sidecar without its tensors, as data.sidecar.Header."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]


class TextKind(NamedTuple):
    """The tensors of one kind of text sidecar.

    Attributes:
        script: the script in cache/ that makes the sidecars.
        encoder: what encodes the captions, of load.text_family: "clip", "t5" or "sdxl".
        masked: sequences differ in length, and padding is hidden from cross-attention; False: the UNet attends to all
            positions.
        sequence: name of the tensor [T, D] that becomes encoder_hidden_states.
        vectors: {name of a tensor [D]: name in added_cond_kwargs}.
        time_ids: the UNet also takes each image's size and crop.
    """

    script: str
    encoder: str
    masked: bool
    sequence: str = "emb"
    vectors: Mapping[str, str] = {}
    time_ids: bool = False


KINDS = {
    # Stable Diffusion was trained to attend to all 77 positions, padding included.
    "txt_clipl": TextKind("create_clipl.py", "clip", masked=False),
    "txt_t5cache": TextKind("create_t5cache_768.py", "t5", masked=True),
    "txt_sdxl": TextKind(
        "create_sdxl_text.py", "sdxl", masked=False, vectors={"pooled": "text_embeds"}, time_ids=True
    ),
}


def text_kind(name: str) -> TextKind:
    """Returns the row of KINDS with this name.

    Raises:
        ValueError: there is no such kind.
    """
    if name not in KINDS:
        raise ValueError(f"text caches of kind {name!r} are not supported; expected one of {', '.join(KINDS)}")
    return KINDS[name]


def check_tensor(path: str, header: Header, name: str, dimensions: int) -> tuple[int, ...]:
    """Checks a tensor of a sidecar by the header alone; returns its shape.

    Raises:
        ValueError: it is missing or empty, has another number of dimensions, or does not hold real numbers.
    """
    shape, dtype = header.shapes.get(name, ()), header.dtypes.get(name)
    if len(shape) != dimensions or 0 in shape or dtype not in FLOATS:
        found = {name: f"{header.dtypes[name]} {shape}" for name, shape in header.shapes.items()}
        raise ValueError(
            f"{path}: expected a tensor {name!r} of {dimensions} dimensions in one of {', '.join(FLOATS)}, found "
            f"{found}; run the cache script again"
        )
    return shape


def variant_name(name: str, variant: int) -> str:
    """Name of a tensor of one variant of the caption: `emb`, `emb.1`, `emb.2`, ..."""
    return f"{name}.{variant}" if variant else name


def num_variants(names: Iterable[str], sequence: str = "emb") -> int:
    """Number of variants of the caption in a text sidecar with tensors of these names."""
    further = f"{sequence}."
    return sum(name == sequence or (name.startswith(further) and name[len(further) :].isdecimal()) for name in names)


def check_text(kind: str, path: str, header: Header) -> tuple[list[int], dict[str, int]]:
    """Checks the tensors of a text sidecar by its header.

    Returns:
        (number of tokens of each variant, {tensor name: width}).

    Raises:
        ValueError: of `check_tensor`, a text has more than MAX_TOKENS, or the variants differ in width.
    """
    try:
        row = text_kind(kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    lengths, widths = [], {}
    for variant in range(max(1, num_variants(header.shapes, row.sequence))):
        num_tokens, width = check_tensor(path, header, variant_name(row.sequence, variant), 2)
        if num_tokens > MAX_TOKENS:
            raise ValueError(
                f"{path}: has {num_tokens:,} tokens, expected at most {MAX_TOKENS:,}; shorten the caption"
            )
        vectors = {name: check_tensor(path, header, variant_name(name, variant), 1)[0] for name in row.vectors}
        lengths.append(num_tokens)
        found = {row.sequence: width} | vectors
        widths = widths or found
        if found != widths:
            raise ValueError(f"{path}: its variants have widths {widths} and {found}; run the cache script again")
    return lengths, widths


def num_elements(kind: str, widths: Mapping[str, int], num_tokens: int, num_samples: int) -> int:
    """Number of tensor elements in the captions of `num_samples` text sidecars, `num_tokens` tokens in total."""
    row = text_kind(kind)
    return num_tokens * widths[row.sequence] + num_samples * sum(widths[name] for name in row.vectors)


def cache_command(family: str, model: str | Path, data_root: str, kind: str, suffix: str) -> str:
    """Returns the command line that caches captions for a model of this family (load.text_family).

    A bare UNet cannot encode captions: the command then leaves the model open, and says so.

    Args:
        kind, suffix: of the text caches that do not fit: others of the kind take their place, others of another kind
            get its usual suffix.
    """
    right, script = next((name, row.script) for name, row in KINDS.items() if row.encoder == family)
    bare = Path(model).is_dir() and not (Path(model) / "text_encoder").is_dir()
    words = [f"cache/{script}", "--model", "MODEL" if bare else str(model), "--data_root", data_root]
    if right == kind and suffix != f".{kind}":
        words += ["--cache_suffix", suffix]
    command = shlex.join(words)
    if right != kind and suffix != f".{right}":
        command += f", and pass --txtcache_suffix .{right}"
    return f"{command}, where MODEL has the text encoders that belong to this UNet" if bare else command


def check_unet(
    kind: str, widths: Mapping[str, int], unet_config: Mapping, model: str | Path, data_root: str, suffix: str
) -> None:
    """Checks that a UNet with this config takes the tensors of these text caches.

    Args:
        widths: {name of a text tensor: width D}.
        model, data_root, suffix: of the UNet and of the caches, for messages.

    Raises:
        ValueError: the UNet takes a pooled vector and time ids but the caches have no pooled vector, or vice versa; a
            width differs from what the UNet expects.
    """
    row, pooled = text_kind(kind), load.pooled_width(unet_config)
    if row.vectors and not pooled:
        raise ValueError(
            f"{data_root}: captions of kind {kind} have a pooled vector, for SDXL, but the UNet of {model} takes "
            f"none; run {cache_command('clip', model, data_root, kind, suffix)}"
        )
    if pooled and row.encoder == "clip":
        raise ValueError(
            f"{data_root}: captions of kind {kind} have no pooled vector, but the UNet of {model} is SDXL's and "
            f"takes one; run {cache_command('sdxl', model, data_root, kind, suffix)}"
        )
    expected = {row.sequence: load.text_width(unet_config), **dict.fromkeys(row.vectors, pooled)}
    for name, width in expected.items():
        if widths[name] != width:
            what = "text embeddings" if name == row.sequence else "pooled text vectors"
            raise ValueError(
                f"{data_root}: {what} have width {widths[name]}, the UNet expects {width}; cache "
                f"the captions with this model: {cache_command(row.encoder, model, data_root, kind, suffix)}"
            )


@dataclass(frozen=True)
class Conditioning:
    """Turns text tensors into UNet arguments, for one run or checkpoint.

    Attributes:
        kind: kind of the text sidecars, a key of KINDS.
        scale: factor for every text tensor.
        dtype: dtype of the conditions. bfloat16 halves the copy to a device that computes in bfloat16 anyway.
        time_ids: the six time ids of images whose sidecars do not record them; None: such images are an error.
        zero_pooled: for kinds without a pooled vector: width of the zeros that SDXL's UNet gets in its place; 0: the
            UNet takes none.
    """

    kind: str
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    time_ids: tuple[int, ...] | None = None
    zero_pooled: int = 0
    row: TextKind = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "row", text_kind(self.kind))

    @classmethod
    def for_unet(cls, kind: str, unet_config: Mapping, **settings) -> Conditioning:
        """Returns the Conditioning of a UNet with this config. `settings`: further attributes."""
        pooled = load.pooled_width(unet_config)
        return cls(kind, zero_pooled=0 if text_kind(kind).vectors else pooled, **settings)

    @property
    def takes_time_ids(self) -> bool:
        return self.row.time_ids or self.zero_pooled > 0

    def of_caption(self, tensors: Mapping[str, torch.Tensor], variant: int = 0) -> dict[str, torch.Tensor]:
        """Returns the condition of one variant of a caption, given the tensors from a sidecar or a text encoder."""
        names = {name: variant_name(name, variant) for name in (self.row.sequence, *self.row.vectors)}
        return {name: (tensors[stored].float() * self.scale).to(self.dtype) for name, stored in names.items()}

    def of_image(self, header: Mapping[str, str], flipped: bool = False) -> dict[str, torch.Tensor]:
        """Returns the part of a condition that comes from the image sidecar; {} if the UNet takes no time ids.

        Args:
            header: metadata of the image sidecar.
            flipped: the mirrored image is trained; its left is the right of the original.

        Returns:
            {"time_ids": int64 [6]}: original height and width, crop top and left in pixels of the resized image,
            height and width. Integers, so that no cast to bfloat16 rounds them.

        Raises:
            ValueError: the header lacks size or crop.
        """
        if not self.takes_time_ids:
            return {}
        try:
            height, width = int(header["height"]), int(header["width"])
            original = int(header["original_height"]), int(header["original_width"])
            left, top, right, _ = map(float, header["crop_box"].split(","))
        except (KeyError, ValueError) as error:
            if self.time_ids is not None:
                return {TIME_IDS: torch.tensor(self.time_ids)}
            raise ValueError(
                "the UNet needs each image's size and crop, but the header of an image cache lacks them "
                f"({error}); run the image cache script again, or pass --time_ids to give all images the same"
            ) from error
        scale = width / (right - left)  # the crop box is in pixels of the original image
        left = original[1] - right if flipped else left
        return {TIME_IDS: torch.tensor([*original, round(top * scale), round(left * scale), height, width])}

    def of_size(self, height: int, width: int) -> dict[str, torch.Tensor]:
        """Like `of_image`, for a picture to be drawn: not resized, not cropped."""
        if not self.takes_time_ids:
            return {}
        return {TIME_IDS: torch.tensor([height, width, 0, 0, height, width])}

    def collate(self, conditions: Sequence[Mapping[str, torch.Tensor]], multiple: int = 8) -> dict:
        """Returns the UNet's keyword arguments for a batch of B conditions.

        Args:
            multiple: if the kind is masked, sequences are padded to a common length that is a multiple of this.

        Returns:
            dict: encoder_hidden_states [B, T, D]; encoder_attention_mask bool [B, T], True where there is text, or
            None; and, if the UNet takes them, added_cond_kwargs: a dict of [B, D], text_embeds and time_ids.
        """
        from cachetrain.modeling.t5_pipeline import pad_embeddings  # diffusers: not needed to encode captions

        sequences = [condition[self.row.sequence] for condition in conditions]
        hidden, mask = pad_embeddings(sequences, multiple) if self.row.masked else (torch.stack(sequences), None)
        arguments = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        added = dict(self.row.vectors) | ({TIME_IDS: TIME_IDS} if self.takes_time_ids else {})
        if added:
            arguments["added_cond_kwargs"] = {
                argument: torch.stack([condition[name] for condition in conditions])
                for name, argument in added.items()
            }
        if self.zero_pooled:
            arguments["added_cond_kwargs"]["text_embeds"] = hidden.new_zeros(len(conditions), self.zero_pooled)
        return arguments

    def example(self, widths: Mapping[str, int], num_tokens: int) -> dict:
        """Returns arguments of zeros for one sample, to count operations on the meta device."""
        return self.collate([self.blank(widths, num_tokens, torch.float32)], 1)

    def blank(self, widths: Mapping[str, int], num_tokens: int, dtype: torch.dtype | None = None) -> dict:
        """Returns a condition of zeros.

        Args:
            widths: {name of a text tensor: width D}.
            num_tokens: length of its sequence.
            dtype: of the text tensors; default: that of all conditions.
        """
        shapes = {self.row.sequence: (num_tokens, widths[self.row.sequence])}
        shapes |= {name: (widths[name],) for name in self.row.vectors}
        text = {name: torch.zeros(shape, dtype=dtype or self.dtype) for name, shape in shapes.items()}
        return text | ({TIME_IDS: torch.zeros(6, dtype=torch.int64)} if self.takes_time_ids else {})


def predict(unet, latents: torch.Tensor, timesteps: torch.Tensor, arguments: Mapping) -> torch.Tensor:
    """Returns the UNet's prediction [B, C, h, w]; used by training, validation, diagnostics and sampling alike.

    Args:
        unet: UNet2DConditionModel, or a distributed wrapper around one.
        latents: noisy latents [B, C, h, w], in the dtype of the UNet's weights.
        timesteps: [B] or 0-dim.
        arguments: from `Conditioning.collate`, on the same device.
    """
    return unet(latents, timesteps, **arguments).sample


def moved(arguments: Mapping, *to) -> dict:
    """Applies Tensor.to(*to) to each tensor of `arguments`; a dtype applies to floating-point tensors only."""

    def move(tensor):
        targets = [target for target in to if tensor.is_floating_point() or not isinstance(target, torch.dtype)]
        return tensor.to(*targets) if targets else tensor

    return _map_tensors(arguments, move)


def rows(arguments: Mapping, part: slice) -> dict:
    """Returns the arguments for a slice of the batch."""
    return _map_tensors(arguments, lambda tensor: tensor[part])


def token_norms(arguments: Mapping) -> torch.Tensor:
    """Returns float32 [3]: sum of the norms of unmasked text embeddings, number of unmasked tokens, of positions."""
    hidden, mask = arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]
    unmasked = torch.ones_like(hidden[..., 0]) if mask is None else mask.float()
    norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
    return torch.stack([(norms * unmasked).sum(), unmasked.sum(), torch.ones_like(unmasked).sum()])


def _map_tensors(arguments, function):
    """Applies `function` to each tensor of a nested dict; None stays None."""
    return {
        name: _map_tensors(value, function)
        if isinstance(value, Mapping)
        else None
        if value is None
        else function(value)
        for name, value in arguments.items()
    }
