"""Text encoding, shared by caching and sampling."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from cachetrain.log import counted
from cachetrain.modeling import load
from cachetrain.modeling.conditioning import MAX_TOKENS, text_kind
from cachetrain.modeling.files import read_config

# Settings of a text cache that decide how captions are encoded, and what they can be.
_SETTINGS = {
    "clip_skip": lambda value: type(value) is int and 0 <= value < 1000,
    "max_length": lambda value: type(value) is int and 1 < value <= MAX_TOKENS,
    "raw": lambda value: type(value) is bool,
    "force_zeros_for_empty_prompt": lambda value: type(value) is bool,
}


class TextEncoder:
    """Tokenizer, frozen text encoder and, for T5, the projection from a model directory.

    Args:
        model_dir: pipeline directory with text_encoder/ and tokenizer/, for T5 optionally projection/.
        device, dtype: of the encoder and the projection.
        clip_skip: CLIP only. 0: last_hidden_state; N: final_layer_norm(hidden_states[-N]).
        max_length: maximum number of tokens, </s> included. CLIP: 77, or 2 more than a multiple of 75 (`_windows`);
            default: 256 for T5, 77 for CLIP.
        raw: T5 only. True: do not project; False: project; None: project if the model has projection/, since
            otherwise the UNet contains the projection.

    Raises:
        ValueError: `raw` is False, but the model has no projection/; `clip_skip` is above the number of layers.
    """

    def __init__(
        self,
        model_dir: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        clip_skip: int = 0,
        max_length: int | None = None,
        raw: bool | None = None,
    ):
        self._encoder_dir = load.component_dir(model_dir, "text_encoder")
        self._tokenizer_dir = load.component_dir(model_dir, "tokenizer")
        self.encoder = load.load_text_encoder(self._encoder_dir, dtype).to(device)
        self.tokenizer = load.load_tokenizer(self._tokenizer_dir, self.encoder)
        self.is_t5 = self.encoder.config.model_type == "t5"
        self.clip_skip = clip_skip
        self.max_length = max_length or (256 if self.is_t5 else self.encoder.config.max_position_embeddings)
        self.device = device
        self.projection = None
        if clip_skip > self.encoder.config.num_hidden_layers:
            layers = self.encoder.config.num_hidden_layers
            raise ValueError(f"--clip_skip {clip_skip}: {model_dir} has only {counted(layers, 'layer')}")
        directory = Path(model_dir) / "projection"
        if self.is_t5 and (directory.is_dir() if raw is None else not raw):
            if not directory.is_dir():
                raise ValueError(
                    f"{directory}: no such directory, but the captions were cached with a projection; cache the "
                    "captions for this model with cache/create_t5cache_768.py --raw"
                )
            self.projection = load.load_projection(directory, dtype).to(device)

    def tokenize(self, captions: list[str]) -> tuple[list[list[int]], list[bool]]:
        """Returns (token ids of each caption, whether each caption was truncated to the maximum length)."""
        with load.named(self._tokenizer_dir):
            return _tokenize(self.tokenizer, captions, self.max_length)

    def tensors_of(self, ids: Sequence[list[int]]) -> list[dict[str, torch.Tensor]]:
        """Returns the tensors of a text sidecar for each caption, given as token ids."""
        return [{"emb": embedding} for embedding in self.encode_ids(ids)]

    @torch.no_grad()
    def encode_ids(self, ids: Sequence[list[int]]) -> list[torch.Tensor]:
        """Encodes captions given as token ids.

        Returns:
            CPU tensors in the encoder's dtype: [max_length, D] for CLIP, [T_i, D] without padding for T5.
        """
        with load.named(self._encoder_dir):
            return self._encode_ids(ids)

    def _encode_ids(self, ids):
        if not self.is_t5:
            windows = _windows(ids, self.tokenizer, self.encoder, self.max_length)
            return list(_joined(self._clip(windows), len(ids)).cpu())
        length = max(map(len, ids))
        batch = torch.full((len(ids), length), self.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(batch)
        for row, tokens in enumerate(ids):
            batch[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        hidden = self.encoder(batch.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
        if self.projection is not None:
            hidden = self.projection(hidden)
        return [row[: len(tokens)].clone() for row, tokens in zip(hidden.cpu(), ids, strict=True)]

    def _clip(self, batch):
        # SD1.5 uses all 77 positions, padding included, without an attention mask.
        if self.clip_skip == 0:
            return self.encoder(batch).last_hidden_state
        hidden = self.encoder(batch, output_hidden_states=True).hidden_states[-self.clip_skip]
        # The attribute path of final_layer_norm differs between major versions of transformers.
        text_model = getattr(self.encoder, "text_model", self.encoder)
        return text_model.final_layer_norm(hidden)


class SdxlTextEncoder:
    """SDXL's two frozen CLIP encoders from a model directory: ViT-L and OpenCLIP's bigG.

    Args:
        model_dir: pipeline directory with text_encoder/, tokenizer/, text_encoder_2/ and tokenizer_2/.
        device, dtype: of the encoders.
        max_length: maximum number of tokens: 77, or 2 more than a multiple of 75 (`_windows`).
        force_zeros_for_empty_prompt: all tensors of the empty caption are zeros, as in SDXL's own pipeline without a
            negative prompt.

    Raises:
        ValueError: an encoder is missing or is none of SDXL's, or the tokenizers have different vocabularies.
    """

    def __init__(
        self,
        model_dir: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_length: int | None = None,
        force_zeros_for_empty_prompt: bool = True,
    ):
        model_dir = Path(model_dir)
        first, second = (load.component_dir(model_dir, name) for name in ("text_encoder", "text_encoder_2"))
        for directory in (first, second):
            if load.text_architecture(directory) != "clip":
                raise ValueError(f"{directory}: is not CLIP; expected SDXL's two CLIP encoders")
        check_second_encoder(second)
        self.encoders = [
            load.load_text_encoder(first, dtype).to(device),
            load.load_text_encoder(second, dtype, projected=True).to(device),
        ]
        self.tokenizers = [
            load.load_tokenizer(load.component_dir(model_dir, name), encoder)
            for name, encoder in zip(("tokenizer", "tokenizer_2"), self.encoders, strict=True)
        ]
        # SDXL's differ in the padding only. One list of token ids thus serves both encoders.
        if self.tokenizers[0].get_vocab() != self.tokenizers[1].get_vocab():
            raise ValueError(
                f"{model_dir / 'tokenizer'} and {model_dir / 'tokenizer_2'}: the vocabularies differ; SDXL's are "
                "equal: pass tokenizers of one SDXL model"
            )
        self.tokenizer = self.tokenizers[0]
        self.max_length = max_length or self.encoders[0].config.max_position_embeddings
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt

    def tokenize(self, captions: list[str]) -> tuple[list[list[int]], list[bool]]:
        """Returns (token ids of each caption, whether each caption was truncated to the maximum length)."""
        return _tokenize(self.tokenizer, captions, self.max_length)

    @torch.no_grad()
    def tensors_of(self, ids: Sequence[list[int]]) -> list[dict[str, torch.Tensor]]:
        """Encodes captions given as token ids.

        Returns:
            for each caption CPU tensors in the encoders' dtype: emb [max_length, D1 + D2], both encoders' second-last
            hidden states without the final norm; pooled [P], the second encoder's projected output at the end token
            of the first window.
        """
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            output = encoder(_windows(ids, tokenizer, encoder, self.max_length), output_hidden_states=True)
            hidden.append(_joined(output.hidden_states[-2], len(ids)))
            pooled = output[0]  # of the last encoder: its text_embeds [B * windows, P]
        emb, pooled = torch.cat(hidden, -1).cpu(), pooled.unflatten(0, (len(ids), -1))[:, 0].cpu()
        if self.force_zeros_for_empty_prompt:
            empty = torch.tensor([len(tokens) == 2 for tokens in ids])  # beginning and end only
            emb[empty], pooled[empty] = 0, 0
        return [{"emb": e, "pooled": p} for e, p in zip(emb, pooled, strict=True)]


def check_second_encoder(directory: Path) -> None:
    """Raises a ValueError if the config of SDXL's second text encoder is that of an encoder without a projection."""
    if read_config(directory).get("architectures") == ["CLIPTextModel"]:
        raise ValueError(
            f"{directory}: this CLIPTextModel has no projection of its pooled output, as SDXL's second text encoder "
            "has; ViT-L is the first (text_encoder, --clip_l), bigG the second (text_encoder_2, --clip_g)"
        )


def _tokenize(tokenizer, captions, max_length):
    ids = tokenizer(captions, truncation=False, verbose=False).input_ids
    too_long = [len(row) > max_length for row in ids]
    # Truncate as the tokenizers do: keep the beginning and the closing token.
    ids = [row[: max_length - 1] + row[-1:] if cut else row for row, cut in zip(ids, too_long, strict=True)]
    return ids, too_long


def _windows(ids, tokenizer, encoder, max_length):
    """Token ids as CLIP reads them: windows of up to 75 tokens, each between a first and a last token, then padding.

    Windows are the way of web UIs and of kohya's sd-scripts around CLIP's limit of 77 positions.

    Returns:
        int64 [B * windows, 77] on the encoder's device.
    """
    length = encoder.config.max_position_embeddings
    inner = length - 2
    num_windows = (max_length - 2) // inner
    batch = torch.full((len(ids), num_windows, length), tokenizer.pad_token_id, dtype=torch.long)
    for row, tokens in enumerate(ids):
        for number in range(num_windows):
            window = [tokens[0], *tokens[1:-1][number * inner : (number + 1) * inner], tokens[-1]]
            batch[row, number, : len(window)] = torch.tensor(window)
    return batch.flatten(0, 1).to(encoder.device)


def _joined(hidden, num_captions):
    """Joins the hidden states of windows, [B * windows, 77, D], to [B, 2 + 75 * windows, D].

    The first token comes from the first window, the last token from the last one, as in kohya's sd-scripts.
    """
    hidden = hidden.unflatten(0, (num_captions, -1))
    return torch.cat([hidden[:, 0, :1], hidden[:, :, 1:-1].flatten(1, 2), hidden[:, -1, -1:]], dim=1)


def open_text_encoder(
    model_dir: str | Path,
    kind: str,
    settings: Mapping,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TextEncoder | SdxlTextEncoder:
    """Opens what makes text caches of this kind with these settings (of `cache_captions`, or of a header).

    Raises:
        ValueError: the model's text encoder is of another kind, or cannot be used.
    """
    family, expected = load.text_family(model_dir), text_kind(kind).encoder
    if family != expected:
        raise ValueError(
            f"{model_dir}: the text encoder is {family.upper()}, but the caches are {kind}; pass the model that the "
            "caches were made with"
        )
    cls, names = TextEncoder, ("clip_skip", "max_length", "raw")
    if family == "sdxl":
        cls, names = SdxlTextEncoder, ("max_length", "force_zeros_for_empty_prompt")
    options = {name: settings[name] for name in names if name in settings}
    for name, value in options.items():
        if not (value is None or _SETTINGS[name](value)):
            raise ValueError(f"{model_dir}: its captions were cached with {name} {value!r:.40}, which nothing sets")
    return cls(model_dir, device, dtype, **options)


def encode_like_cache(
    model_dir: str | Path,
    kind: str,
    settings: Mapping,
    captions: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, torch.Tensor]]:
    """Encodes captions in the same way as a text cache was made.

    Args:
        kind: kind of the text cache.
        settings: settings from the header of the text cache.

    Returns:
        for each caption, {name: float32 CPU tensor}, the tensors of a sidecar of this kind.

    Raises:
        ValueError: the cache was made with --custom, or the model's text encoder does not match the kind.
    """
    if settings.get("custom"):
        raise ValueError(
            "the captions were cached with code from a model repository (--custom), which is not run here; train "
            "without sample prompts, and draw samples with that repository's pipeline"
        )
    encoder = open_text_encoder(model_dir, kind, settings, device, dtype)
    encoded = (encoder.tensors_of(encoder.tokenize([caption])[0])[0] for caption in captions)
    return [{name: tensor.float() for name, tensor in tensors.items()} for tensors in encoded]
