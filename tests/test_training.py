"""The training loop against a plain loop of diffusers and torch, and what must not change a run."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from helpers import (
    CLIP,
    FULL_LOG,
    REPO,
    T5,
    WEIGHTS,
    WIDE,
    digest,
    distance,
    load_script,
    open_pairs,
    read_events,
    refused,
    run_script,
    train,
    trainer_argv,
    wait_until,
    weights_of,
    without_headers,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from cachetrain.data import rng
from cachetrain.data.batching import BatchSampler, collate
from cachetrain.data.dataset import SampleKey
from cachetrain.data.index import PairIndex
from cachetrain.data.sidecar import read_sidecar, write_sidecar
from cachetrain.modeling.conditioning import Conditioning

torch.set_num_threads(1)


def plain_loop(data, model, objective, steps, accum, batch_size, masked, weighting):
    """What the trainer must equal, written with diffusers and torch only (draws and order are given)."""
    index = PairIndex([data], *(T5 if masked else CLIP))
    order = iter(BatchSampler(index, batch_size, 0, steps * accum))
    unet = UNet2DConditionModel.from_pretrained(model / "unet").train()
    ddpm = DDPMScheduler.from_pretrained(model / "scheduler", prediction_type=objective)
    scale = json.loads((model / "vae" / "config.json").read_text())["scaling_factor"]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=20)
    losses = []
    for _ in range(steps):
        total = 0.0
        for _ in range(accum):
            keys = next(order)
            latents = torch.stack([load_file(index.image_path(key.sample))["latent"].float() * scale for key in keys])
            noise = torch.stack(
                [
                    torch.from_numpy(rng.generator(0, e, i, rng.NOISE).standard_normal(latents[0].shape, np.float32))
                    for e, i, *_ in keys
                ]
            )
            u = torch.tensor([rng.generator(0, e, i, rng.TIMESTEP).random() for e, i, *_ in keys])
            text = [load_file(index.text_path(key.sample))["emb"].float() for key in keys]
            hidden = torch.nn.utils.rnn.pad_sequence(text, batch_first=True)
            mask = None
            if masked:
                mask = torch.arange(hidden.shape[1]) < torch.tensor([len(t) for t in text])[:, None]
            if weighting == "huber":  # with --timestep_sampling logit_normal --logit_mean -0.3 --timestep_shift 2
                u = torch.sigmoid(torch.special.ndtri(u) - 0.3)
                u = 2 * u / (1 + u)
            if objective == "flow":
                t, sigma = u * 1000, u.float()[:, None, None, None]
                noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
            else:
                t = (u * 1000).long()
                noisy = ddpm.add_noise(latents, noise, t)
                target = noise if objective == "epsilon" else ddpm.get_velocity(latents, noise, t)
            difference = unet(noisy, t, hidden, encoder_attention_mask=mask).sample - target
            loss = difference.square().mean((1, 2, 3))
            if weighting == "huber":
                c = torch.exp(sigma * np.log(0.2))
                loss = (2 * c * ((difference**2 + c**2) ** 0.5 - c)).mean((1, 2, 3))
            elif weighting == "debiased":
                loss = loss * compute_snr(ddpm, t) ** -0.5
            elif weighting and objective == "flow":  # x_0 = x_t - sigma v: min(snr, gamma) times the error of x_0
                loss = loss * sigma.flatten() ** 2 * (((1 - sigma) / sigma).flatten() ** 2).clamp(max=weighting)
            elif weighting:
                snr = compute_snr(ddpm, t)
                loss = loss * snr.clamp(max=weighting) / (snr if objective == "epsilon" else snr + 1)
            loss.mean().div(accum).backward()
            total += loss.mean().item() / accum
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 0.5)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, unet.state_dict()


@pytest.mark.parametrize(
    ("objective", "accum", "masked", "weighting"),
    [("epsilon", 2, True, 5.0), ("epsilon", 1, False, "debiased"), ("v_prediction", 2, True, 5.0),
     ("v_prediction", 1, False, None), ("flow", 2, True, 5.0), ("flow", 1, False, "huber")],
)  # fmt: skip
def test_ten_steps_equal_a_plain_loop(objective, accum, masked, weighting, shapes, model_t5, model_sd, tmp_path):
    model = model_t5 if masked else model_sd
    flags = ["--max_steps", 10, "--batch_size", 3, "--gradient_accum", accum, "--objective", objective, "--lr", 1e-3]
    flags += ["--scheduler", "cosine", "--warmup_steps", 2, "--lr_decay_steps", 20, "--cond_dropout", 0]
    flags += ["--gradient_clip", 0.5]  # so low that most steps are clipped
    if weighting == "huber":
        flags += ["--loss", "huber", "--huber_c", 0.2, "--timestep_sampling", "logit_normal", "--logit_mean", -0.3]
        flags += ["--timestep_shift", 2]
    elif weighting:
        flags += ["--use_snr", *(["debiased"] if weighting == "debiased" else ["--noise_gamma", weighting])]
    lines, weights = train(shapes, model, tmp_path / "run", *flags, suffixes=T5 if masked else CLIP)
    losses, expected = plain_loop(shapes, model, objective, 10, accum, 3, masked, weighting)
    assert [line["01_Training/loss"] for line in lines] == pytest.approx(losses, rel=1e-4)
    if weighting != "huber":  # whose gradients are small
        assert sum(line["01_Training/grad_norm"] > 0.5 for line in lines) > 5
    assert distance(weights, expected, UNet2DConditionModel.from_pretrained(model / "unet").state_dict()) < 1e-3


def test_accumulation_equals_one_big_batch(shapes, model_t5, tmp_path):
    common = ["--max_steps", 4, "--lr", 1e-3]
    _, big = train(shapes, model_t5, tmp_path / "big", *common, "--batch_size", 6)
    _, accumulated = train(shapes, model_t5, tmp_path / "acc", *common, "--batch_size", 2, "--gradient_accum", 3)
    assert distance(accumulated, big, UNet2DConditionModel.from_pretrained(model_t5 / "unet").state_dict()) < 1e-3


def test_workers_samples_saves_and_logging_never_change_the_weights(shapes, model_t5, tmp_path):
    common = ["--max_steps", 5, "--batch_size", 4, "--lr", 1e-3, "--cond_dropout", 0.3]
    _, bare = train(shapes, model_t5, tmp_path / "bare", *common)
    everything = ["--num_workers", 2, "--log_step", 2, "--save_steps", 2, "--sample_steps", 2, "--sampler_steps", 2]
    everything += ["--sample_prompt", "a red circle", "--ema_decay", 0.9]
    _, loaded = train(shapes, model_t5, tmp_path / "loaded", *common, *everything)
    assert digest(bare) == digest(loaded)
    _, other_seed = train(shapes, model_t5, tmp_path / "seed", *common, "--seed", 1)
    assert digest(bare) != digest(other_seed)


def test_padding_never_changes_a_prediction(shapes, model_t5):
    unet = UNet2DConditionModel.from_pretrained(model_t5 / "unet").eval()
    index = PairIndex([shapes], *T5)
    samples = [open_pairs(index)[SampleKey(0, i)] for i in (0, 1)]
    samples[1]["condition"]["emb"] = samples[1]["condition"]["emb"][:5]  # lengths that differ a lot
    batch = collate(samples, Conditioning("txt_t5cache"))
    hidden, mask = (batch["conditioning"][f"encoder_{name}"] for name in ("hidden_states", "attention_mask"))
    assert hidden.shape[1] % 8 == 0
    hidden = hidden.clone()
    hidden[~mask] = 100.0  # whatever padding holds must not matter
    t = torch.tensor([500, 500])
    with torch.no_grad():
        together = unet(batch["latents"], t, hidden, encoder_attention_mask=mask).sample
        for row, sample in enumerate(samples):
            alone = unet(sample["latents"][None], t[:1], sample["condition"]["emb"][None]).sample
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_an_epoch_visits_every_sample_once_and_drops_none():
    class Index:
        shape_ids = np.array([0] * 10 + [1] * 7)
        repeats = np.ones(17, np.float32)
        choices = 1

        def __len__(self):
            return 17

    batches = list(islice(BatchSampler(Index(), 4, 0, 40), 40))
    for batch in batches:
        assert len({Index.shape_ids[visit.sample] for visit in batch}) == 1
    visits = [key for batch in batches for key in batch]
    assert len(visits) == len(set(visits)) == 160
    # 160 visits hold at least 8 whole epochs; at most 3 of one shape and 3 of the other are still waiting.
    for epoch in range(8):
        assert sorted(visit.sample for visit in visits if visit.epoch == epoch) == list(range(17))


def test_batch_order_is_the_seeds_permutation_and_changes_with_the_epoch():
    first, second = rng.permutation(0, 0, 100), rng.permutation(0, 1, 100)
    assert sorted(first) == list(range(100))
    assert (first != second).any()
    assert (first == rng.permutation(0, 0, 100)).all()
    assert (first != rng.permutation(1, 0, 100)).any()


@pytest.mark.parametrize("accum", [1, 3])
def test_stratified_batches_spread_each_step_over_all_timesteps_whatever_its_micro_batches(accum):
    class Index:
        shape_ids = np.zeros(50, np.uint16)
        repeats = np.ones(50, np.float32)
        choices = 1

        def __len__(self):
            return 50

    batch_size = 12 // accum
    batches = list(BatchSampler(Index(), batch_size, 0, 8 * accum, strata=accum))
    plain = list(BatchSampler(Index(), batch_size, 0, 8 * accum))
    assert [
        [key._replace(uniform=None) for key in batch] for batch in batches
    ] == plain  # the same samples in the same order
    numbers = [
        [key.uniform for batch in batches[i : i + accum] for key in batch] for i in range(0, len(batches), accum)
    ]
    for step in numbers:
        assert sorted(int(number * 12) for number in step) == list(range(12))
    assert len({round(number, 9) for step in numbers for number in step}) == 8 * 12
    for batch in batches:  # and each of the micro-batches over all of the range, more coarsely
        assert sorted(int(key.uniform * batch_size) for key in batch) == list(range(batch_size))


def test_timestep_range_offset_noise_and_sampling_change_only_what_they_say(shapes):
    index = PairIndex([shapes], *T5)
    plain = open_pairs(index)
    ranged = open_pairs(index, timestep_range=(200, 300))
    middle = open_pairs(index, timestep_sampling="logit_normal")
    offset = open_pairs(index, offset_noise=0.1)
    for i in range(len(index)):
        a = plain[SampleKey(0, i)]
        assert ranged[SampleKey(0, i)]["timesteps"] == 200 + a["timesteps"] // 10
        added = offset[SampleKey(0, i)]["noise"] - a["noise"]
        assert added.std(dim=(1, 2)).max() < 1e-6 and added[:, 0, 0].abs().max() > 1e-4
        assert (
            torch.equal(offset[SampleKey(0, i)]["latents"], a["latents"])
            and offset[SampleKey(0, i)]["timesteps"] == a["timesteps"]
        )
    offsets = torch.stack(
        [offset[SampleKey(0, i)]["noise"] - plain[SampleKey(0, i)]["noise"] for i in range(len(index))]
    )[..., 0, 0]
    assert 0.05 < offsets.std() < 0.15
    uniform, normal = (
        np.array([d[SampleKey(0, i)]["timesteps"] for i in range(len(index))]) for d in (plain, middle)
    )
    assert (uniform.argsort() == normal.argsort()).all() and normal.std() < uniform.std()
    assert (
        plain[SampleKey(0, 0, uniform=0.25)]["timesteps"] == 250
        and ranged[SampleKey(0, 0, uniform=0.25)]["timesteps"] == 225
    )


def test_draws_of_a_sample_are_its_own_and_standard_normal():
    noise = rng.generator(0, 3, 7, rng.NOISE).standard_normal(200_000)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    for other in ((1, 3, 7, rng.NOISE), (0, 4, 7, rng.NOISE), (0, 3, 8, rng.NOISE), (0, 3, 7, rng.FLIP)):
        assert abs(np.corrcoef(noise, rng.generator(*other).standard_normal(200_000))[0, 1]) < 0.01


def test_cond_dropout_replaces_the_share_of_captions_asked_for(shapes):
    index = PairIndex([shapes], *T5)
    null = read_sidecar(shapes / "_null_caption.txt_t5cache")[0]["emb"].float()
    pairs = open_pairs(index, null=null, cond_dropout=0.2)
    samples = [pairs[SampleKey(epoch, i)] for epoch in range(25) for i in range(24)]
    dropped = [sample for sample in samples if sample["dropped"]]
    assert 0.15 < len(dropped) / len(samples) < 0.25
    assert all(torch.equal(sample["condition"]["emb"], null) for sample in dropped)
    kept = next(sample for sample in samples if not sample["dropped"])
    assert torch.equal(kept["condition"]["emb"], read_sidecar(index.text_path(kept["sample"]))[0]["emb"].float())


def test_flip_uses_latent_flip_and_says_how_to_get_it(shapes, model_t5, tmp_path):
    index = PairIndex([shapes], *T5)
    assert "cache the images with --flip" in open_pairs(index, flip_p=1.0)[SampleKey(0, 0)]["fault"]
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    tensors, header = read_sidecar(index.image_path(0))
    flipped = {**tensors, "latent_flip": -tensors["latent"]}
    write_sidecar(data / (index.stem(0).split("/")[-1] + ".img_sdxl"), flipped, header.metadata)
    pairs = open_pairs(PairIndex([data], *T5), 2.0, 0.5, flip_p=1.0)
    torch.testing.assert_close(pairs[SampleKey(0, 0)]["latents"], (-tensors["latent"].float() - 0.5) * 2.0)
    assert "cache the images with --flip" in refused(shapes, model_t5, tmp_path / "run", "--flip_p", 0.5)


def test_logged_scalars_are_right_and_in_both_logs(shapes, model_t5, tmp_path):
    flags = ["--max_steps", 3, "--batch_size", 4, "--use_snr", "--objective", "epsilon", "--cond_dropout", 0]
    lines, _ = train(shapes, model_t5, tmp_path / "run", *flags)
    # Step 1 by hand: loss of the untrained UNet, gradients from autograd.
    index = PairIndex([shapes], *T5)
    scale = json.loads((model_t5 / "vae" / "config.json").read_text())["scaling_factor"]
    pairs = open_pairs(index, scale)
    batch = collate([pairs[key] for key in next(iter(BatchSampler(index, 4, 0, 1)))], pairs.conditioning)
    unet = UNet2DConditionModel.from_pretrained(model_t5 / "unet").train()
    ddpm = DDPMScheduler.from_pretrained(model_t5 / "scheduler")
    noisy = ddpm.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    hidden, mask = (batch["conditioning"][f"encoder_{name}"] for name in ("hidden_states", "attention_mask"))
    error = (unet(noisy, batch["timesteps"], hidden, encoder_attention_mask=mask).sample - batch["noise"]).square()
    snr = compute_snr(ddpm, batch["timesteps"])
    loss = (error.mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()
    loss.backward()
    qk = torch.cat([p.grad.flatten() for name, p in unet.named_parameters() if ".to_q." in name or ".to_k." in name])
    norm = torch.cat([p.grad.flatten() for p in unet.parameters()]).norm()
    first = lines[0]
    assert first["01_Training/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert first["01_Training/loss_raw"] == pytest.approx(error.mean().item(), rel=1e-4)
    assert first["01_Training/qk_grads_av"] == pytest.approx(qk.abs().mean().item(), rel=1e-3)
    assert first["01_Training/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert first["01_Training/images_seen"] == 4
    events = read_events(tmp_path / "tb" / "run")
    scalars = set(events.Tags()["scalars"]) - {"04_Learning_Rate/planned"}  # a curve, drawn once
    for tag in scalars:
        for event in events.Scalars(tag):
            assert event.value == pytest.approx(lines[event.step - 1][tag], rel=1e-5)
    assert scalars == {tag for line in lines for tag in line} - {"step"}


def test_log_steps_are_lines_where_no_progress_bar_is_seen(shapes, model_t5, tmp_path, capsys, monkeypatch):
    flags = ["--max_steps", 4, "--batch_size", 4, "--log_step", 2, "--val_split", 0.3, "--val_steps", 4, "--lr", 1e-4]
    lines, _ = train(shapes, model_t5, tmp_path / "run", *flags, *FULL_LOG)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(said) == len(lines) == 3
    for line, text in zip(lines, said, strict=True):
        speed = line["05_Performance/images_per_second"]
        left = timedelta(seconds=round((4 - line["step"]) / line["05_Performance/steps_per_second"]))
        val = f"val/loss {line['val/loss']:.4g}, " if line["step"] == 4 else ""
        assert text == (
            f"step {line['step']} of 4: loss {line['01_Training/loss_raw']:.4g}, {val}lr 0.0001, "
            f"grad_norm {line['01_Training/grad_norm']:.4g}, images/s {speed:.4g}, {left} left"
        )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(shapes, model_t5, tmp_path / "bar", *flags, "--log_groups")
    assert "\nstep " not in (seen := capsys.readouterr()).out and "train: 100%" in seen.err


def test_a_run_fills_all_fifteen_groups_at_their_steps(shapes, model_t5, tmp_path):
    flags = ["--max_steps", 6, "--batch_size", 4, "--log_groups", *range(1, 16), "--diagnostic_steps", 3]
    flags += ["--sample_prompt", "a star", "--sample_steps", 2, "--sampler_steps", 1, "--save_steps", 2]
    flags += ["--val_split", 0.3, "--val_steps", 2, "--precision", "fp16"]
    lines, _ = train(shapes, model_t5, tmp_path / "run", *flags)
    read = read_events(tmp_path / "tb" / "run")
    tags = {kind: read.Tags()[kind] for kind in ("scalars", "images", "histograms", "tensors")}
    assert {tag[:2] for names in tags.values() for tag in names} >= {f"{group:02d}" for group in range(1, 16)}
    assert "_hparams_/experiment" in read.summary_metadata
    for tag in tags["scalars"]:
        logged = [(line["step"], line[tag]) for line in lines if tag in line] or [
            (step, 1e-5) for step in range(1, 7)
        ]
        assert [(e.step, e.value) for e in read.Scalars(tag)] == [
            (step, pytest.approx(v, 1e-5)) for step, v in logged
        ]
    diagnostic, samples = [3, 6], [2, 4, 6]
    steps = {"06": [0], "12": samples, "13": diagnostic}
    for tag in tags["images"]:
        events = read.Images(tag)
        assert [e.step for e in events] == ([4, 6] if tag.endswith("(progress)") else steps[tag[:2]]), tag
        for event in events:
            with Image.open(io.BytesIO(event.encoded_image_string)) as image:
                assert np.asarray(image.convert("RGB")).std() > 5, tag
    for tag in tags["histograms"]:
        assert [e.step for e in read.Histograms(tag)] == (diagnostic if tag.startswith("10") else [1, 2, 3, 4, 5, 6])
    assert [line["step"] for line in lines if "val/loss" in line] == samples
    assert [line["step"] for line in lines if "09_Parameter_Stats/bf16_lost_fraction" in line] == diagnostic


@pytest.mark.parametrize("flavour", ["t5", "sd"])
def test_checkpoint_is_a_complete_pipeline_whose_frozen_parts_are_stored_once(
    flavour, shapes, model_t5, model_sd, tmp_path
):
    model, suffixes = (model_t5, T5) if flavour == "t5" else (model_sd, CLIP)
    flags = ["--max_steps", 4, "--batch_size", 2, "--save_steps", 2, "--ema_decay", 0.9, "--lr", 1e-3]
    _, weights = train(shapes, model, tmp_path / "run", *flags, "--objective", "v_prediction", suffixes=suffixes)
    first, second = tmp_path / "run" / "checkpoint-000002", tmp_path / "run" / "checkpoint-000004"
    for path in second.rglob("*"):
        if path.is_file() and path.relative_to(second).parts[0] in ("vae", "text_encoder", "tokenizer", "projection"):
            twin = first / path.relative_to(second)
            assert path.stat().st_ino == twin.stat().st_ino
            original = model / path.relative_to(second)
            assert path.read_bytes() == original.read_bytes()
            assert path.stat().st_ino != original.stat().st_ino
    if flavour == "t5":
        pipe = DiffusionPipeline.from_pretrained(second, custom_pipeline=str(second), trust_remote_code=True)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(second)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert digest(pipe.unet.state_dict()) == digest(weights)
    image = pipe("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)
    ema = weights_of(second / "unet_ema")
    assert digest(ema) != digest(weights)
    assert not list((tmp_path / "run").glob(".checkpoint*"))


def test_settings_are_kept_with_the_run(shapes, model_t5, tmp_path):
    config = tmp_path / "my_run.sh"
    config.write_text("#!/bin/sh\n")
    train(shapes, model_t5, tmp_path / "run", "--max_steps", 1, "--batch_size", 2, "--copy_config", config)
    assert (tmp_path / "run" / "my_run.sh").read_text() == "#!/bin/sh\n"
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args["batch_size"] == 2
    assert args["cond_dropout"] == 0.04


def test_a_copy_of_the_config_replaces_no_other_file(shapes, model_t5, tmp_path):
    config, out = tmp_path / "my_run.sh", tmp_path / "run"
    config.touch()
    out.mkdir()
    (out / "my_run.sh").write_text("a stranger's")
    message = refused(shapes, model_t5, out, "--copy_config", config)
    assert f"{out / 'my_run.sh'} is another file" in message and (out / "my_run.sh").read_text() == "a stranger's"
    (tmp_path / "metrics.jsonl").touch()
    assert "is another file" in refused(shapes, model_t5, out, "--copy_config", tmp_path / "metrics.jsonl")
    train(shapes, model_t5, out, "--max_steps", 1, "--batch_size", 2, "--copy_config", out / "my_run.sh")


@pytest.mark.parametrize("key", ["encoder", "settings", "scaling_factor"])
def test_mixed_caches_are_refused_naming_two_files(key, shapes, model_t5, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    odd = sorted(data.glob("*.img_sdxl"))[5]
    tensors, header = read_sidecar(odd)
    write_sidecar(odd, tensors, {**header.metadata, key: header.metadata[key] + "0"})
    message = refused(data, model_t5, tmp_path / "run")
    assert str(odd) in message
    assert str(sorted(data.glob("*.img_sdxl"))[0]) in message
    assert key in message


def test_a_null_caption_of_another_encoder_is_refused(shapes, model_t5, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    null = data / "_null_caption.txt_t5cache"
    tensors, header = read_sidecar(null)
    write_sidecar(null, tensors, {**header.metadata, "encoder": "another"})
    assert str(null) in refused(data, model_t5, tmp_path / "run")


def test_a_model_with_another_vae_than_the_caches_is_warned_of(shapes, model_t5, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(model_t5, model)
    config = json.loads((model / "vae" / "config.json").read_text())
    (model / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    train(shapes, model, tmp_path / "run", "--max_steps", 1, "--batch_size", 2)
    assert "not the VAE that made the image caches" in capsys.readouterr().err
    train(shapes, model_t5, tmp_path / "right", "--max_steps", 1, "--batch_size", 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("component", "suffixes"),
    [("projection", T5), ("text_encoder", T5), ("tokenizer", T5), ("text_encoder", CLIP), ("tokenizer", CLIP)],
)
def test_a_model_that_encodes_captions_differently_than_the_caches_is_warned_of(
    component, suffixes, shapes, model_t5, model_sd, tmp_path, capsys
):
    model = tmp_path / "model"
    shutil.copytree(model_t5 if suffixes == T5 else model_sd, model)
    if component == "tokenizer":
        path = model / component / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"unk_token": "<other>"}))
    else:
        path = model / component / (WEIGHTS if component == "projection" else "model.safetensors")
        save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    flags = ["--max_steps", 1, "--batch_size", 2]
    train(shapes, model, tmp_path / "run", *flags, suffixes=suffixes)
    assert "are not those that made the text caches" in capsys.readouterr().err
    train(shapes, model_t5 if suffixes == T5 else model_sd, tmp_path / "right", *flags, suffixes=suffixes)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffixes", [T5, CLIP])
def test_a_model_with_a_text_encoder_of_another_kind_is_refused(suffixes, shapes, model_t5, model_sd, tmp_path):
    message = refused(shapes, model_sd if suffixes == T5 else model_t5, tmp_path / "run", suffixes=suffixes)
    found, cached = ("CLIP", "T5") if suffixes == T5 else ("T5", "CLIP")
    assert f"the text encoder is {found}, but the captions were cached with {cached}" in message


def test_raw_captions_are_compared_without_the_projection(shapes, model_t5, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    assert run_script("cache/create_t5cache_768.py", "--data_root", data, "--model", model_t5, "--raw") == 0
    model = tmp_path / "model"
    shutil.copytree(model_t5, model)
    shutil.rmtree(model / "projection")
    capsys.readouterr()
    train(data, model, tmp_path / "run", "--max_steps", 1, "--batch_size", 2)
    assert capsys.readouterr().err == ""


def test_a_scaling_factor_that_contradicts_the_caches_is_warned_of_once(shapes, model_t5, tmp_path, capsys):
    flags = ["--max_steps", 1, "--batch_size", 4, "--val_split", 0.3, "--vae_scaling_factor"]
    own = json.loads((model_t5 / "vae" / "config.json").read_text())["scaling_factor"]
    train(shapes, model_t5, tmp_path / "same", *flags, own)
    assert "warning" not in capsys.readouterr().err
    train(shapes, model_t5, tmp_path / "other", *flags, 0.13025)
    said = capsys.readouterr().err
    assert (
        said.count("warning") == 1 and f"--vae_scaling_factor 0.13025: the VAE that made the caches has {own}" in said
    )


def test_caches_that_do_not_fit_the_unet_are_refused(shapes, model_t5, tmp_path):
    for field, value, word in (("in_channels", 8, "channels"), ("cross_attention_dim", 32, "width")):
        model = tmp_path / field
        UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(model_t5 / "unet"), **{field: value}
        ).save_pretrained(model)
        assert word in refused(shapes, model, tmp_path / f"run_{field}")


def test_run_that_cannot_start_says_why(shapes, model_t5, tmp_path):
    assert "run the cache scripts" in refused(tmp_path, model_t5, tmp_path / "a")
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    (data / "_null_caption.txt_t5cache").unlink()
    assert "_null_caption" in refused(data, model_t5, tmp_path / "b")
    train(shapes, model_t5, tmp_path / "c", "--max_steps", 1, "--batch_size", 2)
    assert "already holds a run" in refused(shapes, model_t5, tmp_path / "c")
    damaged = sorted(data.glob("*.txt_t5cache"))[3]
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert str(damaged) in refused(data, model_t5, tmp_path / "d")


def test_precision_that_is_not_given_is_fp32_on_a_cpu_and_what_it_was_in_a_resumed_run(
    shapes, model_t5, tmp_path, capsys
):
    from cachetrain.training.run import _default_precision

    argv = trainer_argv(shapes, model_t5, tmp_path / "run", "--max_steps", 1, "--batch_size", 2, "--is_custom")
    start = argv.index("--precision")
    argv = argv[:start] + argv[start + 2 :]
    assert run_script("train_from_cached.py", *argv) == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["precision"] == "fp32"
    out = capsys.readouterr().out
    assert "precision: fp32, since bf16 is up to 3 times slower on CPUs" in out and "--is_custom: not needed" in out
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [_default_precision(cpu, saved) for saved in ("bf16", "fp32", "bf16_pure")] == ["bf16", "fp32", "fp32"]
    assert [_default_precision(gpu, saved) for saved in (None, "fp32")] == ["bf16", "fp32"]


def test_captions_longer_than_force_toklen_are_refused(shapes, model_t5, tmp_path):
    message = refused(shapes, model_t5, tmp_path / "run", "--force_toklen", 3)
    assert "the longest caption in" in message and "create_t5cache_768.py --max_length 3" in message


def test_headerless_caches_train_with_one_warning(shapes, model_t5, tmp_path, capsys):
    data = without_headers(shapes, tmp_path / "data")
    assert "vae_scaling_factor" in refused(data, model_t5, tmp_path / "a")
    capsys.readouterr()
    train(data, model_t5, tmp_path / "b", "--max_steps", 1, "--batch_size", 2, "--vae_scaling_factor", 0.5)
    assert capsys.readouterr().err.count("cannot be verified") == 1


def test_null_caption_with_a_header_serves_caches_without_one(shapes, model_t5, tmp_path, capsys):
    """As the text cache script makes it beside caches of another program."""
    data, null = without_headers(shapes, tmp_path / "data"), "_null_caption.txt_t5cache"
    flags = ["--max_steps", 1, "--batch_size", 2, "--vae_scaling_factor", 0.5, "--cond_dropout", 0.5]
    (data / null).unlink()
    assert "run the text cache script" in refused(data, model_t5, tmp_path / "a", *flags)
    assert run_script("cache/create_t5cache_768.py", "--data_root", shapes, "--model", model_t5) == 0
    shutil.copy(shapes / null, data)
    train(data, model_t5, tmp_path / "b", *flags)
    assert "as only one has a header" in capsys.readouterr().err
    emb = read_sidecar(shapes / null)[0]["emb"]
    write_sidecar(data / null, {"emb": emb[:, :-1]}, {"kind": "txt_t5cache"})
    assert f"{data / null}: has tensors of width" in refused(data, model_t5, tmp_path / "c", *flags)


def test_zero_terminal_snr_is_trained_and_saved_with_the_checkpoint(shapes, model_t5, tmp_path):
    flags = ["--max_steps", 2, "--batch_size", 4, "--zero_terminal_snr", "--use_snr", "--offset_noise", 0.1]
    flags += ["--timestep_sampling", "stratified", "--grad_accum", 2]
    with pytest.raises(ValueError, match="epsilon cannot be trained at pure noise"):
        train(shapes, model_t5, tmp_path / "epsilon", *flags)
    lines, _ = train(shapes, model_t5, tmp_path / "v", *flags, "--objective", "v_prediction")
    assert all(0 < line["01_Training/loss_raw"] < 10 for line in lines)
    config = json.loads((tmp_path / "v/checkpoint-000002/scheduler/scheduler_config.json").read_text())
    assert config["rescale_betas_zero_snr"] and config["timestep_spacing"] == "trailing"


@pytest.mark.parametrize(
    ("flags", "saved", "expected"),
    [
        (["--objective", "epsilon", "--use_snr", "auto"], None, True),
        (["--objective", "v_prediction", "--use_snr", "auto"], None, True),
        (["--objective", "flow", "--use_snr", "auto"], None, False),
        (["--objective", "flow", "--use_snr", "auto"], {"use_snr": True}, True),  # what a resumed run was saved with
        (["--objective", "flow", "--use_snr"], None, True),
        (["--objective", "flow"], {"use_snr": True}, False),  # another run, which is refused
    ],
)
def test_automatic_min_snr_is_off_for_flow_and_a_resumed_run_keeps_it(
    flags, saved, expected, shapes, model_t5, tmp_path
):
    from cachetrain.distributed import World
    from cachetrain.training.run import open_run

    args = load_script("train_from_cached.py").parse_args(trainer_argv(shapes, model_t5, tmp_path / "run", *flags))
    run = open_run(args, World(torch.device("cpu")), {"settings": saved or {}})
    assert run.args.use_snr is expected
    assert ("Min-SNR" in "".join(run.describe(SimpleNamespace(path=None)))) is expected


def test_flow_checkpoint_keeps_the_shift_and_draws_in_plain_diffusers(shapes, model_sd, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    model = shutil.copytree(model_sd, tmp_path / "model")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(model / "scheduler")
    flags = ["--max_steps", 1, "--batch_size", 2, "--objective", "flow"]
    train(shapes, model, tmp_path / "run", *flags, suffixes=CLIP)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "checkpoint-000001", safety_checker=None)
    assert pipe.scheduler.config.flow_shift == 3.0
    assert pipe("a star", num_inference_steps=1, output_type="latent").images.isfinite().all()


def test_bucketed_caches_of_one_folder_train_together_each_batch_of_one_size(shapes, model_t5, tmp_path):
    from PIL import Image

    from cachetrain.data.batching import BatchSampler
    from cachetrain.data.index import PairIndex

    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    for index, path in enumerate(sorted(data.glob("*.png"))):
        if index % 3:
            Image.open(path).resize((128, 64) if index % 3 == 1 else (64, 128)).save(path)
    argv = ["--data_root", data, "--model", model_t5, "--resolution", 192, "--bucket", "--num_workers", 0]
    assert run_script("cache/create_img_sdxl.py", *argv) == 0
    index = PairIndex([data], *T5)
    assert sorted(index.shapes) == [(4, 16, 32), (4, 24, 24), (4, 32, 16)]
    for batch in BatchSampler(index, 4, seed=0, num_batches=9):
        assert len({index.shape_ids[i] for _, i, *_ in batch}) == 1
    lines, _ = train(data, model_t5, tmp_path / "run", "--max_steps", 6, "--batch_size", 4)
    assert len(lines) == 6 and all(line["01_Training/loss"] < 10 for line in lines)


@pytest.mark.parametrize(("flavour", "side"), [("t5", 256), ("sd", 192)])
def test_photographs_train_from_their_caches(flavour, side, model_t5, model_sd, tmp_path):
    import skimage.data
    from PIL import Image

    data, model = tmp_path / "data", model_t5 if flavour == "t5" else model_sd
    data.mkdir()
    for name, caption in (("astronaut", "a woman in a space suit"), ("chelsea", "a tabby cat, close up")):
        Image.fromarray(getattr(skimage.data, name)()).save(data / f"{name}.jpg")
        (data / f"{name}.txt").write_text(caption)
    Image.fromarray(skimage.data.coffee()).save(data / "a cup of coffee_(1).png")  # captioned by its name
    kinds = ["img_sdxl", "t5cache_768"] if flavour == "t5" else ["img_sdvae", "clipl"]
    for kind in kinds:
        extra = ["--resolution", side, "--num_workers", "0"] if kind.startswith("img") else []
        assert run_script(f"cache/create_{kind}.py", "--data_root", data, "--model", model, *extra) == 0
    suffixes = T5 if flavour == "t5" else [".img_sdvae", ".txt_clipl"]
    flags = ["--max_steps", 3, "--batch_size", 1, "--sample_prompt", "a cat", "--sampler_steps", 1]
    flags += ["--sample_cfgs", 1]
    lines, weights = train(data, model, tmp_path / "run", *flags, suffixes=suffixes)
    assert all(0 < line["01_Training/loss_raw"] < 3 for line in lines)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert PairIndex([data], *suffixes).shapes == [(4, side // 8, side // 8)]
    drawn = list((tmp_path / "run" / "samples").rglob("*.png"))
    assert {Image.open(path).size for path in drawn} == {(side, side)}


def front_end(flavour, *argv, cwd, path=None, **settings):
    """Starts a front end with settings as variables; its python3 is this one, or that in the directory `path`."""
    settings = {"IMGCACHE": ".img_sdxl", "LR": "3e-4", "LOGDIR": cwd / "tb", "PRECISION": "fp32", **settings}
    environment = os.environ | {name: str(value) for name, value in settings.items()} | {"VIRTUAL_ENV": "x"}
    environment["PATH"] = f"{path or os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return subprocess.Popen(
        [REPO / f"train_{flavour}.sh", *argv],
        cwd=cwd,
        text=True,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def command_of(flavour, *argv, cwd, **settings):
    """The arguments with which a front end starts the trainer, of which it gets no further."""
    (cwd / "bin").mkdir(exist_ok=True)
    fake = cwd / "bin" / "python3"
    fake.write_text("#!/bin/bash\n[ $1 = -c ] || printf '%s\\0' \"$@\"\n")
    fake.chmod(0o755)
    said, errors = front_end(flavour, *argv, cwd=cwd, path=fake.parent, **settings).communicate()
    script, *words = said.split("\0")[:-1]
    assert script == str(REPO / "train_from_cached.py"), errors
    return words


@pytest.mark.parametrize("flavour", ["t5", "sd", "sdxl"])
def test_front_end_passes_its_settings_and_flags_given_to_it_win(flavour, request, tmp_path, monkeypatch):
    data = request.getfixturevalue("shapes_sdxl" if flavour == "sdxl" else "shapes")
    settings = {"DATADIR": data, "MODEL": request.getfixturevalue(f"model_{flavour}"), "BATCH": 2, "STEPS": 1}
    words = command_of(flavour, "--seed", "7", "--num_workers", "0", cwd=tmp_path, **settings)
    monkeypatch.chdir(tmp_path)
    assert run_script("train_from_cached.py", *words) == 0
    name = f"{flavour}_{'adamw' if flavour == 'sd' else 'lion'}_lr3e-4_b2x1_cosine_g5_s1"
    args = json.loads((tmp_path / "output" / name / "args.json").read_text())
    assert (args["learning_rate"], args["seed"], args["use_snr"], args["noise_gamma"]) == (3e-4, 7, True, 5.0)
    assert (tmp_path / "output" / name / f"train_{flavour}.sh").exists()
    assert (tmp_path / "output" / name / "checkpoint-000001" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("data", "directories"),
    [("my data", ["my data"]), ("my data:2.5", ["my data:2.5"]), ("a  b:2 c*", ["a", "b:2", "c*"])],
)
def test_front_end_takes_one_directory_with_spaces_in_its_name_or_several(data, directories, tmp_path):
    (tmp_path / "my data").mkdir()
    (tmp_path / "cat").mkdir()
    (tmp_path / "python3").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "python3").chmod(0o755)
    environment = os.environ | {"DATADIR": data, "VIRTUAL_ENV": "x", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([REPO / "train_sd.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    words = done.stdout.splitlines()
    assert words[words.index("--train_data_dir") + 1 : words.index("--model")] == directories


@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_front_end_of_several_gpus_stops_torchrun_and_ends_with_the_exit_code_of_the_signal(number, tmp_path):
    wait = "read -r _" if number is None else "while :; do sleep 0.02; done"
    (tmp_path / "python3").write_text(
        f"#!/bin/bash\n[ $1 != -c ] || exit 0\ntrap 'echo stopped; exit 1' TERM\necho started\n{wait}\nexit 7\n"
    )
    (tmp_path / "python3").chmod(0o755)
    environment = os.environ | {"GPUS": "2", "VIRTUAL_ENV": "x", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(
        [REPO / "train_t5.sh"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as started:
        assert started.stdout.readline() == "started\n"
        if number:
            started.send_signal(number)
        assert started.stdout.read() == ("stopped\n" if number else "")
    assert started.returncode == (128 + number if number else 7)


def test_front_ends_differ_in_their_settings_only():
    parts = {
        flavour: (REPO / f"train_{flavour}.sh").read_text().split("\nNAME=")[1] for flavour in ("sd", "t5", "sdxl")
    }
    assert len({part.removeprefix(f"${{NAME:-{flavour}_") for flavour, part in parts.items()}) == 1


def test_front_end_saves_the_running_run_when_asked_and_resumes_it(shapes, model_t5, tmp_path, capsys):
    out, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    settings = {"DATADIR": shapes, "MODEL": model_t5, "BATCH": 2, "SCHED": "constant", "OUTPUT": out, "cwd": tmp_path}
    settings |= {"SAVE_STEPS": 100_000}  # however far the run gets, it saves only when asked

    def asked():
        asking = front_end("t5", "checkpoint", **settings)
        return asking.communicate()[0], asking.returncode

    assert asked() == ("", 2)  # no such run
    running = front_end("t5", "--num_workers", "0", STEPS=100_000, **settings)
    wait_until(lambda: metrics.exists() and metrics.read_text(), lambda: running.poll() is None)
    assert asked() == (f"{out}: a checkpoint will be written after the current step\n", 0)
    wait_until(lambda: list(out.glob("checkpoint-*")), lambda: running.poll() is None)
    running.terminate()
    said, _ = running.communicate()
    assert running.returncode == 143 and "--resume latest continues the run" in said
    saved = sorted(out.glob("checkpoint-*"))
    assert len(saved) == 2
    assert asked() == ("", 2)  # the run has ended
    last = int(saved[-1].name.split("-")[1])
    words = command_of("t5", "resume", "--num_workers", "0", STEPS=last + 2, **settings)
    assert run_script("train_from_cached.py", *words) == 0
    assert f"resumes from {saved[-1]}, after step {last}" in capsys.readouterr().out
    assert (out / f"checkpoint-{last + 2:06d}").exists()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("in_channels", 8, "latents are (4, 8, 8), the UNet expects 8 channels"),
        ("cross_attention_dim", 32, "text embeddings have width 64, the UNet expects 32"),
    ],
)
def test_widths_that_do_not_fit_are_refused_before_the_unet_is_loaded(
    setting, value, message, shapes, model_t5, tmp_path, monkeypatch
):
    from cachetrain.training import checks

    model = shutil.copytree(model_t5, tmp_path / "model")
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {setting: value}))
    monkeypatch.setattr(checks.load, "load_unet", lambda *_: pytest.fail("loaded"))
    assert message in refused(shapes, model, tmp_path / "run")
    assert not (tmp_path / "run" / "args.json").exists()


def test_folders_of_two_sizes_train_together_one_size_a_batch(shapes, model_t5, tmp_path):
    wide = tmp_path / "wide"
    shutil.copytree(shapes, wide)
    assert run_script("cache/create_img_sdxl.py", "--data_root", wide, "--model", model_t5, *WIDE) == 0
    index = PairIndex([shapes, wide], *T5)
    assert index.shapes == [(4, 8, 8), (4, 8, 12)]
    for keys in islice(BatchSampler(index, 4, 0, 12), 12):
        assert len({index.shape_ids[i] for _, i, *_ in keys}) == 1
    lines, _ = train(
        shapes, model_t5, tmp_path / "run", "--max_steps", 6, "--batch_size", 4, "--train_data_dir", shapes, wide
    )
    assert len(lines) == 6
    mixed = tmp_path / "mixed"
    shutil.copytree(shapes, mixed)
    odd = sorted(mixed.glob("*.img_sdxl"))[7]
    shutil.copy(wide / odd.name, odd)
    assert str(odd) in refused(mixed, model_t5, tmp_path / "run2")


def test_linked_folders_are_trained_on_once(shapes, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(shapes)
    (tmp_path / "data" / "again").symlink_to(shapes)
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    assert len(PairIndex([tmp_path / "data"], *T5)) == 24


def test_samples_of_custom_caches_are_refused(shapes, model_t5, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    for path in data.glob("*.txt_t5cache"):
        tensors, header = read_sidecar(path)
        write_sidecar(path, tensors, {**header.metadata, "settings": '{"custom": true}'})
    assert "--custom" in refused(data, model_t5, tmp_path / "a", "--sample_prompt", "a star")
    train(data, model_t5, tmp_path / "b", "--max_steps", 1, "--batch_size", 2)


@pytest.mark.parametrize(
    "flags",
    [["--noise_gamma", "5"], ["--lr_decay_steps", "9"], ["--warmup_steps", "9"], ["--sample_cfgs", "1"],
     ["--cond_dropout", "2"], ["--batch_size", "0"], ["--max_steps", "1.5"]],
)  # fmt: skip
def test_flags_that_cannot_apply_are_errors(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script("train_from_cached.py", "--train_data_dir", "x", "--model", "x", "--output_dir", "x", *flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err
