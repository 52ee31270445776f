"""cache/create_sdxl_text.py and SDXL's time ids, against diffusers' own pipeline and its training script."""

import json
import shutil

import pytest
import torch
from cache_fixtures import changed, save_pictures, sidecars
from helpers import run_script
from sdxl_fixtures import POOLED, WIDTHS, ids_of_training_script, load_pipeline, make_sdxl
from transformers import CLIPTextModel, CLIPTokenizer

from cachetrain.caching.images import cover_box
from cachetrain.data.sidecar import read_header, read_sidecar
from cachetrain.modeling.conditioning import Conditioning
from cachetrain.modeling.text_encoders import SdxlTextEncoder, encode_like_cache

CAPTIONS = {
    "a": "a small red circle on the left on a blue background",
    "b": "a cat",
    "c": "",
    "d": "a large green star in the center on a yellow background " * 12,
    "e": "a cat",
}
# How far a sidecar may be from diffusers' result in float32, for encoder and sidecar of this dtype.
TOLERANCE = {"fp32": {"rtol": 1e-4, "atol": 1e-5}, "bf16": {"rtol": 2e-2, "atol": 6e-2}}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data"
    save_pictures(folder, [f"{name}.png" for name in CAPTIONS], size=(8, 8))
    for name, caption in CAPTIONS.items():
        (folder / f"{name}.txt").write_text(caption + "\n")
    return folder


def cache(root, model, *flags):
    return run_script("cache/create_sdxl_text.py", "--data_root", root, "--model", model, *flags)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sidecar_holds_what_diffusers_pipeline_encodes(root, model_sdxl, dtype):
    assert cache(root, model_sdxl, "--dtype", dtype, "--store_dtype", dtype, "--batch_size", 2) == 0
    pipeline = load_pipeline(model_sdxl)
    for name, caption in zip(CAPTIONS, map(str.strip, CAPTIONS.values()), strict=True):
        tensors, header = read_sidecar(root / f"{name}.txt_sdxl")
        assert {key: tuple(t.shape) for key, t in tensors.items()} == {"emb": (77, sum(WIDTHS)), "pooled": (POOLED,)}
        if caption:
            emb, _, pooled, _ = pipeline.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
            torch.testing.assert_close(tensors["emb"].float(), emb[0], **TOLERANCE[dtype])
            torch.testing.assert_close(tensors["pooled"].float(), pooled[0], **TOLERANCE[dtype])
        assert header.metadata["truncated"] == str(int(name == "d"))


@pytest.mark.parametrize("force_zeros", [True, False])
def test_null_is_what_the_model_takes_without_a_negative_prompt(root, tmp_path, force_zeros):
    model = make_sdxl(tmp_path / "model", force_zeros)
    assert cache(root, model, "--store_dtype", "fp32") == 0
    _, emb, _, pooled = load_pipeline(model).encode_prompt("a cat", device="cpu")  # the unconditional half
    for name in ("_null_caption", "c"):  # an empty caption is the empty caption, wherever it comes from
        tensors, header = read_sidecar(root / f"{name}.txt_sdxl")
        torch.testing.assert_close(tensors["emb"], emb[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tensors["pooled"], pooled[0], rtol=1e-4, atol=1e-5)
        assert bool(tensors["emb"].any()) is not force_zeros
        settings = json.loads(header.metadata["settings"])
        assert settings["force_zeros_for_empty_prompt"] is force_zeros
    # A model of which only the other setting is changed makes other caches.
    sampled = encode_like_cache(model, "txt_sdxl", settings, ["", "a cat"])
    assert torch.equal(sampled[0]["emb"], tensors["emb"]) and sampled[1]["emb"].any()


def test_equal_captions_are_encoded_once_and_fresh_sidecars_skipped(root, model_sdxl, monkeypatch, tmp_path):
    encoded, tensors_of = [], SdxlTextEncoder.tensors_of
    monkeypatch.setattr(SdxlTextEncoder, "tensors_of", lambda self, ids: encoded.extend(ids) or tensors_of(self, ids))
    assert cache(root, model_sdxl) == 0
    assert len(encoded) == len(set(map(tuple, encoded))) == len({*CAPTIONS.values(), ""})
    before = sidecars(root, ".txt_sdxl")
    assert cache(root, model_sdxl) == 0
    assert changed(before, sidecars(root, ".txt_sdxl")) == []
    # Another setting of the null, and another second encoder, make all of them stale.
    for number, change in enumerate(({"force_zeros": False}, {"seed": 1})):
        assert cache(root, make_sdxl(tmp_path / str(number), **change)) == 0
        after = sidecars(root, ".txt_sdxl")
        assert changed(before, after) == sorted(after)
        before = after


@pytest.mark.parametrize("max_length", [77, 152, 227])
def test_windows_are_encoded_apart_and_joined(root, model_sdxl, model_sd, max_length):
    """Against each window of 75 words encoded by hand, for both kinds of CLIP caches."""
    words = ("a large green star on the left on a yellow background " * 25).split()
    (root / "d.txt").write_text(" ".join(words))
    flags = ("--max_length", max_length, "--store_dtype", "fp32")
    assert cache(root, model_sdxl, *flags) == 0
    assert run_script("cache/create_clipl.py", "--data_root", root, "--model", model_sd, *flags) == 0
    pipeline, tower = load_pipeline(model_sdxl), CLIPTextModel.from_pretrained(model_sd / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(model_sd / "tokenizer")
    words = tokenizer(" ".join(words)).input_ids[1:-1]
    windows = [tokenizer.decode(words[i : i + 75]) for i in range(0, max_length - 2, 75)]
    sdxl = [pipeline.encode_prompt(text, device="cpu", do_classifier_free_guidance=False) for text in windows]
    with torch.no_grad():
        clip = [tower(tokenizer(text, padding="max_length", return_tensors="pt").input_ids)[0][0] for text in windows]
    found = {suffix: read_sidecar(root / f"d{suffix}") for suffix in (".txt_sdxl", ".txt_clipl")}
    for suffix, parts in ((".txt_sdxl", [window[0][0] for window in sdxl]), (".txt_clipl", clip)):
        expected = torch.cat([parts[0][:1], *(part[1:76] for part in parts), parts[-1][76:]])
        tensors, header = found[suffix]
        assert tensors["emb"].shape[0] == max_length
        torch.testing.assert_close(tensors["emb"], expected, rtol=1e-4, atol=1e-5)
        assert json.loads(header.metadata["settings"]).get("max_length", 77) == max_length
        [again] = encode_like_cache(
            model_sdxl if "sdxl" in suffix else model_sd, header.metadata["kind"],
            json.loads(header.metadata["settings"]), [" ".join((root / "d.txt").read_text().split())],
        )  # fmt: skip
        assert torch.equal(again["emb"], tensors["emb"])
    torch.testing.assert_close(found[".txt_sdxl"][0]["pooled"], sdxl[0][2][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("script", "model", "message"),
    [
        ("create_sdxl_text.py", "model_sd", "with one CLIP encoder, expected SDXL's two .*use cache/create_clipl.py"),
        ("create_sdxl_text.py", "model_t5", "with T5, expected SDXL's two .*use cache/create_t5cache_768.py"),
        ("create_clipl.py", "model_sdxl", "with SDXL's two CLIP encoders, expected one .*use cache/create_sdxl_t"),
        ("create_t5cache_768.py", "model_sdxl", "with SDXL's two CLIP encoders, expected T5; use cache/create_sdxl_"),
    ],
)  # fmt: skip
def test_script_names_the_one_for_the_model(root, request, script, model, message):
    with pytest.raises(ValueError, match=message):
        run_script(f"cache/{script}", "--data_root", root, "--model", request.getfixturevalue(model))
    assert not list(root.glob("*.txt_*"))


def broken(model, out, how):
    shutil.copytree(model, out)
    if how.startswith("no "):
        shutil.rmtree(out / how.removeprefix("no "))
    elif how == "swapped":
        (out / "text_encoder").rename(out / "x")
        (out / "text_encoder_2").rename(out / "text_encoder")
        (out / "x").rename(out / "text_encoder_2")
    else:
        path = out / "tokenizer_2" / "tokenizer.json"
        content = json.loads(path.read_text())
        words = content["model"]["vocab"]
        words["red</w>"], words["a</w>"] = words["a</w>"], words["red</w>"]
        path.write_text(json.dumps(content))
    return out


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no text_encoder", "has no component 'text_encoder'"),
        ("no text_encoder_2", "has no component 'text_encoder_2'"),
        ("no tokenizer_2", "has no component 'tokenizer_2'"),
        ("swapped", "model/text_encoder_2: this CLIPTextModel has no projection .* bigG the second"),
        ("another vocabulary", "model/tokenizer and .*/model/tokenizer_2: the vocabularies differ"),
    ],
)  # fmt: skip
def test_pair_of_encoders_that_is_not_sdxls_is_refused_by_name(root, model_sdxl, tmp_path, how, message):
    with pytest.raises(ValueError, match=message):
        cache(root, broken(model_sdxl, tmp_path / "model", how))
    assert not list(root.glob("*.txt_*"))


# Time ids


def header_of(width, height, target_width, target_height, box=None):
    box = box or cover_box((width, height), target_width, target_height)
    fields = {"width": target_width, "height": target_height, "original_width": width, "original_height": height}
    return {key: str(value) for key, value in fields.items()} | {"crop_box": ",".join(f"{edge:g}" for edge in box)}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((2048, 1024), (1024, 1024)), ((1000, 1500), (1000, 1000)), ((64, 64), (1024, 1024)),
        ((300, 400), (896, 1152)), ((1024, 1024), (1024, 1024)), ((4032, 3024), (1152, 896)),
        ((640, 480), (512, 512)), ((513, 512), (512, 512)),
    ],
)  # fmt: skip
def test_time_ids_are_those_of_diffusers_training_script(size, target, flip):
    ids = Conditioning("txt_sdxl").of_image(header_of(*size, *target), flip)["time_ids"]
    expected = torch.tensor(ids_of_training_script(*size, *target))
    assert ids.dtype == torch.int64 and ids[[0, 1, 4, 5]].tolist() == expected[[0, 1, 4, 5]].tolist()
    # The script crops from an image resized to whole pixels, so that half a pixel may be rounded the other way.
    exact = all(side * max(t / s for t, s in zip(target, size, strict=True)) % 2 == 0 for side in size)
    assert (ids - expected).abs().max() <= (0 if exact else 1)


def test_time_ids_of_a_crop_off_the_center_are_mirrored_with_the_image():
    # 400 x 200, resized to 200 x 100; the crop 100 x 100 begins at 30 of 200 pixels.
    header = header_of(400, 200, 100, 100, box=(60, 0, 260, 200))
    assert Conditioning("txt_sdxl").of_image(header)["time_ids"].tolist() == [200, 400, 0, 30, 100, 100]
    assert Conditioning("txt_sdxl").of_image(header, True)["time_ids"].tolist() == [200, 400, 0, 70, 100, 100]


def test_buckets_and_flip_of_the_image_script_give_the_time_ids_of_each_image(tmp_path, model_sdxl):
    sizes = {"wide": (200, 100), "tall": (90, 160), "square": (72, 72)}
    for name, size in sizes.items():
        save_pictures(tmp_path, [f"{name}.png"], size)
    flags = ("--bucket", "--resolution", 128, "--flip", "--num_workers", 0)
    assert run_script("cache/create_img_sdxl.py", "--data_root", tmp_path, "--model", model_sdxl, *flags) == 0
    for name, size in sizes.items():
        metadata = read_header(tmp_path / f"{name}.img_sdxl").metadata
        target = int(metadata["width"]), int(metadata["height"])
        for flip in (False, True):
            ids = Conditioning("txt_sdxl").of_image(metadata, flip)["time_ids"]
            assert (ids - torch.tensor(ids_of_training_script(*size, *target))).abs().max() <= 1


def test_images_without_a_header_get_the_constant_or_an_error_that_names_the_flag():
    constant = (1, 2, 3, 4, 5, 6)
    assert tuple(Conditioning("txt_sdxl", time_ids=constant).of_image({})["time_ids"]) == constant
    with pytest.raises(ValueError, match=r"lacks them \('height'\); run the image cache .* or pass --time_ids"):
        Conditioning("txt_sdxl").of_image({})
