"""SampleImages while training: the rules of prompt files, samplers against diffusers, and what must not happen."""

import json
import shutil
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from helpers import CLIP, T5, load_script, render, run_script, train
from PIL import Image

from cachetrain.checkpoints.info import data_info
from cachetrain.data.index import PairIndex
from cachetrain.data.sidecar import read_sidecar
from cachetrain.diffusion.noise_schedulers import FLOW_SAMPLERS, SAMPLERS, make_scheduler, sampler_for
from cachetrain.diffusion.objective import target_of
from cachetrain.modeling import load
from cachetrain.modeling.t5_pipeline import denoise
from cachetrain.modeling.text_encoders import TextEncoder
from cachetrain.sampling import samples as samples_module
from cachetrain.sampling.prompts import PromptFile, Prompts, Sample, read_prompts, sample_seed, sample_size
from cachetrain.sampling.samples import SampleImages

torch.set_num_threads(1)
trainer = load_script("train_from_cached.py")


class Recorder:
    """Stands in for Metrics."""

    def __init__(self):
        self.images, self.animations = {}, {}

    def image(self, tag, image, step):
        self.images[tag, step] = image

    def animation(self, tag, frames, step):
        self.animations[tag, step] = frames


@pytest.fixture
def unet(model_t5):
    return load.load_unet(model_t5 / "unet")


def make_samples(model, shapes, source, suffixes=T5, cfgs=(1.0, 4.0), index=None):
    index = index or PairIndex([shapes], *suffixes)
    defaults = Prompts(cfgs=cfgs, num_inference_steps=2, generate_samples_every_n_steps=250)
    scheduler, info = load.load_scheduler(model / "scheduler"), data_info(index, text_scale=1.0)
    return SampleImages(
        model, source, defaults, scheduler, info, device=torch.device("cpu"), open_index=lambda: index
    )


def written(path, **content):
    path.write_text(json.dumps(content, indent=2))
    return path


@pytest.mark.parametrize(
    ("objective", "zero_snr", "name"),
    [(objective, False, name) for objective in ("epsilon", "v_prediction") for name in SAMPLERS]
    + [("v_prediction", True, name) for name in ("ddim", "ddpm", "dpm++", "dpm++_sde", "euler", "euler_a", "unipc")]
    + [("flow", False, name) for name in FLOW_SAMPLERS],
)
def test_every_sampler_leads_a_perfect_model_to_the_image(objective, zero_snr, name):
    """A UNet that knows x_0 shows whether the sampler follows the noise schedule that was trained."""
    trained = make_scheduler(objective, None, zero_snr)
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).clamp(-2, 2)

    def alpha_sigma(t):
        if objective == "flow":
            return 1 - t / 1000, t / 1000
        signal = trained.alphas_cumprod.double()
        low = int(t)
        if low == t:
            return signal[low].sqrt(), (1 - signal[low]).sqrt()
        sigmas = ((1 - signal) / signal).sqrt()  # Heun asks between the timesteps
        sigma = sigmas[low] + (sigmas[low + 1] - sigmas[low]) * (t - low)
        return 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()

    def oracle(x, t):
        alpha, sigma = (torch.as_tensor(value).float() for value in alpha_sigma(float(t)))
        return target_of(objective, x0, (x - alpha * x0) / sigma, alpha, sigma)

    sampler = sampler_for(trained, name)
    for _ in range(2):  # a sampler is used again and again
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        latents = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
        latents = denoise(oracle, sampler, latents, 1.0, 20, generators)
        assert (latents - x0).abs().max() < 0.15  # DDIM ends at the noise of timestep 1, not at none


def test_samplers_that_do_not_fit_the_model_are_refused_by_name():
    for objective, name in (("flow", "ddim"), ("flow", "euler_a"), ("epsilon", "nonsense")):
        with pytest.raises(ValueError, match=f"{name}.*expected one of.*euler"):
            sampler_for(make_scheduler(objective), name)
    for name in ("heun", "pndm"):
        with pytest.raises(ValueError, match=f"{name}.*zero terminal SNR"):
            sampler_for(make_scheduler("v_prediction", None, True), name)


@pytest.mark.parametrize("base", [None, FlowMatchEulerDiscreteScheduler(shift=3.0)], ids=["new", "FlowMatch"])
def test_a_vanilla_flow_model_draws_in_plain_diffusers_what_we_draw(base, model_sd):
    scheduler = make_scheduler("flow", base)
    pipe = StableDiffusionPipeline.from_pretrained(
        model_sd, scheduler=scheduler, torch_dtype=torch.float32, safety_checker=None
    )
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 64, "width": 64}
    expected = pipe("a star", generator=torch.Generator().manual_seed(5), **settings).images[0]
    text = TextEncoder(model_sd)
    null, star = [text.encode_ids(text.tokenize([prompt])[0])[0] for prompt in ("", "a star")]
    unet, vae = load.load_unet(model_sd / "unet").eval(), load.load_vae(model_sd / "vae")
    (image,) = render(unet, vae, sampler_for(scheduler, "dpm++"), [star], null, 3.0, [5], 4, "txt_clipl")
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize(
    ("name", "cls"), [("dpm++", DPMSolverMultistepScheduler), ("euler_a", EulerAncestralDiscreteScheduler)]
)
def test_samples_of_other_samplers_equal_diffusers_pipeline_in_any_batch(name, cls, model_sd):
    pipe = StableDiffusionPipeline.from_pretrained(model_sd, torch_dtype=torch.float32, safety_checker=None)
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    prompts, seeds = ["a star", "a red ring"], [5, 6]
    expected = [
        pipe(prompt, generator=torch.Generator().manual_seed(seed), num_inference_steps=6, guidance_scale=3.0,
             height=64, width=64).images[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]  # fmt: skip
    text = TextEncoder(model_sd)
    null, *embeddings = [text.encode_ids(text.tokenize([prompt])[0])[0] for prompt in ["", *prompts]]
    unet, vae = load.load_unet(model_sd / "unet").eval(), load.load_vae(model_sd / "vae")
    sampler = sampler_for(load.load_scheduler(model_sd / "scheduler"), name)
    images = render(unet, vae, sampler, embeddings, null, 3.0, seeds, 6, "txt_clipl")
    for image, other in zip(images, expected, strict=True):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(other)).max() <= 1


def test_json_prompts_are_read_with_every_key(tmp_path):
    path = written(
        tmp_path / "p.json", batch_size=3, seed=555, cfgs=[7, 4], scheduler="dpm++", num_inference_steps=15,
        show_progress_bars=True, generate_samples_every_n_steps=200, generate_pretrain_samples=True,
        samples=[{"prompt": "a man", "negative_prompt": "distorted"},
                 {"prompt": "b", "seed": -1, "aspect_ratio": 1.5}, {"random_caption": True, "size": [640, 384]}],
    )  # fmt: skip
    prompts, warnings = read_prompts(path)
    assert warnings == []
    assert prompts._replace(samples=()) == ((), 3, 555, (7, 4), "dpm++", 15, True, 200, True)
    assert prompts.samples == (
        Sample("a man", "distorted"),
        Sample("b", seed=-1, aspect_ratio=1.5),
        Sample(size=(640, 384), random_caption=True),
    )
    (tmp_path / "p.txt").write_text("\ufeffa man\n\n  b \r\n")
    assert [sample.prompt for sample in read_prompts(tmp_path / "p.txt")[0].samples] == ["a man", "b"]


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('{"samples": [\n  {"prompt": "a"\n  {"prompt": "b"}]}', 3, "Expecting ',' delimiter"),
        ('{"samples": [\n {"prompt": "a"},\n {"prompt": "b",\n "size": [640, 380]}]}', 4, '"size".*multiples of 64'),
        ('{"samples": [\n {"prompt": "{[,", "size": [64, 64], "aspect_ratio": 1}]}', 2, '"size" or "aspect_ratio"'),
        ('{"samples": [{"prompt": "a"},\n {"seed": 3}]}', 2, '"prompt" or "random_caption"'),
        ('{"samples": [\n"a"]}', 2, "expected an object like"),
        ('{\n"cfgs": []}', 2, '"cfgs"'),
        ('{\n"cfgs": [NaN]}', 2, '"cfgs"'),
        ('{\n\n"batch_size": true}', 3, '"batch_size"'),
        ('{"seed": 1.5}', 1, '"seed"'),
        ("[\n]", 1, "expected an object"),
        ("", 1, "Expecting value"),
    ],
)
def test_a_broken_file_is_refused_with_line_and_reason(content, line, reason, tmp_path):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=rf"(?s)p\.json, line {line}: .*{reason}"):
        read_prompts(tmp_path / "p.json")


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    (tmp_path / "p.txt").write_bytes("a\nb\nMünchen".encode("latin-1"))
    with pytest.raises(ValueError, match=r"not UTF-8 text \(line 3\)"):
        read_prompts(tmp_path / "p.txt")


def test_a_file_broken_later_warns_once_and_the_last_good_one_stays(tmp_path, capsys):
    path = written(tmp_path / "p.json", samples=[{"prompt": "a", "color": 1}], sede=3)
    file = PromptFile(path)
    warned = capsys.readouterr().err
    assert "line 5: unknown key 'color'" in warned and "line 8: unknown key 'sede'" in warned
    assert file.changed() is None and capsys.readouterr().err == ""
    path.write_text('{"samples": [')
    assert file.changed() is None and "line 1: Expecting value" in capsys.readouterr().err
    assert file.changed() is None and capsys.readouterr().err == ""
    path.unlink()
    assert file.changed() is None and "No such file" in capsys.readouterr().err
    written(path, samples=[{"prompt": "b"}])
    assert file.changed().samples == (Sample("b"),)


def test_seeds_follow_sample_file_and_place_and_minus_one_is_new_each_step(tmp_path):
    prompts, _ = read_prompts(written(tmp_path / "p.json", seed=7, samples=[{"prompt": "a"}]))
    assert sample_seed(Sample("a"), prompts, 3, 100) == 7
    assert sample_seed(Sample("a", seed=2), prompts, 3, 100) == 2
    assert sample_seed(Sample("a"), prompts._replace(seed=None), 3, 100) == 3
    seeds = [sample_seed(Sample("a", seed=-1), prompts, slot, step) for slot in (0, 1) for step in range(50)]
    assert len(set(seeds)) == 100


@pytest.mark.parametrize(("ratio", "expected"), [(1, (512, 512)), (16 / 9, (704, 384)), (0.5, (384, 704))])
def test_an_aspect_ratio_keeps_the_native_area_in_multiples_of_64(ratio, expected):
    assert sample_size(Sample("a", aspect_ratio=ratio), (512, 512)) == expected


def test_pictures_are_what_their_metadata_says(shapes, model_sd, tmp_path):
    path = written(
        tmp_path / "p.json",
        scheduler="dpm++",
        num_inference_steps=4,
        batch_size=1,
        samples=[{"prompt": "a star", "negative_prompt": "red", "seed": -1}, {"prompt": "a ring", "size": [128, 64]}],
    )
    samples, metrics = make_samples(model_sd, shapes, path, CLIP, cfgs=(1.0, 5.0)), Recorder()
    samples.draw(load.load_unet(model_sd / "unet"), tmp_path / "out", metrics, 50, nullcontext)
    names = ["00-a-star_cfg1.png", "00-a-star_cfg5.png", "01-a-ring_cfg1.png", "01-a-ring_cfg5.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    assert set(metrics.images) == {("12_Generated_Samples/00 a star", 50), ("12_Generated_Samples/01 a ring", 50)}
    pipe = StableDiffusionPipeline.from_pretrained(model_sd, torch_dtype=torch.float32, safety_checker=None)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    for name in names:
        image = Image.open(tmp_path / "out" / name)
        info = image.text
        assert (info["step"], info["scheduler"], info["num_inference_steps"]) == ("50", "dpm++", "4")
        again = pipe(
            info["prompt"],
            negative_prompt=info["negative_prompt"],
            guidance_scale=float(info["cfg"]),
            generator=torch.Generator().manual_seed(int(info["seed"])),
            num_inference_steps=4,
            width=image.width,
            height=image.height,
        ).images[0]
        assert np.abs(np.asarray(image).astype(int) - np.asarray(again)).max() <= 1
    assert Image.open(tmp_path / "out" / names[2]).size == (128, 64)


def test_all_guidance_scales_start_from_the_same_noise(shapes, model_t5, unet, tmp_path, monkeypatch):
    from cachetrain.sampling import render

    seen = []
    monkeypatch.setattr(render, "denoise", lambda predict, sampler, latents, *rest: seen.append(latents) or latents)
    make_samples(model_t5, shapes, ["a", "b"], cfgs=(1.0, 4.0, 7.0)).draw(unet, tmp_path, None, 1, nullcontext)
    assert len(seen) == 3 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0][0], seen[0][1])


def test_only_new_prompts_are_encoded_and_none_where_nothing_changed(shapes, model_t5, unet, tmp_path, monkeypatch):
    encoded, original = [], samples_module.encode_like_cache

    def encode(model_dir, kind, settings, captions, *, device, dtype):
        encoded.append((captions, str(device)))
        return original(model_dir, kind, settings, captions, device=device, dtype=dtype)

    monkeypatch.setattr(samples_module, "encode_like_cache", encode)
    path = written(tmp_path / "p.json", samples=[{"prompt": "a star"}], num_inference_steps=1)
    samples = make_samples(model_t5, shapes, path)
    assert [captions for captions, _ in encoded] == [["", "a star"]]
    samples.draw(unet, tmp_path / "1", Recorder(), 1, nullcontext)
    path.write_text(path.read_text() + " ")
    samples.draw(unet, tmp_path / "2", Recorder(), 2, nullcontext)
    assert len(encoded) == 1
    written(path, samples=[{"prompt": "a ring"}, {"prompt": "a star", "negative_prompt": "red"}], seed=4)
    samples.draw(unet, tmp_path / "3", Recorder(), 3, nullcontext)
    assert encoded[1:] == [(["a ring", "red"], "cpu")]
    assert Image.open(tmp_path / "3" / "01-a-star_cfg4.png").text["seed"] == "4"


def test_text_encoder_has_left_memory_when_training_starts(shapes, model_t5, tmp_path, monkeypatch):
    encoders, alive, original, forward = [], [], load.load_text_encoder, trainer.forward_pass

    def load_text_encoder(*args):
        encoder = original(*args)
        encoders.append(weakref.ref(encoder))
        return encoder

    def first_forward(*args, **kwargs):
        alive.append([reference() for reference in encoders])
        return forward(*args, **kwargs)

    monkeypatch.setattr(load, "load_text_encoder", load_text_encoder)
    monkeypatch.setattr(trainer, "forward_pass", first_forward)
    train(shapes, model_t5, tmp_path / "run", "--max_steps", 1, "--batch_size", 2, "--sample_prompt", "a star",
        "--sampler_steps", 1)  # fmt: skip
    assert alive == [[None]]  # without waiting for the garbage collector


def test_new_prompts_that_cannot_be_used_warn_and_the_old_ones_are_drawn(shapes, model_t5, unet, tmp_path, capsys):
    path = written(tmp_path / "p.json", samples=[{"prompt": "a star"}])
    samples = make_samples(model_t5, shapes, path)
    written(path, samples=[{"prompt": "a ring"}], scheduler="fast")
    samples.draw(unet, tmp_path / "out", Recorder(), 1, nullcontext)
    assert "scheduler 'fast' is not known" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00-a-star_cfg1.png", "00-a-star_cfg4.png"]
    with pytest.raises(ValueError, match="'fast' is not known"):
        make_samples(model_t5, shapes, path)


def test_without_prompts_captions_of_the_last_batch_are_drawn_from_their_caches(
    shapes, model_t5, unet, tmp_path, monkeypatch
):
    (tmp_path / "p.txt").write_text("\n")
    samples = make_samples(model_t5, shapes, tmp_path / "p.txt", cfgs=(1.0,))
    index, seen, original = samples.open_index(), [], samples_module.Renderer.draw
    monkeypatch.setattr(samples_module.Renderer, "draw", lambda *args: seen.extend(args[1]) or original(*args))
    metrics = Recorder()
    samples.draw(unet, tmp_path / "out", metrics, 7, nullcontext, torch.tensor([5, 3, 8, 1, 2]))
    assert [drawing.prompt for drawing in seen] == [open(index.stem(i) + ".txt").read().strip() for i in (5, 3, 8, 1)]
    for drawing, i in zip(seen, (5, 3, 8, 1), strict=True):
        assert torch.equal(drawing.condition["emb"], read_sidecar(index.text_path(i))[0]["emb"].float())
    assert ("12_Generated_Samples/03 caption of the last batch", 7) in metrics.images
    names = [f"{slot:02d}-caption-of-the-last-batch_cfg1.png" for slot in range(4)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_random_captions_change_with_the_step_and_keep_their_name(shapes, model_t5, unet, tmp_path):
    path = written(tmp_path / "p.json", samples=[{"random_caption": True}], num_inference_steps=1, cfgs=[1])
    samples, captions = make_samples(model_t5, shapes, path), set()
    for step in range(1, 6):
        samples.draw(unet, tmp_path / str(step), Recorder(), step, nullcontext)
        captions.add(Image.open(tmp_path / str(step) / "00-random-caption_cfg1.png").text["prompt"])
    assert len(captions) > 1
    assert captions <= {path.read_text().strip() for path in shapes.glob("*.txt")}


def test_random_caption_is_the_text_that_is_forced_on_all_images(shapes, model_t5, unet, tmp_path):
    text = sorted(shapes.glob("[0-9]*.txt_t5cache"))[3]
    path = written(tmp_path / "p.json", samples=[{"random_caption": True}])
    samples = make_samples(model_t5, shapes, path, index=PairIndex([shapes], *T5, one_text=str(text)))
    for step in range(3):
        _, caption, condition = samples._caption_of_data(Sample(random_caption=True), 0, step, None)
        assert caption == text.with_suffix(".txt").read_text().strip()
        assert torch.equal(condition["emb"], read_sidecar(text)[0]["emb"].float())


def test_a_failure_warns_and_training_goes_on_but_not_at_the_start(
    shapes, model_t5, unet, tmp_path, monkeypatch, capsys
):
    samples = make_samples(model_t5, shapes, ["a star"])
    (tmp_path / "file").write_text("in the way")
    samples.draw(unet, tmp_path / "file" / "out", Recorder(), 3, nullcontext)
    assert "no samples at step 3" in capsys.readouterr().err
    monkeypatch.setattr(samples.vae, "decode", lambda *args, **kwargs: torch.zeros(1) @ torch.zeros(2))
    samples.draw(unet, tmp_path / "out", Recorder(), 4, nullcontext)
    assert "no samples at step 4" in capsys.readouterr().err
    assert unet.training
    with pytest.raises(ValueError, match=r"no samples before training: .*RuntimeError"):
        samples.draw(unet, tmp_path / "out", Recorder(), 0, nullcontext)
    with pytest.raises(ValueError, match=r"p\.json, line 1"):
        (tmp_path / "p.json").write_text("{")
        make_samples(model_t5, shapes, tmp_path / "p.json")


def test_drawing_leaves_weights_mode_and_generators_of_training_alone(shapes, model_t5, unet, tmp_path):
    samples = make_samples(model_t5, shapes, ["a star"])
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    samples.draw(unet, tmp_path, Recorder(), 1, nullcontext)
    assert torch.equal(state, torch.random.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()
    assert all(torch.equal(weights[name], tensor) for name, tensor in unet.state_dict().items())
    assert unet.training and all(parameter.grad is None for parameter in unet.parameters())


def test_the_default_size_is_the_caches_commonest_and_the_json_says_when(shapes, model_t5, tmp_path):
    samples = make_samples(model_t5, shapes, ["a star"])
    assert samples.latent_size == (8, 8)
    assert [step for step in range(601) if samples.due(step, 600)] == [250, 500, 600]
    path = written(tmp_path / "p.json", generate_samples_every_n_steps=200, generate_pretrain_samples=True)
    index = PairIndex([shapes], *T5)
    index.shapes, index.shape_ids = [(4, 8, 8), (4, 6, 10), (4, 10, 6)], np.array([0] * 7 + [1] * 9 + [2] * 8)
    samples = make_samples(model_t5, shapes, path, index=index)
    assert samples.latent_size == (6, 10)
    assert [step for step in range(501) if samples.due(step, 500)] == [0, 200, 400, 500]


def test_the_progress_animation_holds_the_last_fifty_small_strips_of_a_resumed_run_too(
    shapes, model_t5, unet, tmp_path, monkeypatch
):
    """Step by step a brighter picture; the last ones are drawn by another SampleImages, as after a resume."""
    metrics = Recorder()
    for first, last in ((1, 40), (41, 60)):
        samples = make_samples(model_t5, shapes, ["a star"])
        samples.animate(tmp_path, metrics, first)  # nothing is drawn yet
        for step in range(first, last + 1):
            image = Image.new("RGB", (512, 512), (4 * step, 0, 0))
            monkeypatch.setattr(samples, "images", lambda *_, image=image: ((0, cfg, image) for cfg in (1.0, 4.0)))
            samples.draw(unet, tmp_path / f"step-{step:06d}", metrics, step, nullcontext)
    shutil.copytree(tmp_path / "step-000060", tmp_path / "step-000070")  # of a part that the resume has given up
    samples.animate(tmp_path, metrics, 60)
    ((tag, step), frames), *others = metrics.animations.items()
    assert others == [] and (tag, step) == ("12_Generated_Samples/00 a star (progress)", 60)
    frames = list(frames)
    middles = [frame.getpixel((frame.width // 4, frame.height // 2))[0] for frame in frames]
    assert middles == [4 * step for step in range(11, 61)]
    assert len({frame.size for frame in frames}) == 1 and frames[0].width < 300


def test_sample_script_draws_a_prompt_file_with_its_settings(model_sd, tmp_path):
    path = written(
        tmp_path / "p.json",
        seed=9,
        cfgs=[2],
        scheduler="euler",
        num_inference_steps=3,
        samples=[{"prompt": "a star", "size": [64, 128]}, {"prompt": "a ring"}],
    )
    argv = ["--model", model_sd, "--prompts", path, "--negative_prompt", "red", "--out", tmp_path / "out"]
    assert run_script("sample.py", *argv) == 0
    star, ring = (Image.open(tmp_path / "out" / name) for name in ("00-a-star_cfg2.png", "01-a-ring_cfg2.png"))
    assert (star.size, ring.size) == ((64, 128), (64, 64))
    for image in (star, ring):
        info = image.text
        assert (info["seed"], info["scheduler"], info["num_inference_steps"]) == ("9", "euler", "3")
        assert info["negative_prompt"] == "red"
    written(path, samples=[{"random_caption": True}])
    with pytest.raises(ValueError, match="random_caption"):
        run_script("sample.py", *argv)
