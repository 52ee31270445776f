#!/usr/bin/env -S python3 -P
"""Recreates models/tiny from scratch: the models of the quickstart, which train on one CPU core in minutes.

    ./models/make_tiny.py --stage all --out models/tiny

Six parts, for the 64x64 pictures that dataset_scripts/draw_shapes.py draws:

    vae/         AutoencoderKL with 4 latent channels, trained by train_tiny_vae.py: half an hour on a CPU core
    t5/          text_encoder/ and tokenizer/: random weights, never trained
    clip/        text_encoder/ and tokenizer/: trained to make the words readable for cross-attention
    clip_g/      the same for SDXL's second text encoder, whose pooled output can be read, too: minutes, as clip/
    unet/        config.json only: every run starts from fresh weights
    sdxl_unet/   the same for SDXL's UNet, which takes clip/ and clip_g/, the pooled output and time ids

Only pictures and captions from the data set are used, so the held-out pairs of shape and color stay unseen.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from cachetrain import cli
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

ROOT = Path(__file__).resolve().parent.parent
DRAW_SHAPES = ROOT / "dataset_scripts" / "draw_shapes.py"
TRAIN_TINY_VAE = ROOT / "models" / "train_tiny_vae.py"
STAGES = ("unet", "sdxl_unet", "t5", "clip", "clip_g", "vae")
SEED = 0
WIDTH = 64  # hidden size of T5 and CLIP, and so the UNet's cross_attention_dim
CLIP_G_WIDTH, POOLED_WIDTH, TIME_DIM = 48, 64, 16  # of SDXL's second text encoder and of its UNet's time ids
WORDS = (
    "a small large circle square triangle star cross ring red green blue yellow cyan pink white black "
    "on the left right at top bottom in middle background"
).split()
PUNCTUATION = "0123456789.,;:!?'\"()-"
IMAGES_TO_DRAW = 12000
CLIP_STEPS, CLIP_BATCH, CLIP_LR = 1500, 32, 2e-3


def draw_data(folder: str) -> list[str]:
    """Draws the training pictures and their captions into `folder`; returns the captions."""
    settings = ["--num_images", str(IMAGES_TO_DRAW), "--seed", str(SEED + 1)]
    subprocess.run([sys.executable, str(DRAW_SHAPES), "--out", folder, *settings], check=True)
    return [path.read_text().strip() for path in sorted(Path(folder).glob("*.txt"))]


def make_unet(out: Path, device: str) -> None:
    """Writes the UNet's config.json, used with T5 and with CLIP; 1.1 million parameters, 8x8 latents."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers takes this as the number of heads
        norm_num_groups=8,
    )
    save_fresh(unet, out / "unet")


def save_fresh(unet: UNet2DConditionModel, folder: Path) -> None:
    """Writes the config of a UNet whose weights composing initializes."""
    unet.save_config(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({"_weights": "fresh", **config}, indent=2) + "\n")


def make_sdxl_unet(out: Path, device: str) -> None:
    """Writes the config.json of a UNet of SDXL's kind: the tiny UNet with more transformer layers further down,
    linear projections, and an embedding of the pooled text, sizes and crop."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=[1, 2],
        cross_attention_dim=WIDTH + CLIP_G_WIDTH,
        attention_head_dim=[2, 4],
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_DIM,
        projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * TIME_DIM,
    )
    save_fresh(unet, out / "sdxl_unet")


def write_t5_tokenizer(folder: Path) -> int:
    """Writes a sentencepiece unigram model with one piece per word; other words fall back to letters, then <unk>.

    The ModelProto is written directly, because sentencepiece's trainer reduces such a regular corpus to letters.
    Returns the vocabulary size.
    """
    from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

    model = sentencepiece_model.ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.unk_id = 0, 1, 2
    model.trainer_spec.bos_id = -1
    model.normalizer_spec.name = "identity"
    kinds = model.SentencePiece
    pieces = [("<pad>", 0.0, kinds.CONTROL), ("</s>", 0.0, kinds.CONTROL), ("<unk>", 0.0, kinds.UNKNOWN)]
    pieces += [(f"▁{word}", -1.0, kinds.NORMAL) for word in WORDS]
    letters = [chr(code) for first in "aA" for code in range(ord(first), ord(first) + 26)]
    # Less likely than any word, so that letters are used only where no word matches.
    pieces += [(letter, -10.0, kinds.NORMAL) for letter in ["▁", *letters, *PUNCTUATION]]
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.vocab_size = len(pieces)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.SerializeToString(deterministic=True))
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(pieces)


def make_t5(out: Path, device: str) -> None:
    """Writes a T5 encoder with random weights, and its tokenizer."""
    import torch
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(SEED)
    config = T5Config(
        vocab_size=write_t5_tokenizer(out / "t5" / "tokenizer"),
        d_model=WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    encoder = T5EncoderModel(config)
    for name, parameter in encoder.named_parameters():
        # T5's default init barely encodes word order, so a shape and its background would swap colors.
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter, std=3.0)
    encoder.bfloat16().save_pretrained(out / "t5" / "text_encoder")


def merge_pair(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Returns the symbols with each occurrence of the pair joined, from left to right."""
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def learn_merges(words: tuple[str, ...] | list[str]) -> list[tuple[str, str]]:
    """Learns byte pair merges (Sennrich et al. 2016) until every word is one token.

    The trainer of the tokenizers library is not used because it breaks ties differently in each run.
    """
    words = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while counts := Counter(pair for symbols in words for pair in itertools.pairwise(symbols)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        words = [merge_pair(symbols, best) for symbols in words]
    return merges


def write_clip_tokenizer(folder: Path, **more_config) -> int:
    """Writes CLIP's byte-level BPE: merges that make each word in WORDS one token; other words fall back to bytes.

    Returns the vocabulary size; the last two ids are <|startoftext|> and <|endoftext|>.
    """
    from tokenizers import pre_tokenizers

    merges = learn_merges(WORDS)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77} | more_config
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(vocab)


def caption_labels(captions: list[str]) -> torch.Tensor:
    """Returns int64 [N, 5]: size, color, shape, place and background of each caption, as indices into WORDS."""
    import torch

    # a SIZE COLOR SHAPE on the PLACE on a BACKGROUND background
    rows = [[caption.split()[i] for i in (1, 2, 3, 6, -2)] for caption in captions]
    return torch.tensor([[WORDS.index(word) for word in row] for row in rows])


def clip_reader(hidden_size: int, num_attributes: int) -> torch.nn.Module:
    """Returns the head used only for training: attends to the 77 tokens with a learned query per attribute, then
    predicts the word."""
    import torch

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = torch.nn.Parameter(torch.randn(1, num_attributes, hidden_size))
            self.attention = torch.nn.MultiheadAttention(hidden_size, 4, batch_first=True)
            self.words = torch.nn.Linear(hidden_size, len(WORDS))

        def forward(self, tokens):  # [B, 77, D] -> logits [B, attributes, words]
            read, _ = self.attention(self.queries.expand(len(tokens), -1, -1), tokens, tokens)
            return self.words(read)

    return Reader()


def make_clip(out: Path, device: str) -> None:
    """Writes a CLIP text encoder from whose tokens the caption's attributes can be read, and its tokenizer.

    A random text encoder is not enough: a UNet early in training cannot read the shape from its output. The training
    head reads all 77 tokens, padding included, as Stable Diffusion does, and also the second-to-last layer, for
    --clip_skip.
    """
    from transformers import CLIPTextModel

    vocab_size = write_clip_tokenizer(out / "clip" / "tokenizer")
    config = {"hidden_size": WIDTH, "projection_dim": WIDTH, "pad_token_id": vocab_size - 1}
    train_tower(out / "clip", CLIPTextModel, config, vocab_size, device)


def make_clip_g(out: Path, device: str) -> None:
    """Writes SDXL's second text encoder, and its tokenizer, which pads with "!".

    SDXL takes the second-to-last layer without a norm, and the projected output at the end token; both are read.
    """
    from transformers import CLIPTextModelWithProjection

    vocab_size = write_clip_tokenizer(out / "clip_g" / "tokenizer", pad_token="!")
    config = {"hidden_size": CLIP_G_WIDTH, "projection_dim": POOLED_WIDTH, "pad_token_id": 0, "hidden_act": "gelu"}
    train_tower(out / "clip_g", CLIPTextModelWithProjection, config, vocab_size, device)


def train_tower(folder: Path, cls: type, config: dict, vocab_size: int, device: str) -> None:
    """Trains a text encoder of this class with heads that are thrown away, and saves it to folder/text_encoder."""
    import torch
    import torch.nn.functional as F
    from tqdm import trange
    from transformers import CLIPTextConfig, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        intermediate_size=2 * config["hidden_size"],
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        **config,
    )
    with tempfile.TemporaryDirectory() as data:
        captions = sorted(set(draw_data(data)))
    ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids.to(device)
    labels = caption_labels(captions).to(device)
    torch.manual_seed(SEED)
    tower = cls(config).to(device)
    heads = [clip_reader(config.hidden_size, labels.shape[1]).to(device) for _ in range(2)]
    if hasattr(tower, "text_projection"):
        words = torch.nn.Linear(config.projection_dim, labels.shape[1] * len(WORDS))
        heads.append(torch.nn.Sequential(words, torch.nn.Unflatten(1, (labels.shape[1], len(WORDS)))).to(device))
    parameters = [p for module in (tower, *heads) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=CLIP_LR, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, CLIP_LR, total_steps=CLIP_STEPS)
    for _ in trange(CLIP_STEPS, desc=folder.name, disable=None):
        batch = torch.randint(len(captions), (CLIP_BATCH,), device=device)
        read = readable_outputs(tower, ids[batch])
        loss = sum(
            F.cross_entropy(head(output).flatten(0, 1), labels[batch].flatten())
            for head, output in zip(heads, read, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"{folder.name}: loss {loss.item():.4f}")
    # float32, because StableDiffusionPipeline does not convert between a bfloat16 text encoder and a float32 UNet.
    tower.save_pretrained(folder / "text_encoder")


def readable_outputs(tower: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Returns what a UNet can take of a text encoder: [B, 77, D] twice, and the pooled [B, P] of SDXL's second."""
    states = tower(ids, output_hidden_states=True)
    if hasattr(tower, "text_projection"):
        return [states.last_hidden_state, states.hidden_states[-2], states.text_embeds]
    return [states.last_hidden_state, tower.final_layer_norm(states.hidden_states[-2])]


def make_vae(out: Path, device: str) -> None:
    """Draws the training pictures and trains the VAE on them; train_tiny_vae.py picks the device."""
    with tempfile.TemporaryDirectory() as folder:
        draw_data(folder)
        command = [TRAIN_TINY_VAE, "--data_root", folder, "--out", out / "vae"]
        subprocess.run([sys.executable, *map(str, command)], check=True)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all", help="part to make")
    parser.add_argument("--out", type=Path, help="directory for the parts; default: models/tiny in this repository")
    args = parser.parse_args(argv)
    args.out = args.out or ROOT / "models" / "tiny"
    return args


def main(argv=None):
    args = parse_args(argv)
    import torch

    torch.set_num_threads(1)  # for tensors this small, more threads are slower
    device = "cuda" if torch.cuda.is_available() else "cpu"
    makers = {
        "unet": make_unet, "sdxl_unet": make_sdxl_unet, "t5": make_t5, "clip": make_clip, "clip_g": make_clip_g,
        "vae": make_vae,
    }  # fmt: skip
    for stage in STAGES if args.stage == "all" else (args.stage,):
        print(f"{stage}: into {args.out / stage}", flush=True)
        makers[stage](args.out, device)
    return 0


if __name__ == "__main__":
    cli.run(main)
