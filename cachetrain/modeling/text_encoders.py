"""Text encoding, the same for caches and for sample prompts."""

from pathlib import Path

import torch

from cachetrain.modeling import load
from cachetrain.modeling.conditioning import text_kind


class TextEncoder:
    """Tokenizer + frozen encoder (+ projection) of one model directory.

    Args:
        model_dir: pipeline directory with text_encoder/ and tokenizer/ (T5: and projection/).
        device, dtype: where and in what it computes.
        clip_skip: CLIP only. 0: last_hidden_state; N: final_layer_norm(hidden_states[-N]).
        max_length: T5 only: tokens kept, </s> included. CLIP's 77 are fixed.
        raw: T5 only: T5's own width, no projection. None: so where the model has no projection/, for its UNet
            then projects for itself.

    Raises:
        ValueError: to be projected (raw False), and the model has no projection/.
    """

    def __init__(self, model_dir, device="cpu", dtype=torch.float32, clip_skip=0, max_length=256, raw=None):
        self.encoder = load.load_text_encoder(load.component_dir(model_dir, "text_encoder"), dtype).to(device)
        self.tokenizer = load.load_tokenizer(load.component_dir(model_dir, "tokenizer"), self.encoder)
        self.is_t5 = self.encoder.config.model_type == "t5"
        self.clip_skip = clip_skip
        self.max_length = max_length if self.is_t5 else self.encoder.config.max_position_embeddings
        self.device = device
        self.projection = None
        directory = Path(model_dir) / "projection"
        if self.is_t5 and (directory.is_dir() if raw is None else not raw):
            if not directory.is_dir():
                raise ValueError(
                    f"{directory}: no such directory, while the captions were cached through a projection; "
                    "cache them with create_t5cache_768.py --raw for this model"
                )
            self.projection = load.load_projection(directory, dtype).to(device)

    def tokenize(self, captions):
        """Returns (list of token id lists, list of bool: longer than the limit and cut)."""
        ids = self.tokenizer(captions, truncation=False, verbose=False).input_ids
        cut = [len(row) > self.max_length for row in ids]
        # Cut as the tokenizers do: keep the head and the closing token.
        return [row[: self.max_length - 1] + row[-1:] if c else row for row, c in zip(ids, cut, strict=True)], cut

    @torch.no_grad()
    def encode_ids(self, ids):
        """Encodes token id lists.

        Returns:
            list of CPU tensors in the encoder's dtype: CLIP [77, D]; T5 [T_i, D], tight.
        """
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
        # SD1.5 reads all 77 positions, padding included, without an attention mask.
        if self.clip_skip == 0:
            return self.encoder(batch).last_hidden_state
        hidden = self.encoder(batch, output_hidden_states=True).hidden_states[-self.clip_skip]
        # transformers keeps the tower's own norm at different depths in its major versions.
        tower = getattr(self.encoder, "text_model", self.encoder)
        return tower.final_layer_norm(hidden)


def encode_like_cache(model_dir, kind, settings, captions, *, device="cpu", dtype=torch.float32):
    """Encodes captions as the text cache of `kind` with `settings` (of its header, a dict) was made.

    Returns:
        list of {name: float32 CPU tensor}, the tensors that a sidecar of this kind holds.
    """
    if settings.get("custom"):
        raise ValueError(
            "captions were encoded by a repository's own code (--custom), not run here: train without sample "
            "prompts and draw with that repository's pipeline"
        )
    options = {key: settings[key] for key in ("clip_skip", "max_length", "raw") if key in settings}
    encoder, row = TextEncoder(model_dir, device, dtype, **options), text_kind(kind)
    if encoder.is_t5 != (row.encoder == "t5"):
        raise ValueError(
            f"{model_dir}: its text encoder is {'T5' if encoder.is_t5 else 'CLIP'}, the caches are {kind}; "
            "train with the model that made the caches"
        )
    return [{row.sequence: encoder.encode_ids(encoder.tokenize([caption])[0])[0].float()} for caption in captions]
