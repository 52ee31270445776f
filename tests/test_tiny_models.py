"""The embedded default in models/tiny: it loads alone and offline, reads words, and can be made again."""

import importlib

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers import REPO, TINY, load_script, run_script
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from cachetrain.modeling.load import load_vae

CAPTION = "a small red circle on the left on a blue background"
SWAPPED = "a small blue circle on the left on a red background"
PHOTO = "Zwölf Boxkämpfer, a photograph (1923) of 漢字 & wäscherei!"


@pytest.fixture(scope="module")
def make_tiny():
    """models/make_tiny.py as a module."""
    return load_script("models/make_tiny.py")


@pytest.fixture(scope="module")
def t5():
    """(tokenizer, encoder) of the T5 flavour, float32."""
    encoder = T5EncoderModel.from_pretrained(TINY / "t5" / "text_encoder", dtype=torch.float32)
    return T5Tokenizer.from_pretrained(TINY / "t5" / "tokenizer"), encoder


@pytest.fixture(scope="module")
def clip():
    """(tokenizer, encoder) of the CLIP flavour, float32."""
    encoder = CLIPTextModel.from_pretrained(TINY / "clip" / "text_encoder", dtype=torch.float32)
    return CLIPTokenizer.from_pretrained(TINY / "clip" / "tokenizer"), encoder


def encode_t5(t5, caption):
    """Returns float32 [T, 64]."""
    tokenizer, encoder = t5
    with torch.no_grad():
        return encoder(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]


def encode_clip(clip, captions, clip_skip=0):
    """Returns float32 [B, 77, 64], padded with the end token and unmasked, as Stable Diffusion does."""
    tokenizer, encoder = clip
    ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        states = encoder(ids, output_hidden_states=True).hidden_states
        return encoder.final_layer_norm(states[-1 - clip_skip])


def test_tiny_models_take_less_than_4_mb():
    sizes = [path.stat().st_size for path in TINY.rglob("*") if path.is_file()]
    assert sum(sizes) < 3.5e6


def test_tiny_unet_is_a_config_without_weights():
    assert [path.name for path in (TINY / "unet").iterdir()] == ["config.json"]
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(TINY / "unet"))
    assert 1.0e6 < sum(parameter.numel() for parameter in unet.parameters()) < 1.2e6
    for num_tokens in (12, 77):
        output = unet(torch.randn(2, 4, 8, 8), torch.tensor([1, 999]), torch.randn(2, num_tokens, 64)).sample
        assert output.shape == (2, 4, 8, 8)


def test_tiny_vae_scales_latents_to_unit_variance():
    vae = AutoencoderKL.from_pretrained(TINY / "vae", torch_dtype=torch.float32)
    rng = np.random.default_rng(0)
    images = []
    for _ in range(64):  # a rectangle of one color on another, drawn without the project's code
        image = Image.new("RGB", (64, 64), tuple(rng.integers(20, 236, 3)))
        left, top = rng.integers(5, 40, 2)
        image.paste(tuple(int(c) for c in rng.integers(20, 236, 3)), (left, top, left + 20, top + 20))
        images.append(np.asarray(image))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    assert latents.shape == (64, 4, 8, 8)
    assert 0.6 < latents.std() < 1.4


def test_tiny_vae_of_other_channels_starts_with_all_weights_but_those_beside_the_latents():
    script, old = load_script("models/train_tiny_vae.py"), load_vae(TINY / "vae").state_dict()
    vae = script.new_vae(8)
    script.start_from(vae, TINY / "vae")
    new = vae.state_dict()
    changed = {name.rsplit(".", 1)[0] for name in new if not torch.equal(new[name], old[name])}
    assert changed == {"encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in"}
    assert vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 8, 8, 8)


def test_tiny_vae_accepts_other_sizes():
    vae = AutoencoderKL.from_pretrained(TINY / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 96, 160)).latent_dist.mean
        assert latents.shape == (1, 4, 12, 20)
        assert vae.decode(latents).sample.isfinite().all()


def test_t5_tokenizer_has_one_piece_per_word_and_agrees_with_auto_tokenizer(t5):
    tokenizer, encoder = t5
    assert tokenizer.tokenize(CAPTION) == [f"▁{word}" for word in CAPTION.split()]
    auto = AutoTokenizer.from_pretrained(TINY / "t5" / "tokenizer")
    for text in ("", CAPTION, PHOTO):
        assert auto(text).input_ids == tokenizer(text).input_ids
    assert len(tokenizer) == encoder.config.vocab_size


def test_t5_tokenizer_agrees_with_sentencepiece(t5):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "t5" / "tokenizer" / "spiece.model"))
    assert (reference.pad_id(), reference.eos_id(), reference.unk_id()) == (0, 1, 2)
    for text in (CAPTION, "a trowel and a redstart in the yard"):
        assert t5[0](text).input_ids == [*reference.encode(text), 1]


def test_t5_embeddings_show_the_order_of_words(t5):
    original, swapped = encode_t5(t5, CAPTION), encode_t5(t5, SWAPPED)
    red, blue = CAPTION.split().index("red"), CAPTION.split().index("blue")
    # The same word in the other place, in units of the embedding's own length.
    for a, b in ((original[red], swapped[blue]), (original[blue], swapped[red])):
        assert (a - b).norm() / a.norm() > 0.25
    circle = CAPTION.split().index("circle")
    assert (original[circle] - swapped[circle]).norm() / original[circle].norm() > 0.05


def test_clip_tokenizer_makes_77_tokens_padded_with_the_end_token(clip):
    tokenizer, encoder = clip
    ids = tokenizer(CAPTION, padding="max_length", max_length=77).input_ids
    words = len(CAPTION.split())
    assert len(ids) == 77
    assert ids[0] == encoder.config.bos_token_id
    assert set(ids[words + 1 :]) == {encoder.config.eos_token_id}
    assert encoder.config.eos_token_id not in ids[: words + 1]
    assert len(set(tokenizer(" ".join(sorted(set(CAPTION.split())))).input_ids)) == len(set(CAPTION.split())) + 2


def test_tokenizers_read_unknown_words(t5, clip):
    assert encode_t5(t5, PHOTO).isfinite().all()
    assert encode_t5(t5, "").shape == (1, 64)
    assert encode_clip(clip, [PHOTO, ""]).isfinite().all()
    assert max(clip[0](PHOTO * 9).input_ids) < clip[1].config.vocab_size
    assert max(t5[0](PHOTO * 9).input_ids) < t5[1].config.vocab_size


def all_captions():
    return [
        f"a {size} {color} {shape} {place} on a {ground} background"
        for size in ("small", "large")
        for color in ("red", "green", "blue", "white")
        for shape in ("circle", "square", "star", "ring")
        for place in ("on the left", "at the top", "in the middle")
        for ground in ("red", "green", "blue", "white")
        if color != ground
    ]


def assert_readable(features, labels):
    """A least-squares fit on the features [N, D] of some captions names the attributes of others."""
    features = torch.cat([features.double(), torch.ones(len(features), 1)], dim=1)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    fit, check = order[:200], order[200:]
    for attribute in range(labels.shape[1]):
        wanted = torch.nn.functional.one_hot(labels[:, attribute]).double()
        weights = torch.linalg.lstsq(features[fit], wanted[fit]).solution
        named = (features[check] @ weights).argmax(dim=1)
        assert (named == labels[check, attribute]).float().mean() > 0.9


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_clip_tower_tells_captions_apart_for_a_linear_reader(clip, make_tiny, clip_skip):
    captions = all_captions()
    assert_readable(encode_clip(clip, captions, clip_skip).mean(dim=1), make_tiny.caption_labels(captions))


@torch.no_grad()
def test_sdxls_second_tower_tells_captions_apart_in_its_tokens_and_its_pooled_output(make_tiny):
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "clip_g" / "tokenizer")
    tower = CLIPTextModelWithProjection.from_pretrained(TINY / "clip_g" / "text_encoder")
    captions, labels = all_captions(), make_tiny.caption_labels(all_captions())
    ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert tokenizer.pad_token_id == 0 and (ids[:, -1] == 0).all()
    states = tower(ids, output_hidden_states=True)
    assert_readable(states.hidden_states[-2].mean(dim=1), labels)
    assert_readable(states.text_embeds, labels)


@pytest.mark.parametrize("stage", ["unet", "sdxl_unet", "t5"])
def test_make_tiny_reproduces_what_is_shipped(make_tiny, tmp_path, stage):
    assert run_script("models/make_tiny.py", "--stage", stage, "--out", tmp_path) == 0
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert made == sorted(path.relative_to(TINY) for path in (TINY / stage).rglob("*") if path.is_file())
    for path in made:
        if path.suffix == ".safetensors":
            made_tensors, shipped = load_file(tmp_path / path), load_file(TINY / path)
            assert made_tensors.keys() == shipped.keys()
            assert all(torch.equal(made_tensors[name], shipped[name]) for name in shipped)
        elif path.name != "config.json":  # names the library's version
            assert (tmp_path / path).read_bytes() == (TINY / path).read_bytes()


@pytest.mark.parametrize(("part", "more"), [("clip", {}), ("clip_g", {"pad_token": "!"})])
def test_make_tiny_reproduces_the_clip_tokenizers(part, more, make_tiny, tmp_path):
    make_tiny.write_clip_tokenizer(tmp_path, **more)
    for path in (TINY / part / "tokenizer").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_make_tiny_knows_every_word_of_the_captions(make_tiny, monkeypatch):
    monkeypatch.syspath_prepend(REPO / "dataset_scripts")
    scenes = importlib.import_module("draw_shapes").all_scenes()
    assert {word for scene in scenes for word in scene.caption.split()} == set(make_tiny.WORDS)
