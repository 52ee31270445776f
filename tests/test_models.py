"""Composed models: they load for their users, and draw for us what they draw for them."""

import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from helpers import TINY, WEIGHTS, render, run_script, weights_of
from PIL import Image
from train_ranks import Ranks, open_trainer
from transformers import T5EncoderModel, T5Tokenizer

from cachetrain.caching.selection import model_fields
from cachetrain.diffusion.noise_schedulers import make_scheduler, sampler_for
from cachetrain.modeling import digests, load
from cachetrain.modeling.files import component_files
from cachetrain.modeling.t5_pipeline import pad_embeddings
from cachetrain.modeling.text_encoders import TextEncoder, encode_like_cache
from cachetrain.sampling.render import grid, sample_name, save_png

torch.set_num_threads(1)
PROMPTS = ["a small red circle on the left on a blue background", "a star"]


def compose(kind, out, *flags, **parts):
    parts = {"unet": TINY / "unet", "vae": TINY / "vae", kind: TINY / kind, "out": out} | parts
    script = {"t5": "models/compose_t5_sd.py", "clip": "models/compose_sd.py"}[kind]
    return run_script(script, *(word for key, value in parts.items() for word in (f"--{key}", value)), *flags)


def noise(seeds):
    return torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_our_samples_of_the_vanilla_flavour_equal_diffusers_pipeline(cfg, model_sd):
    pipe = StableDiffusionPipeline.from_pretrained(model_sd, torch_dtype=torch.float32, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    expected = pipe(PROMPTS, latents=noise([3, 4]), num_inference_steps=5, guidance_scale=cfg).images
    text = TextEncoder(model_sd)
    null, *embeddings = [text.encode_ids(text.tokenize([prompt])[0])[0] for prompt in ["", *PROMPTS]]
    unet, vae = load.load_unet(model_sd / "unet").eval(), load.load_vae(model_sd / "vae")
    scheduler = sampler_for(load.load_scheduler(model_sd / "scheduler"))
    images = render(unet, vae, scheduler, embeddings, null, cfg, [3, 4], 5, "txt_clipl")
    assert np.abs(pixels(images) - pixels(expected)).max() <= 1


def test_our_samples_of_the_t5_flavour_equal_its_pipeline_whatever_the_batch(model_t5):
    pipe = DiffusionPipeline.from_pretrained(
        model_t5, custom_pipeline=str(model_t5), trust_remote_code=True, torch_dtype=torch.float32
    )
    pipe.scheduler = sampler_for(pipe.scheduler)
    settings = {"num_inference_steps": 5, "guidance_scale": 3.0, "negative_prompt": "a green cross"}
    expected = [pipe(prompt, latents=noise([seed]), **settings).images[0] for seed, prompt in enumerate(PROMPTS)]
    text = TextEncoder(model_t5)
    null, *embeddings = [text.encode_ids(text.tokenize([p])[0])[0] for p in ["a green cross", *PROMPTS]]
    unet, vae = load.load_unet(model_t5 / "unet").eval(), load.load_vae(model_t5 / "vae")
    images = render(unet, vae, pipe.scheduler, embeddings, null, 3.0, [0, 1], 5, "txt_t5cache")
    assert np.abs(pixels(images) - pixels(expected)).max() <= 1
    different = pipe(PROMPTS[0], latents=noise([0]), num_inference_steps=5, guidance_scale=3.0).images[0]
    assert np.abs(pixels([different]) - pixels(expected[:1])).max() > 1  # the negative prompt counts


def test_t5_pipeline_encodes_prompts_as_t5_alone_does(model_t5):
    pipe = DiffusionPipeline.from_pretrained(
        model_t5, custom_pipeline=str(model_t5), trust_remote_code=True, torch_dtype=torch.float32
    )
    embeddings, mask = pipe.encode_prompt(PROMPTS)
    assert embeddings.shape[1] % 8 == 0
    tokenizer = T5Tokenizer.from_pretrained(TINY / "t5" / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(TINY / "t5" / "text_encoder", dtype=torch.float32)
    weights = weights_of(model_t5 / "projection")
    scale = json.loads((model_t5 / "projection" / "config.json").read_text())["scaling_factor"]
    for row, keep, prompt in zip(embeddings, mask, PROMPTS, strict=True):
        hidden = encoder(tokenizer(prompt, return_tensors="pt").input_ids).last_hidden_state[0]
        expected = (hidden @ weights["linear.weight"].T + weights["linear.bias"]) * scale
        torch.testing.assert_close(row[keep], expected, rtol=1e-4, atol=1e-5)
        assert not row[~keep].any()


def test_negative_prompts_are_one_for_all_or_one_each(model_t5):
    pipe = DiffusionPipeline.from_pretrained(
        model_t5, custom_pipeline=str(model_t5), trust_remote_code=True, torch_dtype=torch.float32
    )
    settings = {"latents": noise([0, 1]), "num_inference_steps": 2, "output_type": "latent"}
    shared = pipe(PROMPTS, negative_prompt="a ring", **settings).images
    each = pipe(PROMPTS, negative_prompt=["a ring", "a ring"], **settings).images
    torch.testing.assert_close(shared, each)


def test_projection_is_orthogonal_and_gives_unit_variance(model_t5, tmp_path):
    projection = load.load_projection(model_t5 / "projection")
    weight = projection.linear.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(64), rtol=1e-4, atol=1e-5)
    compose("t5", tmp_path / "other", "--seed", "1")
    assert not torch.allclose(weight, load.load_projection(tmp_path / "other" / "projection").linear.weight)


def test_projection_fitted_to_captions_spans_their_principal_components(tmp_path):
    captions = [f"a {c} {s}" for c in ("red", "green", "blue", "white") for s in ("circle", "star", "ring", "cross")]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    unet = tmp_path / "unet"
    config = UNet2DConditionModel.load_config(TINY / "unet") | {"cross_attention_dim": 16}
    UNet2DConditionModel.from_config(config).save_config(unet)
    assert compose("t5", tmp_path / "model", "--fit_captions", str(tmp_path / "captions.txt"), unet=unet) == 0
    text = TextEncoder(tmp_path / "model", raw=True)
    hidden = torch.cat([text.encode_ids(text.tokenize([c])[0])[0] for c in captions])
    centered = (hidden - hidden.mean(0)).double()
    principal = torch.linalg.svd(centered, full_matrices=False).Vh[:16]
    weight = load.load_projection(tmp_path / "model" / "projection").linear.weight.double()
    torch.testing.assert_close(weight.T @ weight, principal.T @ principal, rtol=1e-3, atol=1e-3)  # the same subspace
    projected = load.load_projection(tmp_path / "model" / "projection")(hidden)
    assert projected.std().item() == pytest.approx(1, rel=1e-3)
    assert projected.mean(0).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "captions.txt: contains no captions"), (" \n\n", "contains no captions"), ("a star", "too few to fit")],
)
def test_captions_that_cannot_fit_a_projection_are_refused(text, message, tmp_path):
    (tmp_path / "captions.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        compose("t5", tmp_path / "model", "--fit_captions", str(tmp_path / "captions.txt"))
    assert not (tmp_path / "model").exists()


def test_fresh_unet_comes_from_the_seed_and_leaves_the_global_generator_alone(tmp_path):
    state = torch.random.get_rng_state()
    compose("clip", tmp_path / "a", "--seed", "5")
    assert torch.equal(state, torch.random.get_rng_state())
    compose("clip", tmp_path / "b", "--fresh_unet", "--seed", "5", unet=tmp_path / "a")
    compose("clip", tmp_path / "c", "--fresh_unet", "--seed", "6", unet=tmp_path / "a")
    compose("clip", tmp_path / "d", unet=tmp_path / "c")
    a, b, c, d = (weights_of(tmp_path / x / "unet") for x in "abcd")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert all(torch.equal(c[name], d[name]) for name in c)
    torch.manual_seed(5)
    reference = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(TINY / "unet"))
    assert all(torch.equal(a[name], tensor) for name, tensor in reference.state_dict().items())


def test_parts_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path):
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(TINY / "vae"), latent_channels=8)
    vae.save_pretrained(tmp_path / "vae8")
    with pytest.raises(ValueError, match="expects 4 latent channels, the VAE has 8"):
        compose("clip", tmp_path / "out", vae=tmp_path / "vae8")
    config = UNet2DConditionModel.load_config(TINY / "unet") | {"cross_attention_dim": 32}
    UNet2DConditionModel.from_config(config).save_config(tmp_path / "unet32")
    with pytest.raises(ValueError, match="width 32, the text encoder's have 64"):
        compose("clip", tmp_path / "out", unet=tmp_path / "unet32")
    with pytest.raises(ValueError, match="no such directory"):
        compose("clip", tmp_path / "out", vae=tmp_path / "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unet32", "vae8"]
    compose("clip", tmp_path / "out")
    with pytest.raises(ValueError, match="--overwrite"):
        compose("clip", tmp_path / "out")


def _load_with_its_code(env, argv, folder, rank, moment, cwd):
    open_trainer(env, [], folder / f"rank{rank}.log")
    DiffusionPipeline.from_pretrained(*argv, custom_pipeline=argv[0], trust_remote_code=True)


def test_our_scripts_run_no_code_from_a_model_directory(model_t5, tmp_path):
    model, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(model_t5, model)
    for path in (model / "pipeline.py", model / "projection" / "t5_projection.py"):
        path.write_text(f"open({str(canary)!r}, 'w').close()\n")
    argv = ["--model", model, "--prompt", "a star", "--out", tmp_path / "out", "--sampler_steps", 1]
    assert run_script("sample.py", *argv) == 0
    assert not canary.exists()
    # In a process of its own: diffusers keeps what it imported from one local directory for the next.
    Ranks([model], 1, tmp_path / "process", target=_load_with_its_code).finish()
    assert canary.exists()  # so the canary does sing where code runs


def test_components_of_other_classes_are_refused(tmp_path):
    shutil.copytree(TINY / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "DiffusionPipeline"}))
    with pytest.raises(ValueError, match="not a diffusers autoencoder"):
        load.load_vae(tmp_path / "vae")


def test_a_large_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_RACY_NS", -(10**12))
    hashed, real = [], digests._hash
    monkeypatch.setattr(digests, "_hash", lambda path: hashed.append(path) or real(path))
    file, content = tmp_path / "model.safetensors", bytes(digests.LEAST_BYTES)
    for data in (content, content[:-1] + b"1"):
        file.write_bytes(data)
        os.utime(file, ns=(0, 0))  # the second content has the size and the time of the first
        assert {digests.sha256_of(file) for _ in range(3)} == {hashlib.sha256(data).digest()}
    assert len(hashed) == 2
    for damage in (b"{", b"[]", json.dumps({str(file): [1]}).encode()):
        (tmp_path / "cache" / "cachetrain" / "sha256.json").write_bytes(damage)
        assert digests.sha256_of(file) == hashlib.sha256(data).digest()
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert digests.sha256_of(file) == hashlib.sha256(data).digest()


def vae_fingerprint(directory):
    return load.fingerprint(component_files(directory, "vae"))


def test_fingerprint_follows_weights_and_vocabulary_but_not_bookkeeping(tmp_path):
    shutil.copytree(TINY / "vae", tmp_path / "a")
    original = vae_fingerprint(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"_diffusers_version": "9.9"}, indent=8))
    assert vae_fingerprint(tmp_path / "a") == original
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert vae_fingerprint(tmp_path / "a") != original
    shutil.copyfile(TINY / "vae" / "config.json", tmp_path / "a" / "config.json")
    weights = tmp_path / "a" / WEIGHTS
    data = bytearray(weights.read_bytes())
    weights.with_name("variant.fp16.safetensors").write_bytes(data)  # is not read
    (tmp_path / "a" / "README.txt").write_text("about this VAE")
    assert vae_fingerprint(tmp_path / "a") == original
    data[-1] ^= 1
    weights.write_bytes(data)
    assert vae_fingerprint(tmp_path / "a") != original


def test_sample_script_writes_settings_into_pngs_and_the_same_noise_for_all_cfgs(model_sd, tmp_path):
    argv = ["--model", model_sd, "--prompt", *PROMPTS, "--cfgs", 1, 3, "--sampler_steps", 2, "--seed", 9]
    argv += ["--out", tmp_path, "--grid", tmp_path / "grid.png"]
    assert run_script("sample.py", *argv) == 0
    names = {sample_name(i, prompt, cfg) for i, prompt in enumerate(PROMPTS) for cfg in (1.0, 3.0)}
    assert {path.name for path in tmp_path.iterdir()} == names | {"grid.png"}
    info = Image.open(tmp_path / sample_name(1, PROMPTS[1], 3.0)).text
    assert (info["prompt"], info["seed"], info["cfg"], info["num_inference_steps"]) == (PROMPTS[1], "10", "3", "2")


def test_grid_shows_every_image_under_its_label(tmp_path):
    colors = ["red", "lime", "blue"]
    sheet = grid([Image.new("RGB", (64, 64), c) for c in colors], ["a longer label that must wrap", "b", ""], 2)
    counts = {color: count for count, color in sheet.getcolors(1 << 20)}
    for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        assert counts[color] == 128 * 128
    save_png(sheet, tmp_path / "a" / "b.png", prompt="ünï <b>")
    assert Image.open(tmp_path / "a" / "b.png").text["prompt"] == "ünï <b>"


@pytest.mark.parametrize("side", [128, 512, 1024])
def test_labels_can_be_read_where_a_sheet_is_shown_small(side):
    sheet = grid([Image.new("RGB", (side, side), "white")], ["H"], 1).convert("L")
    _, top, _, bottom = sheet.point(lambda value: 255 * (value < 128)).getbbox()
    assert bottom - top >= side / 25  # a capital letter


def test_sampler_for_v_prediction_keeps_the_models_betas():
    scheduler = make_scheduler("v_prediction", make_scheduler("epsilon"))
    assert sampler_for(scheduler).config.beta_end == 0.012


def test_a_hub_model_is_fetched_by_parts_without_pickles_copies_and_code(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    files = ["model_index.json", "pipeline.py", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "vae/config.json"]
    files += ["vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"]
    files += ["vae/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors", "unet/config.json"]
    bare = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "spiece.model"]
    fetched = {}

    def snapshot_download(model, revision, **patterns):
        fetched[model] = set(filter_repo_objects(files if model == "owner/pipeline" else bare, **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load.resolve_model("owner/pipeline", subfolders=("vae",))
    weights = {name for name in fetched["owner/pipeline"] if not name.endswith(".json")}
    assert weights == {"vae/diffusion_pytorch_model.safetensors"}
    load.resolve_model("owner/pipeline")
    weights = {name for name in fetched["owner/pipeline"] if not name.endswith(".json")}
    assert weights == {"vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors"}
    load.resolve_model("owner/pipeline", code=True)
    assert "pipeline.py" in fetched["owner/pipeline"]
    load.resolve_model("owner/t5", subfolders=("text_encoder", "tokenizer"))
    assert fetched["owner/t5"] == set(bare)


@pytest.mark.parametrize(
    "path",
    ["models/t5_sd15", "output/checkpoint-000001", "here/t5", "here", "sd15", "./t5", "a/b/c", "/a/b", "~/b"],
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(path, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir() if path != "here" else (tmp_path / "here").touch()
    with pytest.raises(ValueError, match=f"{path}: no such directory; "):
        load.resolve_model(path)


def test_a_subfolder_after_a_colon_names_a_component(model_t5, model_sd, tmp_path, monkeypatch):
    import huggingface_hub

    assert load.resolve_model(f"{model_t5}:vae") == (model_t5 / "vae").resolve()
    (tmp_path / "a:b").mkdir()
    assert load.resolve_model(tmp_path / "a:b") == tmp_path / "a:b"  # a directory of the whole name comes first
    for wrong in ("nothing", "", "../t5", "/etc"):
        with pytest.raises(ValueError, match="no such directory"):
            load.resolve_model(f"{model_t5}:{wrong}")
    parts = {"unet": f"{model_t5}:unet", "vae": f"{model_t5}:vae", "clip": f"{model_sd}:text_encoder"}
    assert compose("clip", tmp_path / "new", **parts) == 0  # the tokenizer lies beside the text encoder
    for name in ("vae", "tokenizer"):
        assert load.fingerprint(component_files(tmp_path / "new" / name, name)) == load.fingerprint(
            component_files(model_sd / name, name)
        )
    fetched = []

    def snapshot_download(model, revision, allow_patterns, **_):
        fetched.append((model, allow_patterns))
        return str(model_sd)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load.resolve_model("owner/name:text_encoder") == model_sd / "text_encoder"
    model, patterns = fetched[0]
    assert model == "owner/name"
    assert {pattern.partition("/")[0] for pattern in patterns} == {"text_encoder", "tokenizer"}


def test_headers_name_a_component_by_its_path_or_its_model_and_commit(model_t5, tmp_path):
    local = model_fields(SimpleNamespace(model=f"{model_t5}:vae"), model_t5 / "vae")
    assert local == {"model": str(model_t5 / "vae"), "revision": ""}
    fetched = model_fields(SimpleNamespace(model="owner/name:vae"), tmp_path / "commit" / "vae")
    assert fetched == {"model": "owner/name:vae", "revision": "commit"}


def raw_embeddings(model_dir, prompts):
    """[B, T, 64] of tiny T5 itself, padded, and the mask."""
    text = TextEncoder(model_dir, raw=True)
    return pad_embeddings([text.encode_ids(text.tokenize([prompt])[0])[0] for prompt in prompts])


@pytest.fixture(scope="module")
def narrow_unet(tmp_path_factory):
    """A UNet with weights that takes text of another width (48) than tiny T5's (64)."""
    directory = tmp_path_factory.mktemp("unet48")
    config = UNet2DConditionModel.load_config(TINY / "unet") | {"cross_attention_dim": 48}
    torch.manual_seed(7)
    UNet2DConditionModel.from_config(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("fit", [False, True], ids=["orthogonal", "fitted"])
def test_unet_with_its_own_projection_predicts_as_with_the_frozen_one(fit, narrow_unet, tmp_path):
    flags = []
    if fit:
        colors = ("red", "green", "blue", "white", "black", "orange", "purple", "yellow", "pink")
        (tmp_path / "captions.txt").write_text("\n".join(f"a large {c} star on a {c} circle" for c in colors))
        flags = ["--fit_captions", str(tmp_path / "captions.txt")]
    compose("t5", tmp_path / "frozen", *flags, unet=narrow_unet)
    compose("t5", tmp_path / "own", *flags, "--train_projection", unet=narrow_unet)
    frozen, own = (load.load_unet(tmp_path / name / "unet").eval() for name in ("frozen", "own"))
    assert (load.text_width(frozen.config), load.text_width(own.config)) == (48, 64)
    hidden, mask = raw_embeddings(tmp_path / "own", PROMPTS)
    step = {"timestep": torch.tensor([30, 700]), "encoder_attention_mask": mask}
    with torch.no_grad():
        projected = load.load_projection(tmp_path / "frozen" / "projection")(hidden)
        expected = frozen(noise([0, 1]), encoder_hidden_states=projected, **step).sample
        predicted = own(noise([0, 1]), encoder_hidden_states=hidden, **step).sample
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)
    before, after = UNet2DConditionModel.from_pretrained(narrow_unet).state_dict(), own.state_dict()
    assert after.keys() - before.keys() == {"encoder_hid_proj.weight", "encoder_hid_proj.bias"}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert own.encoder_hid_proj.weight.requires_grad
    assert own.encoder_hid_proj.bias.any().item() == fit


def test_model_that_projects_in_its_unet_draws_the_same_everywhere(narrow_unet, tmp_path):
    compose("t5", tmp_path / "own", "--train_projection", unet=narrow_unet)
    compose("t5", tmp_path / "frozen", unet=narrow_unet)
    assert not (tmp_path / "own" / "projection").exists()
    assert json.loads((tmp_path / "own" / "model_index.json").read_text())["projection"] == [None, None]
    pictures = {}
    for name in ("own", "frozen"):
        path = str(tmp_path / name)
        pipe = DiffusionPipeline.from_pretrained(
            path, custom_pipeline=path, trust_remote_code=True, torch_dtype=torch.float32
        )
        pipe.scheduler = sampler_for(pipe.scheduler)
        settings = {"num_inference_steps": 3, "guidance_scale": 3.0}
        pictures[name] = pixels([pipe(PROMPTS[0], latents=noise([5]), **settings).images[0]])
        argv = ["--model", path, "--prompt", PROMPTS[0], "--out", tmp_path / f"{name}.out", "--seed", 5]
        assert run_script("sample.py", *argv, "--cfgs", 3, "--sampler_steps", 3) == 0
        drawn = pixels([Image.open(tmp_path / f"{name}.out" / sample_name(0, PROMPTS[0], 3.0))])
        assert np.abs(drawn - pictures[name]).max() <= 1
    assert np.abs(pictures["own"] - pictures["frozen"]).max() <= 1


def test_prompts_for_a_unet_with_its_own_projection_are_encoded_raw(narrow_unet, tmp_path):
    compose("t5", tmp_path / "own", "--train_projection", unet=narrow_unet)
    expected, mask = raw_embeddings(tmp_path / "own", PROMPTS[:1])
    for settings in ({"max_length": 256, "raw": True}, {}):
        (embedding,) = encode_like_cache(tmp_path / "own", "txt_t5cache", settings, PROMPTS[:1])
        torch.testing.assert_close(embedding["emb"], expected[0][mask[0]])
    with pytest.raises(ValueError, match=r"own/projection: no such directory.* --raw"):
        encode_like_cache(tmp_path / "own", "txt_t5cache", {"raw": False}, PROMPTS)


def test_composing_with_a_unet_that_has_a_projection_keeps_it_or_makes_it_anew(narrow_unet, tmp_path):
    compose("t5", tmp_path / "own", "--train_projection", unet=narrow_unet)
    weights = weights_of(tmp_path / "own" / "unet")
    compose("t5", tmp_path / "kept", "--seed", "1", unet=tmp_path / "own")
    kept = weights_of(tmp_path / "kept" / "unet")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights.items())
    assert not (tmp_path / "kept" / "projection").exists()
    with pytest.raises(ValueError, match="already has a projection"):
        compose("t5", tmp_path / "out", "--train_projection", unet=tmp_path / "own")
    compose("t5", tmp_path / "fresh", "--fresh_unet", "--seed", "1", unet=tmp_path / "own")
    weight = load.load_unet(tmp_path / "fresh" / "unet").encoder_hid_proj.weight
    rows = weight / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows @ rows.T, torch.eye(48), rtol=1e-4, atol=1e-5)  # orthogonal, not torch's default
    assert not torch.equal(weight, weights["encoder_hid_proj.weight"])
    config = UNet2DConditionModel.load_config(tmp_path / "own" / "unet") | {"encoder_hid_dim": 32}
    UNet2DConditionModel.from_config(config).save_config(tmp_path / "unet32")
    with pytest.raises(ValueError, match="width 32, the text encoder's have 64"):
        compose("clip", tmp_path / "out", unet=tmp_path / "unet32")


def test_text_width_is_what_the_unet_really_takes():
    config = UNet2DConditionModel.load_config(TINY / "unet") | {"cross_attention_dim": 48}
    for entries in ({}, {"encoder_hid_dim": 40}, {"encoder_hid_dim": 40, "encoder_hid_dim_type": "text_proj"}):
        unet = UNet2DConditionModel.from_config(config | entries)
        width = load.text_width(config | entries)
        assert width == load.text_width(unet.config) == (40 if entries else 48)
        unet(noise([0]), torch.tensor([1]), encoder_hidden_states=torch.zeros(1, 8, width))  # or torch would refuse
