"""cache/create_clipl.py and create_t5cache_768.py: embeddings are the encoders', captions are found and tracked."""

import json
import re
import shutil

import pytest
import torch
from cache_fixtures import changed, make_custom_pipeline, make_pipeline, save_pictures, sidecars, touch
from diffusers import StableDiffusionPipeline
from helpers import run_script
from PIL import Image
from skimage import data as photographs
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from cachetrain.caching import text_run
from cachetrain.data import captions, walk
from cachetrain.data.sidecar import read_header, read_sidecar
from cachetrain.modeling.t5_projection import T5Projection
from cachetrain.modeling.text_encoders import TextEncoder

CLIP, T5 = ".txt_clipl", ".txt_t5cache"
CAPTIONS = {
    "a": "a small red circle on the left on a blue background",
    "b": "a cat",
    "c": "",
    "d": "a large green star in the center on a yellow background " * 12,
    "e": "a tiny photograph (1923) of a cross, black & white",
}


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    """The embedded CLIP pipeline with a random text tower of five layers."""
    model = make_pipeline(tmp_path_factory.mktemp("models") / "clip", "clip")
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    torch.manual_seed(0)
    tower = CLIPTextModel(CLIPTextConfig(**config | {"num_hidden_layers": 5}))
    for norm in [module for module in tower.modules() if isinstance(module, torch.nn.LayerNorm)]:
        torch.nn.init.normal_(norm.weight, 1, 0.2)  # so that a forgotten or doubled norm shows
        torch.nn.init.normal_(norm.bias, 0, 0.2)
    tower.save_pretrained(model / "text_encoder")
    return model


@pytest.fixture(scope="module")
def t5_model(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("models") / "t5", "t5")


@pytest.fixture
def root(tmp_path):
    """Five captioned pictures."""
    folder = tmp_path / "data"
    save_pictures(folder, [f"{name}.png" for name in CAPTIONS], size=(8, 8))
    for name, caption in CAPTIONS.items():
        (folder / f"{name}.txt").write_text(caption + "\n")
    return folder


@pytest.fixture
def clip_cache(clip_model, root):
    return lambda *argv: run_script("cache/create_clipl.py", "--data_root", root, "--model", clip_model, *argv)


@pytest.fixture
def t5_cache(t5_model, root):
    return lambda *argv: run_script("cache/create_t5cache_768.py", "--data_root", root, "--model", t5_model, *argv)


def emb(path):
    return read_sidecar(path)[0]["emb"]


# What is encoded


@pytest.mark.parametrize("clip_skip", range(5))
def test_clip_embeddings_are_those_of_the_stable_diffusion_pipeline(clip_cache, clip_model, root, clip_skip):
    assert clip_cache("--clip_skip", clip_skip, "--store_dtype", "fp32") == 0
    tower = CLIPTextModel.from_pretrained(clip_model / "text_encoder", dtype=torch.float32).eval()
    # Where that pipeline looks for the tower's own norm in transformers 4.
    tower.__dict__.setdefault("text_model", tower)
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=tower, tokenizer=CLIPTokenizer.from_pretrained(clip_model / "tokenizer"), unet=None,
        scheduler=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    # Its clip_skip counts the layers left out: none, and 1 for the penultimate that web UIs call 2.
    theirs = clip_skip - 1 if clip_skip else None
    for name, caption in [*CAPTIONS.items(), ("_null_caption", "")]:
        expected, _ = pipeline.encode_prompt(caption.strip(), "cpu", 1, False, clip_skip=theirs)
        torch.testing.assert_close(emb(root / f"{name}{CLIP}"), expected[0], rtol=1e-4, atol=1e-5)
    assert read_header(root / "d.txt_clipl").metadata["truncated"] == "1"


def test_clip_skip_changes_the_embeddings_but_1_is_0(clip_cache, root):
    found = []
    for clip_skip in range(4):
        clip_cache("--clip_skip", clip_skip, "--store_dtype", "fp32")
        found.append(emb(root / f"a{CLIP}"))
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[1], found[2], atol=0.1) and not torch.allclose(found[2], found[3], atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("raw", [False, True])
def test_t5_batches_equal_each_caption_alone_without_padding(t5_cache, t5_model, root, raw):
    flags = ("--raw",) if raw else ()
    near = {f"n{index}": "red " * (12 + index) for index in range(6)}  # of like length: these share batches
    save_pictures(root, [f"{name}.png" for name in near], size=(8, 8))
    for name, caption in near.items():
        (root / f"{name}.txt").write_text(caption)
    assert t5_cache("--max_length", 32, "--store_dtype", "fp32", "--batch_size", 3, *flags) == 0
    encoder = T5EncoderModel.from_pretrained(t5_model / "text_encoder", dtype=torch.float32).eval()
    tokenizer = T5Tokenizer.from_pretrained(t5_model / "tokenizer")
    projection = T5Projection.from_pretrained(t5_model / "projection")
    for name, caption in [*CAPTIONS.items(), *near.items(), ("_null_caption", "")]:
        ids = tokenizer(caption.strip(), truncation=True, max_length=32, return_tensors="pt").input_ids
        expected = encoder(ids).last_hidden_state[0]
        stored = emb(root / f"{name}{T5}")
        assert stored.shape == (ids.shape[1], 64 if raw else 48) and ids[0, -1] == tokenizer.eos_token_id
        torch.testing.assert_close(stored, expected if raw else projection(expected), rtol=1e-4, atol=1e-4)
    assert emb(root / f"d{T5}").shape[0] == 32 and emb(root / f"_null_caption{T5}").shape[0] == 1


def test_embeddings_are_bfloat16_with_token_counts_in_the_header(clip_cache, t5_cache, root, capsys):
    assert clip_cache() == 0 and t5_cache("--max_length", 32) == 0
    clip, t5 = read_header(root / "b.txt_clipl"), read_header(root / "b.txt_t5cache")
    assert clip.dtypes == t5.dtypes == {"emb": "BF16"}
    assert clip.shapes["emb"] == (77, 64) and t5.shapes["emb"][0] == int(t5.metadata["num_tokens"]) < 32
    assert 2 < int(clip.metadata["num_tokens"]) < 77
    assert t5.metadata["truncated"] == "0" and read_header(root / "d.txt_t5cache").metadata["truncated"] == "1"
    out = capsys.readouterr().out
    assert "1 caption truncated" in out and "2 captions truncated" in out


def test_photographs_through_both_text_scripts(clip_cache, t5_cache, root):
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(photographs, name)()).save(root / f"{name}_(1).png")
    assert clip_cache() == 0 and t5_cache() == 0
    for suffix in (CLIP, T5):
        found = sidecars(root, suffix)
        assert len(found) == len(CAPTIONS) + 4 + 1 and "rocket_(1)" in found


# Captions


def test_caption_comes_from_txt_then_caption_then_file_name(tmp_path):
    def caption(image, **files):
        for suffix, text in files.items():
            (tmp_path / image).with_suffix(f".{suffix}").write_bytes(text)
        (tmp_path / image).touch()
        pairs = {pair.image: pair for pair in walk.find_images([tmp_path], None)}
        return captions.read_caption(pairs[str(tmp_path / image)]).text

    assert caption("1.png", txt=b" from txt\n", caption=b"from caption") == "from txt"
    assert caption("2.png", caption="\ufefffrom caption é".encode()) == "from caption é"
    assert caption("a man riding_(1).png") == "a man riding"
    assert caption("a man.webp") == "a man"
    assert caption("v1.5 of it_2.jpg") == "v1.5 of it"
    assert caption("empty file_1.png", txt=b"") == ""


def test_identical_captions_are_encoded_once(t5_cache, root, monkeypatch, capsys):
    for name in CAPTIONS:
        (root / f"{name}.txt").write_text("the same" if name != "a" else "another")
    encoded, encode_ids = [], TextEncoder.encode_ids
    monkeypatch.setattr(TextEncoder, "encode_ids", lambda self, ids: encoded.extend(ids) or encode_ids(self, ids))
    assert t5_cache() == 0
    assert len(encoded) == 3  # "the same", "another", ""
    assert "6 encoded" in capsys.readouterr().out
    assert torch.equal(emb(root / f"b{T5}"), emb(root / f"e{T5}"))


def test_identical_captions_are_encoded_once_also_when_they_are_read_in_several_windows(t5_cache, root, monkeypatch):
    monkeypatch.setattr(text_run, "_WINDOW", 4)
    words = ["red", "red", "blue", "red", "star", "blue", "red", "ring", "red", "cat", "red", "star"]
    for index, word in enumerate(words):
        (root / f"n{index:02}.txt").write_text(word)
    save_pictures(root, [f"n{index:02}.png" for index in range(len(words))], size=(8, 8))
    (root / "n05.txt").write_bytes(b"\xff")  # not UTF-8: reported, and in nobody's way
    encoded, encode_ids = [], TextEncoder.encode_ids
    monkeypatch.setattr(TextEncoder, "encode_ids", lambda self, ids: encoded.extend(ids) or encode_ids(self, ids))
    assert t5_cache() == 1
    distinct = {*words, *CAPTIONS.values()}  # "" of the null caption is one of them
    assert len(encoded) == len(distinct) == len(set(map(tuple, encoded)))
    assert len(sidecars(root, T5)) == len(words) - 1 + len(CAPTIONS) + 1
    assert torch.equal(emb(root / f"n00{T5}"), emb(root / f"n10{T5}"))


# Root mean square of the error relative to that of the embeddings, of each dtype against float32.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_t5_embeddings_of_each_dtype_are_those_of_float32_to_its_rounding(t5_cache, t5_model, root, dtype):
    assert t5_cache("--dtype", dtype, "--store_dtype", "fp32", "--raw", "--batch_size", 3) == 0
    encoder = T5EncoderModel.from_pretrained(t5_model / "text_encoder", dtype=torch.float32).eval()
    tokenizer = T5Tokenizer.from_pretrained(t5_model / "tokenizer")
    for name, caption in CAPTIONS.items():
        expected = encoder(tokenizer(caption.strip(), return_tensors="pt").input_ids).last_hidden_state[0]
        error = (emb(root / f"{name}{T5}") - expected).norm() / expected.norm()
        assert error < TOLERANCE[dtype]
    assert dtype == "fp32" or error > TOLERANCE["fp32"]  # it was not float32 after all


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_clip_embeddings_of_each_dtype_are_those_of_float32_to_its_rounding(clip_cache, clip_model, root, dtype):
    assert clip_cache("--dtype", dtype, "--store_dtype", "fp32", "--batch_size", 3) == 0
    tower = CLIPTextModel.from_pretrained(clip_model / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_model / "tokenizer")
    for name, caption in CAPTIONS.items():
        ids = tokenizer(caption.strip(), padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        expected = tower(ids.input_ids).last_hidden_state[0]
        error = (emb(root / f"{name}{CLIP}") - expected).norm() / expected.norm()
        assert error < TOLERANCE[dtype]
    assert dtype == "fp32" or error > TOLERANCE["fp32"]


def test_captions_of_like_length_share_batches(t5_cache, root, monkeypatch):
    for index in range(40):
        (root / f"n{index}.txt").write_text("red " * (1 + index * 7 % 40))
    save_pictures(root, [f"n{index}.png" for index in range(40)], size=(8, 8))
    padding, encode_ids = [], TextEncoder.encode_ids

    def counting(self, ids):
        lengths = [len(row) for row in ids]
        padding.append((max(lengths) * len(ids) - sum(lengths), sum(lengths)))
        return encode_ids(self, ids)

    monkeypatch.setattr(TextEncoder, "encode_ids", counting)
    assert t5_cache("--batch_size", 4) == 0
    wasted, used = map(sum, zip(*padding, strict=True))
    assert wasted < 0.1 * used


# Only what is needed


def test_second_run_encodes_nothing_and_writes_nothing(clip_cache, root, monkeypatch, capsys):
    clip_cache()
    before = sidecars(root, CLIP)
    monkeypatch.setattr("cachetrain.modeling.text_encoders.TextEncoder", None)
    assert clip_cache() == 0 and sidecars(root, CLIP) == before
    assert re.search(r"0 encoded, 6 fresh, .* captions/s", capsys.readouterr().out)


def test_changed_caption_is_encoded_again_and_touched_one_is_not(t5_cache, root):
    t5_cache()
    before = sidecars(root, T5)
    (root / "a.txt").write_text("something else")
    assert t5_cache() == 0
    after = sidecars(root, T5)
    assert changed(before, after) == ["a"]
    touch(root / "b.txt")
    (root / "e.txt").write_text(f"  {CAPTIONS['e']}\n\n")  # another file, the same caption
    old = emb(root / f"e{T5}")
    assert t5_cache() == 0
    assert changed(after, sidecars(root, T5)) == ["b", "e"]  # headers only
    assert torch.equal(emb(root / f"e{T5}"), old)
    settled = sidecars(root, T5)
    assert t5_cache() == 0 and sidecars(root, T5) == settled


def test_caption_that_moves_to_another_source_is_noticed(t5_cache, root):
    t5_cache()
    before = sidecars(root, T5)
    (root / "b.txt").unlink()
    (root / "b.caption").write_text("from another file")
    (root / "c.txt").unlink()  # now the file name: "c"
    assert t5_cache() == 0
    assert changed(before, sidecars(root, T5)) == ["b", "c"]


@pytest.mark.parametrize(
    ("first", "second"), [((), ("--clip_skip", 2)), ((), ("--store_dtype", "fp32")), ((), ("--dtype", "bf16"))]
)
def test_changed_clip_setting_encodes_all_again(clip_cache, first, second, capsys):
    clip_cache(*first)
    assert clip_cache(*second) == 0 and "6 encoded (6 stale), 0 fresh" in capsys.readouterr().out


def test_changed_projection_encodes_all_t5_again(root, tmp_path, capsys):
    model = make_pipeline(tmp_path / "t5", "t5")
    run = ["cache/create_t5cache_768.py", "--data_root", root, "--model", model]
    assert run_script(*run) == 0
    torch.manual_seed(1)
    T5Projection(64, 48).save_pretrained(model / "projection")
    assert run_script(*run) == 0
    assert "6 encoded (6 stale)" in capsys.readouterr().out
    assert run_script(*run, "--raw") == 0 and run_script(*run, "--raw") == 0


def test_run_tells_what_it_does_not_use_and_whose_images_are_gone(clip_cache, root, capsys):
    assert clip_cache() == 0
    assert "not used" not in (output := capsys.readouterr()).out and "no image beside" not in output.err
    image = next(root.glob("*.png"))
    image.unlink()
    (root / "metadata.jsonl").touch()
    assert clip_cache() == 0
    output = capsys.readouterr()
    assert "found and not used: 1 *.jsonl (metadata.jsonl)" in output.out
    gone = "no image beside 1 *.txt_clipl, which train all the same"
    assert f"{gone}; to delete them: cache/cache_status.py --data_root {root} --prune" in output.err


def test_null_caption_is_one_per_data_root_and_made_again_when_gone(clip_model, root, tmp_path):
    save_pictures(tmp_path / "second", ["sub/x.png"], size=(8, 8))
    run = ["cache/create_clipl.py", "--data_root", root, "--data_root", tmp_path / "second", "--model", clip_model]
    assert run_script(*run) == 0
    null = root / "_null_caption.txt_clipl"
    assert torch.equal(emb(null), emb(tmp_path / "second" / "_null_caption.txt_clipl"))
    assert torch.equal(emb(null), emb(root / "c.txt_clipl"))
    assert read_header(null).run_identity == read_header(root / "a.txt_clipl").run_identity
    before = sidecars(root, CLIP)
    null.unlink()
    assert run_script(*run) == 0 and changed(before, sidecars(root, CLIP)) == ["_null_caption"]


# What goes wrong


def test_caption_that_is_no_utf8_is_named_and_the_rest_is_cached(t5_cache, root, capsys):
    (root / "b.txt").write_bytes(b"caf\xe9")
    assert t5_cache() == 1
    assert "b.txt: not UTF-8" in capsys.readouterr().err
    assert sorted(sidecars(root, T5)) == ["_null_caption", "a", "c", "d", "e"]


def test_wrong_kind_of_encoder_is_refused(root, clip_model, t5_model):
    for script, model, right in (
        ("create_clipl.py", t5_model, "create_t5cache_768.py"),
        ("create_t5cache_768.py", clip_model, "create_clipl.py"),
    ):
        with pytest.raises(ValueError, match=f"use cache/{right}"):
            run_script(f"cache/{script}", "--data_root", root, "--model", model)


def test_t5_without_a_projection_needs_raw(root, t5_model, tmp_path):
    model = shutil.copytree(t5_model, tmp_path / "model", ignore=shutil.ignore_patterns("projection"))
    with pytest.raises(ValueError, match=r"has no projection/; .* or pass --raw"):
        run_script("cache/create_t5cache_768.py", "--data_root", root, "--model", model)


def test_clip_skip_beyond_the_tower_is_refused(root, tmp_path):
    shallow = make_pipeline(tmp_path / "clip", "clip")  # 3 layers
    with pytest.raises(ValueError, match="only 3 layers"):
        run_script("cache/create_clipl.py", "--data_root", root, "--model", shallow, "--clip_skip", 4)


@torch.no_grad()
def test_repository_code_encodes_only_with_custom(root, tmp_path):
    canary = tmp_path / "canary"
    model = make_custom_pipeline(tmp_path / "model", canary)
    run = ["cache/create_t5cache_768.py", "--data_root", root, "--model", model, "--store_dtype", "fp32"]
    assert run_script(*run, "--raw") == 0 and not canary.exists()
    plain = {name: emb(root / f"{name}{T5}") for name in CAPTIONS}
    assert run_script(*run, "--custom") == 0 and canary.exists()
    for name in CAPTIONS:  # the fixture's code doubles, and cuts at 12 tokens
        tensors, header = read_sidecar(root / f"{name}{T5}")
        assert len(tensors["emb"]) == min(12, len(plain[name]))
        if len(plain[name]) <= 12:
            torch.testing.assert_close(tensors["emb"], 2 * plain[name], rtol=1e-4, atol=1e-4)
        assert header.metadata["truncated"] == str(int(len(plain[name]) > 12))
    settled = sidecars(root, T5)
    assert run_script(*run, "--custom") == 0 and sidecars(root, T5) == settled


def test_model_without_a_projection_says_what_to_do(t5_cache, t5_model, root, tmp_path):
    import shutil

    shutil.copytree(t5_model, tmp_path / "bare", ignore=shutil.ignore_patterns("projection"))
    with pytest.raises(ValueError, match=r"--raw.*--custom"):
        t5_cache("--model", tmp_path / "bare")
    assert t5_cache("--model", tmp_path / "bare", "--raw") == 0


def test_words_that_the_tokenizer_does_not_know_are_counted_and_above_a_tenth_warned_of(t5_model, tmp_path, capsys):
    for number in range(20):
        save_pictures(tmp_path, [f"{number}.png"], size=(8, 8))
        (tmp_path / f"{number}.txt").write_text("red \U0001f600 \U0001f600" if number < 2 else "red")
    command = ["cache/create_t5cache_768.py", "--data_root", tmp_path, "--model", t5_model]
    assert run_script(*command) == 0
    printed = capsys.readouterr()
    line = "words that the tokenizer does not know, in 2 of 20 captions: '\U0001f600' 2"
    assert line in printed.out and "does not know" not in printed.err and "empty" not in printed.out
    (tmp_path / "9.txt").write_text("\U0001f600\x1b[31m")
    assert run_script(*command) == 0
    assert (
        "warning: words that the tokenizer does not know, in 1 of 1 caption: " in (err := capsys.readouterr().err)
        and "\x1b" not in err
    )
    (tmp_path / "9.txt").write_text(" \n")
    assert run_script(*command) == 0
    assert "warning: empty: 1 of 1 caption, " in capsys.readouterr().err
