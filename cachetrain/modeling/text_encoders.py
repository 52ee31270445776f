"""Text encoding, shared by caching and sampling."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from cachetrain.modeling import load
from cachetrain.modeling.conditioning import MAX_TOKENS, text_kind

# Settings of a text cache that decide how captions are encoded, and what they can be.
_SETTINGS = {
    "clip_skip": lambda value: type(value) is int and 0 <= value < 1000,
    "max_length": lambda value: type(value) is int and 1 < value <= MAX_TOKENS,
    "raw": lambda value: type(value) is bool,
}


class TextEncoder:
    """Tokenizer, frozen text encoder and, for T5, the projection from a model directory.

    Args:
        model_dir: pipeline directory with text_encoder/ and tokenizer/, for T5 optionally projection/.
        device, dtype: of the encoder and the projection.
        clip_skip: CLIP only. 0: last_hidden_state; N: final_layer_norm(hidden_states[-N]).
        max_length: T5 only: maximum number of tokens, </s> included. CLIP always has 77.
        raw: T5 only. True: do not project; False: project; None: project if the model has projection/, since
            otherwise the UNet contains the projection.

    Raises:
        ValueError: `raw` is False, but the model has no projection/.
    """

    def __init__(
        self,
        model_dir: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        clip_skip: int = 0,
        max_length: int = 256,
        raw: bool | None = None,
    ):
        self._encoder_dir = load.component_dir(model_dir, "text_encoder")
        self._tokenizer_dir = load.component_dir(model_dir, "tokenizer")
        self.encoder = load.load_text_encoder(self._encoder_dir, dtype).to(device)
        self.tokenizer = load.load_tokenizer(self._tokenizer_dir, self.encoder)
        self.is_t5 = self.encoder.config.model_type == "t5"
        self.clip_skip = clip_skip
        self.max_length = max_length if self.is_t5 else self.encoder.config.max_position_embeddings
        self.device = device
        self.projection = None
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
            ids = self.tokenizer(captions, truncation=False, verbose=False).input_ids
        too_long = [len(row) > self.max_length for row in ids]
        # Truncate as the tokenizers do: keep the beginning and the closing token.
        ids = [row[: self.max_length - 1] + row[-1:] if cut else row for row, cut in zip(ids, too_long, strict=True)]
        return ids, too_long

    @torch.no_grad()
    def encode_ids(self, ids: Sequence[list[int]]) -> list[torch.Tensor]:
        """Encodes captions given as token ids.

        Returns:
            CPU tensors in the encoder's dtype: [77, D] for CLIP, [T_i, D] without padding for T5.
        """
        with load.named(self._encoder_dir):
            return self._encode_ids(ids)

    def _encode_ids(self, ids):
        length = max(map(len, ids)) if self.is_t5 else self.max_length
        batch = torch.full((len(ids), length), self.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(batch)
        for row, tokens in enumerate(ids):
            batch[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        batch, mask = batch.to(self.device), mask.to(self.device)
        if not self.is_t5:
            return list(self._clip(batch).cpu())
        hidden = self.encoder(batch, attention_mask=mask).last_hidden_state
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
    options = {key: settings[key] for key in _SETTINGS if key in settings}
    for key, value in options.items():
        if not _SETTINGS[key](value):
            raise ValueError(f"{model_dir}: its captions were cached with {key} {value!r:.40}, which nothing sets")
    encoder, row = TextEncoder(model_dir, device, dtype, **options), text_kind(kind)
    if encoder.is_t5 != (row.encoder == "t5"):
        raise ValueError(
            f"{model_dir}: the text encoder is {'T5' if encoder.is_t5 else 'CLIP'}, but the caches are {kind}; pass "
            "the model that the caches were made with"
        )
    return [{row.sequence: encoder.encode_ids(encoder.tokenize([caption])[0])[0].float()} for caption in captions]
