"""SDXL models: composed from parts, and drawn as diffusers' own pipeline draws them."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from helpers import FULL_LOG, T5, run_script, train, weights_of
from PIL import Image
from sdxl_fixtures import POOLED, SDXL, copy_with, load_pipeline, make_sdxl

from cachetrain.modeling import conditioning

CFGS = (1, 4, 7)


def compose(out, *flags, **parts):
    words = [word for name, source in parts.items() for word in (f"--{name}", source)]
    return run_script("models/compose_sdxl.py", *words, "--out", out, *flags)


def parts_of(model):
    return dict.fromkeys(("unet", "vae", "clip_l", "clip_g"), model)


def drawn_by_diffusers(model, prompt, negative, seed, size, cfgs=CFGS, scheduler=DDIMScheduler, steps=4):
    """Pictures at each guidance scale, int [len(cfgs), H, W, 3]; `size`: (width, height)."""
    pipeline = load_pipeline(model)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    latents = torch.randn(4, size[1] // 8, size[0] // 8, generator=torch.Generator().manual_seed(seed))[None]
    settings = {"num_inference_steps": steps, "width": size[0], "height": size[1], "negative_prompt": negative}
    images = [pipeline(prompt, latents=latents, guidance_scale=cfg, **settings).images[0] for cfg in cfgs]
    return np.stack([np.asarray(image).astype(int) for image in images])


def pictures(folder, slot=0):
    """Those of the prompt number `slot`, by guidance scale."""
    paths = sorted(folder.glob(f"{slot:02d}*.png"), key=lambda path: float(Image.open(path).text["cfg"]))
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])


@pytest.mark.parametrize(
    ("negative", "size", "sampler", "force_zeros"),
    [
        (None, (64, 64), "ddim", True),
        (None, (64, 64), "ddim", False),
        ("a green star", (64, 96), "euler", True),
        (None, (128, 64), "euler", False),
    ],
)
def test_samples_equal_diffusers_pipeline_to_one_gray_level(negative, size, sampler, force_zeros, tmp_path):
    model = make_sdxl(tmp_path / "model", force_zeros)
    flags = ["--cfgs", *CFGS, "--seed", 5, "--sampler", sampler, "--sampler_steps", 4, "--device", "cpu"]
    flags += ["--width", size[0], "--height", size[1], *(["--negative_prompt", negative] if negative else [])]
    out = tmp_path / "out"
    assert run_script("sample.py", "--model", model, "--prompt", "a red circle", "--out", out, *flags) == 0
    scheduler = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}[sampler]
    expected = drawn_by_diffusers(model, "a red circle", negative, 5, size, scheduler=scheduler)
    assert pictures(out).shape == expected.shape == (3, size[1], size[0], 3)
    assert np.abs(pictures(out) - expected).max() <= 1


def test_samples_in_training_and_of_watch_are_those_of_diffusers(shapes_sdxl, model_sdxl, tmp_path):
    prompts, run = tmp_path / "prompts.json", tmp_path / "run"
    samples = [{"prompt": "a red circle", "negative_prompt": "blue"}, {"prompt": "a star", "size": [128, 64]}]
    prompts.write_text(json.dumps({"samples": samples}))
    flags = ["--max_steps", 2, "--batch_size", 2, "--lr", 1e-3, "--sample_prompts", prompts, "--sampler_steps", 3]
    train(shapes_sdxl, model_sdxl, run, *flags, "--sample_cfgs", *CFGS, suffixes=SDXL)
    folder = run / "samples" / "step-000002"
    for slot, (prompt, negative, size) in enumerate(
        [("a red circle", "blue", (64, 64)), ("a star", None, (128, 64))]
    ):
        expected = drawn_by_diffusers(run / "checkpoint-000002", prompt, negative, slot, size, steps=3)
        assert np.abs(pictures(folder, slot) - expected).max() <= 1
    before = [pictures(folder, slot) for slot in range(2)]
    shutil.rmtree(run / "samples")
    assert run_script("sample.py", "--watch", run, "--device", "cpu") == 0
    assert all((pictures(folder, slot) == before[slot]).all() for slot in range(2))


def test_composed_model_is_the_pipeline_its_parts_came_from(model_sdxl, tmp_path):
    bare = {"unet": model_sdxl / "unet", "vae": model_sdxl / "vae", "clip_l": model_sdxl}
    clip_g = tmp_path / "bigg"  # an encoder and its tokenizer alone, under the names of any pipeline
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(model_sdxl / f"{name}_2", clip_g / name)
    assert compose(tmp_path / "a", **parts_of(model_sdxl)) == 0
    assert compose(tmp_path / "b", **bare, clip_g=clip_g) == 0
    expected = load_pipeline(model_sdxl)
    for name in "ab":
        pipeline = load_pipeline(tmp_path / name)
        assert pipeline.config.force_zeros_for_empty_prompt is True
        for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
            found = getattr(pipeline, component).state_dict()
            assert all(torch.equal(found[key], t) for key, t in getattr(expected, component).state_dict().items())
        assert pipeline.tokenizer_2.pad_token == expected.tokenizer_2.pad_token != pipeline.tokenizer.pad_token


def test_second_encoder_that_is_only_a_variant_names_the_command_that_keeps_its_projection(model_sdxl, tmp_path):
    model = shutil.copytree(model_sdxl, tmp_path / "model")
    weights = model / "text_encoder_2" / "model.safetensors"
    weights.rename(weights.with_name("model.fp16.safetensors"))
    with pytest.raises(ValueError, match=r"only the variant .* import CLIPTextModelWithProjection as M"):
        compose(tmp_path / "out", **parts_of(model_sdxl) | {"clip_g": model})


def test_the_empty_prompt_is_that_of_the_unets_pipeline(tmp_path):
    model = make_sdxl(tmp_path / "model", force_zeros=False)
    assert compose(tmp_path / "out", "--fresh_unet", "--seed", 3, "--objective", "flow", **parts_of(model)) == 0
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is False
    before, after = weights_of(model / "unet"), weights_of(tmp_path / "out" / "unet")
    assert before.keys() == after.keys() and not torch.equal(before["conv_in.weight"], after["conv_in.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet": "sd"}, r"^{model_sd}/unet: this UNet is not SDXL's; .* use models/compose_sd.py"),
        ({"unet": "damaged"}, "^{tmp_path}/model/unet: the weights are not"),
        ({"clip_g": "swapped"}, "^{tmp_path}/swapped/text_encoder: this CLIPTextModel has no projection"),
        ({"clip_g": "swapped, unnamed"}, r"^{tmp_path}/swapped/text_encoder: the weights are not .*text_projection"),
        ({"clip_l": "t5"}, "^{model_t5}/text_encoder: expected CLIP, found T5; use models/compose_t5_sd.py or"),
        ({"clip_l": "words"}, "^{tmp_path}/model/tokenizer and {model_sdxl}/tokenizer_2: the vocabularies differ"),
        ({"unet": "pooled 50"}, r"expects a pooled text vector of width 50, the text encoders give 40"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(change, message, model_sdxl, model_sd, model_t5, tmp_path):
    [(part, what)] = change.items()
    if what.startswith("swapped"):
        source = tmp_path / "swapped"
        for name in ("text_encoder", "tokenizer"):
            shutil.copytree(model_sdxl / name, source / name)
        if "unnamed" in what:
            config = source / "text_encoder" / "config.json"
            config.write_text(config.read_text().replace("architectures", "unknown"))
    elif what == "pooled 50":
        config = {"projection_class_embeddings_input_dim": 98}
        source = copy_with(model_sdxl, tmp_path / "model", "unet", **config)
    elif what == "damaged":
        source = copy_with(model_sdxl, tmp_path / "model", "unet", layers_per_block=2)
    elif what == "words":
        source = shutil.copytree(model_sdxl, tmp_path / "model")
        path = source / "tokenizer" / "tokenizer.json"
        content = json.loads(path.read_text())
        words = content["model"]["vocab"]
        words["red</w>"], words["a</w>"] = words["a</w>"], words["red</w>"]
        path.write_text(json.dumps(content))
    else:
        source = {"sd": model_sd, "t5": model_t5}[what]
    message = message.format(model_sdxl=model_sdxl, model_sd=model_sd, model_t5=model_t5, tmp_path=tmp_path)
    with pytest.raises(ValueError, match=message):
        compose(tmp_path / "out", **parts_of(model_sdxl) | {part: source})
    assert not (tmp_path / "out").exists()


def test_other_compose_scripts_refuse_sdxls_unet_and_the_reverse(model_sdxl, model_sd, model_t5, tmp_path):
    wide = copy_with(model_sdxl, tmp_path / "unet", "unet", cross_attention_dim=64)
    for script, unet, text, message in (
        ("compose_sd.py", wide, ["--clip", model_sd], "this UNet is SDXL's; .* use models/compose_sdxl.py"),
        ("compose_t5_sd.py", wide, ["--t5", model_t5], "this UNet is SDXL's; .* use models/compose_t5_sdxl.py"),
        ("compose_t5_sdxl.py", model_sd, ["--t5", model_t5], "is not SDXL's; .* use models/compose_t5_sd.py"),
    ):
        flags = ["--unet", unet, "--vae", model_sdxl, *text, "--out", tmp_path / "out"]
        with pytest.raises(ValueError, match=message):
            run_script(f"models/{script}", *flags)


@pytest.fixture(scope="module")
def model_t5_sdxl(model_sdxl, model_t5, tmp_path_factory):
    """SDXL's UNet with T5, whose tiny one has a width of 64."""
    folder = tmp_path_factory.mktemp("t5_sdxl")
    narrow = copy_with(model_sdxl, folder / "narrow", "unet", cross_attention_dim=64)
    flags = ["--unet", narrow, "--fresh_unet", "--vae", model_sdxl, "--t5", model_t5, "--out", folder / "model"]
    assert run_script("models/compose_t5_sdxl.py", *flags) == 0
    return folder / "model"


def load_t5_pipeline(model):
    pipeline = DiffusionPipeline.from_pretrained(
        model, custom_pipeline=str(model), trust_remote_code=True, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


@pytest.mark.parametrize("cfg", [1, 4])
def test_sdxl_with_t5_draws_what_its_pipeline_and_a_loop_by_hand_draw(cfg, model_t5_sdxl, tmp_path):
    flags = ["--cfgs", cfg, "--seed", 5, "--sampler_steps", 3, "--device", "cpu", "--width", 128, "--height", 64]
    prompt = ["--prompt", "a red circle", "--out", tmp_path / "out"]
    assert run_script("sample.py", "--model", model_t5_sdxl, *prompt, *flags) == 0
    pipeline = load_t5_pipeline(model_t5_sdxl)
    latents = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(5))[None]
    settings = {"num_inference_steps": 3, "guidance_scale": cfg}
    image = pipeline("a red circle", latents=latents, **settings).images[0]
    assert np.abs(pictures(tmp_path / "out")[0] - np.asarray(image).astype(int)).max() <= 1
    # By hand: pooled zeros, time ids of a picture of 64 x 128.
    halves = []
    for text in ("", "a red circle"):
        embeddings, mask = pipeline.encode_prompt(text)
        added = {"text_embeds": torch.zeros(1, POOLED), "time_ids": torch.tensor([[64.0, 128, 0, 0, 64, 128]])}
        halves.append(
            {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask, "added_cond_kwargs": added}
        )
    pipeline.scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            null, output = (pipeline.unet(latents, t, **half).sample for half in halves)
            output = null + cfg * (output - null)
            latents = pipeline.scheduler.step(output, t, latents).prev_sample
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample[0].clamp(-1, 1)
    by_hand = decoded.mul(127.5).add(127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(by_hand - np.asarray(image).astype(int)).max() <= 1


def test_sdxl_with_t5_trains_from_t5_caches_and_saves_a_pipeline(model_t5_sdxl, shapes_sdxl, tmp_path):
    data = shutil.copytree(shapes_sdxl, tmp_path / "data")
    assert run_script("cache/create_t5cache_768.py", "--data_root", data, "--model", model_t5_sdxl) == 0
    seen, predict = [], conditioning.predict

    def watched(unet, latents, timesteps, arguments):
        if latents.device.type != "meta":  # where FLOPs are counted
            seen.append(arguments["added_cond_kwargs"])
        return predict(unet, latents, timesteps, arguments)

    flags = ["--max_steps", 2, "--batch_size", 3, "--cond_dropout", 0.3, *FULL_LOG]
    with mock.patch.object(conditioning, "predict", watched):
        _, weights = train(data, model_t5_sdxl, tmp_path / "run", *flags, suffixes=T5)
    sizes = {Image.open(path).size[::-1] for path in data.glob("*.png")}
    assert {tuple(ids[:2]) for added in seen for ids in added["time_ids"].tolist()} <= sizes
    assert all(added["text_embeds"].shape == (3, POOLED) and not added["text_embeds"].any() for added in seen)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    load_t5_pipeline(tmp_path / "run" / "checkpoint-000002")
