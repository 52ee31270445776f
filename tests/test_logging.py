"""What is logged: every tag against another way to compute it, the files read back, and what it may not cost."""

import json
import re
import socket
import subprocess
import sys
import urllib.request
from contextlib import nullcontext
from functools import partial
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from helpers import HANG_S, REPO, TINY, bare_run, json_lines, read_events
from PIL import Image, ImageSequence
from torch.utils._python_dispatch import TorchDispatchMode

from cachetrain.diffusion.objective import alpha_sigma, min_snr_weights, squared_error, target_of
from cachetrain.modeling.conditioning import Conditioning
from cachetrain.training.flags import GROUPS
from cachetrain.training.logs import describe, diagnostics, health, machine, statistics
from cachetrain.training.logs.metrics import Metrics, open_metrics
from cachetrain.training.logs.statistics import Statistics

torch.set_num_threads(1)
CPU = torch.device("cpu")
DDIM = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
ALPHAS = DDIM.alphas_cumprod
ALL = set(GROUPS)


class World:
    """One rank of `ranks`; `others` are the vectors of the other ranks."""

    def __init__(self, ranks=1):
        self.ranks, self.others, self.summed = ranks, [], []

    def sum(self, tensor):
        self.summed.append(tensor)
        return sum(self.others, tensor)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(TINY / "unet"))


def random_batch(seed, objective="epsilon", size=6, masked=True):
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.rand(size, generator=generator) * 1000
    lengths = torch.randint(3, 11, (size, 1), generator=generator)
    return {
        "latents": torch.randn(size, 4, 8, 8, generator=generator) * 1.5 + 0.3,
        "noise": torch.randn(size, 4, 8, 8, generator=generator),
        "timesteps": timesteps if objective == "flow" else timesteps.long(),
        "conditioning": {
            "encoder_hidden_states": torch.randn(size, 11, 64, generator=generator),
            "encoder_attention_mask": torch.arange(11) < lengths if masked else None,
        },
        "dropped": torch.rand(size, generator=generator) < 0.4,
        "weights": torch.ones(size),
        "samples": torch.arange(size),
        "waited_s": 0.5,
    }


def micro_step(unet, batch, stats, objective="epsilon"):
    """One forward and backward pass as the trainer's; returns everything that was computed."""
    alpha, sigma = alpha_sigma(objective, batch["timesteps"], ALPHAS)
    prediction = unet(
        alpha * batch["latents"] + sigma * batch["noise"], batch["timesteps"], **batch["conditioning"]
    ).sample
    target = target_of(objective, batch["latents"], batch["noise"], alpha, sigma)
    raw = squared_error(prediction, target)
    loss = raw * min_snr_weights(objective, alpha, sigma, 5.0)
    result = SimpleNamespace(
        loss=loss, squared_error=raw, prediction=prediction.detach(), target=target, alpha=alpha, sigma=sigma
    )
    stats.add(batch, result)
    loss.mean().backward()
    return SimpleNamespace(batch=batch, result=result, prediction=prediction.detach(), target=target, alpha=alpha,
                           sigma=sigma, raw=raw.detach().numpy(), loss=loss.detach().numpy())  # fmt: skip


def make_stats(unet, tmp_path, objective="epsilon", groups=ALL, world=None, **options):
    options = {"gradient_clip": 1.0, "weighted": True} | options
    return Statistics(unet, objective, world or World(), CPU, groups, tmp_path, **options)


def joined(micros, name):
    return np.concatenate([getattr(micro, name) for micro in micros])


def optimizer_of(*groups):
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in groups or (0.1,)])


def x0_of(objective, micro):
    """The predicted x_0, by diffusers' own scheduler where it has one."""
    noisy = micro.alpha * micro.batch["latents"] + micro.sigma * micro.batch["noise"]
    if objective == "flow":
        return noisy - micro.batch["timesteps"].float()[:, None, None, None] / 1000 * micro.prediction
    scheduler = DDIMScheduler.from_config(DDIM.config, prediction_type=objective)
    scheduler.set_timesteps(1000)
    return torch.cat(
        [
            scheduler.step(one[None], t, x[None]).pred_original_sample
            for one, t, x in zip(micro.prediction, micro.batch["timesteps"], noisy, strict=True)
        ]
    )


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction", "flow"])
def test_window_tags_equal_a_computation_by_sample(objective, unet, tmp_path, monkeypatch):
    clock = SimpleNamespace(now_s=100.0)
    monkeypatch.setattr(statistics, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    stats = make_stats(unet, tmp_path, objective)
    micros = [micro_step(unet, random_batch(seed, objective), stats, objective) for seed in range(4)]
    stats.gradients(log_now=True)
    stats.wait_s += 1.0
    clock.now_s += 4.0
    tags, histograms = stats.read(7, optimizer_of(0.25, 0.5))

    raw, loss = joined(micros, "raw"), joined(micros, "loss")
    timesteps = np.concatenate([micro.batch["timesteps"].numpy() for micro in micros])
    dropped = np.concatenate([micro.batch["dropped"].numpy() for micro in micros])
    prediction, target = (
        np.concatenate([getattr(m, k).flatten(1) for m in micros]) for k in ("prediction", "target")
    )
    cosine = (prediction * target).sum(1) / np.linalg.norm(prediction, axis=1) / np.linalg.norm(target, axis=1)
    expected = {
        "01_Training/loss": loss.mean(),
        "01_Training/loss_raw": raw.mean(),
        "01_Training/images_seen": 7 * 24,
        "01_Training/learning_rate": 0.25,
        "02_Loss_Components/loss_raw_captioned": raw[~dropped].mean(),
        "02_Loss_Components/loss_raw_dropped": raw[dropped].mean(),
        "04_Learning_Rate/group_0": 0.25,
        "04_Learning_Rate/group_1": 0.5,
    }
    for first in range(0, 1000, 125):
        here, name = (timesteps >= first) & (timesteps < first + 125), f"t{first:03d}-{first + 124:03d}"
        if not here.any():
            assert f"02_Loss_Components/loss_{name}" not in tags
            continue
        expected[f"02_Loss_Components/loss_raw_{name}"] = raw[here].mean()
        expected[f"02_Loss_Components/loss_{name}"] = loss[here].mean()
        expected[f"07_Noise_Analysis/std_ratio_{name}"] = (prediction.std(1) / target.std(1))[here].mean()
        expected[f"07_Noise_Analysis/cosine_{name}"] = cosine[here].mean()
    errors = [(x0_of(objective, micro) - micro.batch["latents"]).square().mean().item() for micro in micros]
    expected["06_Diffusion/x0_mse"] = np.mean(errors)
    signal = 1 - timesteps / 1000 if objective == "flow" else ALPHAS.numpy()[timesteps] ** 0.5
    noise = timesteps / 1000 if objective == "flow" else (1 - ALPHAS.numpy()[timesteps]) ** 0.5
    expected["06_Diffusion/log_snr"] = np.log(signal**2 / noise**2).mean()
    last = micros[-1].batch
    for channel in range(4):
        expected[f"07_Noise_Analysis/latent_mean_c{channel}"] = last["latents"].numpy()[:, channel].mean()
        expected[f"07_Noise_Analysis/latent_std_c{channel}"] = last["latents"].numpy()[:, channel].std()
    mask = last["conditioning"]["encoder_attention_mask"].numpy()
    expected["07_Noise_Analysis/embedding_norm"] = np.linalg.norm(
        last["conditioning"]["encoder_hidden_states"], axis=2
    )[mask].mean()
    expected["07_Noise_Analysis/padded_fraction"] = 1 - mask.mean()

    for tag, value in expected.items():
        assert tags[tag] == pytest.approx(float(value), rel=2e-4, abs=1e-6), tag
    counts, edges = histograms["06_Diffusion/timesteps"]
    np.testing.assert_array_equal(counts, np.histogram(timesteps, edges)[0])
    assert tags["05_Performance/data_wait_fraction"] == 0.25 and tags["05_Performance/images_per_second"] == 6
    rest = {tag.split("/")[0] for tag in tags.keys() - expected.keys()}
    assert rest == {"01_Training", "05_Performance", "11_Gradient_Stats", "14_System"}
    assert all(isinstance(value, float | int) for value in tags.values())
    clock.now_s += 4.0
    assert stats.read(8, optimizer_of())[0].keys().isdisjoint(k for k in tags if k.startswith("02_"))  # afresh


def test_gradient_tags_equal_those_of_the_modules(unet, tmp_path):
    stats = make_stats(unet, tmp_path)
    micro_step(unet, random_batch(1), stats)
    norm = stats.gradients(log_now=True)
    tags, histograms = stats.read(1, optimizer_of())

    def rms(*weights):
        return torch.cat([weight.grad.flatten() for weight in weights]).double().square().mean().sqrt().item()

    expected, queries_and_keys, by_kind = {}, [], {"attn1": [], "attn2": []}
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            qk = [module.to_q.weight, module.to_k.weight]
            queries_and_keys += qk
            by_kind[name[-5:]].append(rms(*qk))
            weight = torch.cat([w.detach().flatten() for w in qk]).norm()
            gradient = torch.cat([w.grad.flatten() for w in qk]).norm()
            expected[f"11_Gradient_Stats/qk_rms/{name}"] = rms(*qk)
            expected[f"11_Gradient_Stats/qk_over_v/{name}"] = rms(*qk) / rms(module.to_v.weight)
            expected[f"11_Gradient_Stats/qk_over_weight/{name}"] = (gradient / weight).item()
    for kind, values in by_kind.items():
        expected[f"11_Gradient_Stats/qk_rms_min_{kind}"] = min(values)
        expected[f"11_Gradient_Stats/qk_rms_median_{kind}"] = float(np.median(values))
    blocks = {name: getattr(unet, name) for name in ("conv_in", "time_embedding", "mid_block", "conv_out")}
    blocks |= {f"{way}_blocks.{i}": b for way in ("down", "up") for i, b in enumerate(getattr(unet, f"{way}_blocks"))}
    for name, block in blocks.items():
        grads = [parameter.grad for parameter in block.parameters()]
        expected[f"11_Gradient_Stats/norm/{name}"] = torch.nn.utils.get_total_norm(grads).item()
    absolute = torch.cat([weight.grad.flatten() for weight in queries_and_keys]).abs()
    expected["01_Training/qk_grads_av"] = absolute.mean().item()
    expected["01_Training/grad_norm"] = torch.nn.utils.clip_grad_norm_(unet.parameters(), 1e9).item()

    for tag, value in expected.items():
        assert tags[tag] == pytest.approx(value, rel=1e-4), tag
    group = {tag for tag in tags if tag.startswith("11_")} - {"11_Gradient_Stats/norm/conv_norm_out"}
    assert group == {tag for tag in expected if tag.startswith("11_")}
    assert norm.item() == pytest.approx(expected["01_Training/grad_norm"], rel=1e-5)
    counts, edges = histograms["11_Gradient_Stats/qk_rms_log10"]
    assert counts.sum() == 14
    assert edges[0] == pytest.approx(np.log10(min(map(min, by_kind.values()))), abs=1e-4)


def test_frozen_and_missing_gradients_count_as_nothing(unet, tmp_path):
    unet.requires_grad_(False)
    layer = unet.mid_block.attentions[0].transformer_blocks[0]
    layer.requires_grad_(True)
    layer.attn1.to_v.requires_grad_(False)
    stats = make_stats(unet, tmp_path)
    micro_step(unet, random_batch(1), stats)
    layer.attn2.to_k.weight.grad = None
    norm = stats.gradients(log_now=True)
    tags, _ = stats.read(1, optimizer_of())
    grads = [parameter.grad for parameter in unet.parameters() if parameter.grad is not None]
    assert norm.item() == pytest.approx(torch.nn.utils.get_total_norm(grads).item(), rel=1e-5)
    prefix = "mid_block.attentions.0.transformer_blocks.0"
    assert [tag for tag in tags if "/norm/" in tag] == ["11_Gradient_Stats/norm/mid_block"]
    assert {tag for tag in tags if "qk_rms/" in tag} == {f"11_Gradient_Stats/qk_rms/{prefix}.attn{i}" for i in (1, 2)}
    assert [tag for tag in tags if "qk_over_v/" in tag] == [f"11_Gradient_Stats/qk_over_v/{prefix}.attn2"]
    parts = [layer.attn1.to_q, layer.attn1.to_k, layer.attn2.to_q]
    mean = torch.cat([part.weight.grad.flatten() for part in parts]).abs().mean().item()
    assert tags["01_Training/qk_grads_av"] == pytest.approx(mean, rel=1e-5)


def test_without_trained_attention_there_is_nothing_to_watch(unet, tmp_path, capsys):
    unet.requires_grad_(False)
    unet.conv_in.requires_grad_(True)
    stats = make_stats(unet, tmp_path)
    micro_step(unet, random_batch(1), stats)
    stats.gradients(log_now=True)
    tags, histograms = stats.read(2, optimizer_of())
    assert not any("qk" in tag for tag in (*tags, *histograms))
    measured = stats.measured
    health.Health(measured.layers, 0).watch(2, measured.qk_rms, measured.v_ratio, stats.grad_norm)
    assert capsys.readouterr().err == ""


def test_clipped_and_non_finite_steps_are_counted(unet, tmp_path):
    unet.requires_grad_(False)
    unet.conv_in.bias.requires_grad_(True)
    stats = make_stats(unet, tmp_path, gradient_clip=2.0)
    for size in (0.1, 5.0, 1.0, float("nan"), 3.0):
        unet.conv_in.bias.grad = torch.full_like(unet.conv_in.bias, size / unet.conv_in.bias.numel() ** 0.5)
        stats.gradients(log_now=True)
    stats.epoch_end()
    tags, _ = stats.read(5, optimizer_of())
    assert tags["01_Training/clipped_fraction"] == pytest.approx(2 / 5)
    assert tags["01_Training/grad_norm"] == pytest.approx(3.0)
    assert tags["03_Epoch_Summary/not_finite_steps"] == 1
    assert tags["03_Epoch_Summary/optimizer_steps"] == 5


def test_epoch_mean_is_exact_over_windows_that_straddle_it(unet, tmp_path):
    """Windows of 2 steps, epochs of 3, 1, 1 and 4 steps."""
    stats, micros, found = make_stats(unet, tmp_path), [], {}
    for step in range(1, 11):
        micros.append(micro_step(unet, random_batch(step, size=2), stats))
        stats.gradients(log_now=step % 2 == 0)
        if step in (3, 4, 5, 9):
            stats.epoch_end()
        if step % 2 == 0:
            tags, _ = stats.read(step, optimizer_of())
            found[step] = tags.get("03_Epoch_Summary/loss"), tags.get("03_Epoch_Summary/optimizer_steps")
    mean = [micro.loss.mean() for micro in micros]
    expected = {2: None, 4: (mean[3], 1), 6: (mean[4], 1), 8: None, 10: (np.mean(mean[5:9]), 4)}
    for step, value in expected.items():
        assert found[step] == (pytest.approx(value[0], rel=1e-4), value[1]) if value else found[step] == (None, None)


def test_epoch_over_whole_windows_has_all_its_images(unet, tmp_path):
    stats, micros = make_stats(unet, tmp_path), []
    for step in range(1, 6):
        micros.append(micro_step(unet, random_batch(step, size=2), stats))
        stats.gradients(log_now=True)
        if step == 5:
            stats.epoch_end()
        tags, _ = stats.read(step, optimizer_of())
    assert tags["03_Epoch_Summary/loss"] == pytest.approx(joined(micros, "loss").mean(), rel=1e-4)
    assert tags["03_Epoch_Summary/images"] == 10
    assert tags["03_Epoch_Summary/minutes_per_epoch"] > 0


def test_two_ranks_log_what_one_with_both_batches_does(unet, tmp_path):
    batches, single = [random_batch(1), random_batch(2)], World()
    stats = make_stats(unet, tmp_path, world=single)
    for batch in batches:
        micro_step(unet, batch, stats)
    stats.gradients(log_now=True)  # the same gradients on both ranks, as after DDP's all-reduce
    stats.epoch_end()
    expected, histograms = stats.read(1, optimizer_of())
    assert len(single.summed) == 1
    grads, worlds = [p.grad.clone() for p in unet.parameters()], [World(2), World(2)]
    for batch, world in zip(batches, worlds, strict=True):
        stats = make_stats(unet, tmp_path, world=world)
        micro_step(unet, batch, stats)
        for parameter, grad in zip(unet.parameters(), grads, strict=True):
            parameter.grad = grad.clone()
        stats.gradients(log_now=True)
        stats.epoch_end()
        world.others = worlds[0].summed if world is worlds[1] else []
        tags, histograms_2 = stats.read(1, optimizer_of())
    own = ("latent_", "embedding_norm", "padded_fraction", "05_", "14_", "seconds", "minutes")  # last batch, or time
    assert tags.keys() == expected.keys()
    for tag in tags:
        if not any(word in tag for word in own):
            assert tags[tag] == pytest.approx(expected[tag], rel=1e-5), tag
    np.testing.assert_array_equal(histograms["06_Diffusion/timesteps"][0], histograms_2["06_Diffusion/timesteps"][0])
    latents = torch.cat([batch["latents"] for batch in batches])
    assert tags["07_Noise_Analysis/latent_std_c2"] == pytest.approx(latents[:, 2].std(correction=0).item(), rel=1e-4)


@pytest.mark.parametrize("off", [1, 2, 3, 4, 5, 6, 7, 11, 14])
def test_a_group_that_is_off_has_no_tags_and_no_cost(off, unet, tmp_path):
    stats, every = make_stats(unet, tmp_path, groups=ALL - {off}), make_stats(unet, tmp_path)
    times = []
    for one in (stats, every):
        unet.zero_grad()
        micro = micro_step(unet, random_batch(1), one)
        one.gradients(log_now=True)
        one.epoch_end()
        times.append(one.read(1, optimizer_of()))
    (tags, histograms), (all_tags, all_histograms) = times
    assert tags.keys() == {tag for tag in all_tags if not tag.startswith(f"{off:02d}_")}
    assert histograms.keys() == {tag for tag in all_histograms if not tag.startswith(f"{off:02d}_")}
    assert len(tags) < len(all_tags)
    assert (stats.loss, stats.grad_norm) == (pytest.approx(micro.loss.mean()), every.grad_norm)
    if off in (6, 7):
        assert len(stats._table) == len(every._table) - 2


def test_adding_never_asks_the_device(unet, tmp_path):
    waits = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::equal"}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.name().split(".")[0] not in waits, function
            return function(*args, **(kwargs or {}))

    world = World()
    stats = make_stats(unet, tmp_path, world=world)
    micro = micro_step(unet, random_batch(1), stats)
    with Watch():
        stats.add(micro.batch, micro.result)
        for log_now in (False, True):
            stats.gradients(log_now)
        stats.epoch_end()
        with pytest.raises(AssertionError):
            torch.ones(1).item()
    assert world.summed == []
    stats.read(1, optimizer_of())
    assert len(world.summed) == 1


def test_grad_scale_leaves_with_everything_else(unet, tmp_path):
    stats, scaler = make_stats(unet, tmp_path), torch.amp.GradScaler("cpu", init_scale=512.0)
    stats.gradients(log_now=True)
    assert stats.read(1, optimizer_of(), scaler)[0]["14_System/grad_scale"] == 512.0
    stats.gradients(log_now=True)
    assert "14_System/grad_scale" not in stats.read(2, optimizer_of(), torch.amp.GradScaler("cpu", enabled=False))[0]


def test_forward_flops_equal_a_count_by_hand(unet):
    total = 0

    def count(module, inputs, output):
        nonlocal total
        macs = module.weight.numel() * (output.shape[2:].numel() if output.dim() == 4 else output.shape[1:-1].numel())
        if isinstance(module, Attention):
            return
        total += 2 * macs

    def attention(module, args, kwargs, output):
        nonlocal total
        text = kwargs.get("encoder_hidden_states")
        tokens, width = output.shape[1], output.shape[2]
        total += 2 * 2 * tokens * (tokens if text is None else text.shape[1]) * width  # q k^T, and weights v

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
        elif isinstance(module, Attention):
            module.register_forward_hook(attention, with_kwargs=True)
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), encoder_hidden_states=torch.zeros(1, 13, 64))
    assert (
        machine.forward_flops(unet, (4, 8, 8), partial(Conditioning("txt_t5cache").example, {"emb": 64}, 13)) == total
    )


def test_speed_tags_follow_from_wall_time():
    tags = machine.speed_tags(640, 10, 5.0, 1.0, flops_per_image=2.4e12, peak=989.0)
    assert tags == {
        "05_Performance/images_per_second": 128.0,
        "05_Performance/steps_per_second": 2.0,
        "05_Performance/data_wait_fraction": 0.2,
        "05_Performance/model_tflops": pytest.approx(307.2),
        "05_Performance/mfu": pytest.approx(307.2 / 989),
    }


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70), ("NVIDIA A10", 125), ("NVIDIA RTX A6000", 155), ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
    ],
)  # fmt: skip
def test_peak_is_that_of_the_named_gpu(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert machine.peak_tflops(torch.device("cuda")) == peak
    assert machine.peak_tflops(CPU) is None


def test_system_tags_are_plausible(tmp_path):
    tags = machine.system_tags(CPU, tmp_path)
    assert 0 < tags["14_System/rss_gib"] < 64
    assert tags["14_System/disk_free_gib"] > 0


def test_parameter_stats_equal_numpy(unet):
    look = diagnostics.Diagnostics(unet, 4, ALL, World(), CPU)
    old = {name: p.detach().numpy().copy() for name, p in unet.named_parameters()}
    look.before(3)
    assert look.after(3) == ({}, {})
    look.before(4)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1 + 1e-3 * torch.rand(()))
    tags, histograms = look.after(4)
    new = {name: p.detach().numpy() for name, p in unet.named_parameters()}
    for block in ("down_blocks.1", "mid_block", "conv_out"):
        names = [name for name in new if name.startswith(f"{block}.")]
        weights, updates = (
            np.concatenate([of(name).ravel() for name in names])
            for of in (lambda n: new[n], lambda n: new[n] - old[n])
        )
        norm = np.linalg.norm(weights.astype(np.float64))
        assert tags[f"09_Parameter_Stats/weight_norm/{block}"] == pytest.approx(norm, rel=1e-5)
        ratio = tags[f"09_Parameter_Stats/update_ratio/{block}"]
        assert ratio == pytest.approx(np.linalg.norm(updates.astype(np.float64)) / norm, rel=1e-4)
    lost = [torch.from_numpy(old[n]).bfloat16() == torch.from_numpy(new[n]).bfloat16() for n in new]
    share = torch.cat([part.flatten() for part in lost]).double().mean().item()
    assert tags["09_Parameter_Stats/bf16_lost_fraction"] == pytest.approx(share) and 0.1 < share < 1
    attention = [n for n in new if re.search(r"\.to_(q|k|v|out\.0)\.", n)]
    wanted = {*attention, "conv_in.weight", "conv_in.bias", "conv_out.weight", "conv_out.bias"}
    assert {tag.removeprefix("10_Parameter_Histograms/") for tag in histograms} == wanted
    counts, edges = histograms["10_Parameter_Histograms/conv_in.weight"]
    np.testing.assert_allclose(counts, np.histogram(new["conv_in.weight"], edges)[0], atol=2)  # ties at the edges
    assert counts.sum() == new["conv_in.weight"].size


def test_diagnostics_of_groups_that_are_off_do_nothing(unet):
    look = diagnostics.Diagnostics(unet, 4, ALL - {9, 10, 13}, World(), CPU)
    look.before(4)
    assert not look.due(4) and look.after(4) == ({}, {})
    look = diagnostics.Diagnostics(unet, 4, {10}, World(), CPU)
    look.before(4)
    tags, histograms = look.after(4)
    assert look.due(4) and tags == {} and histograms


def run_of(objective, text_kind, image_kind):
    """As much of a Run as FixedLatent needs."""
    header = SimpleNamespace(metadata={"kind": image_kind} if image_kind else {})
    return bare_run(
        device=CPU,
        objective=objective,
        alphas_cumprod=ALPHAS,
        autocast=nullcontext,
        conditioning=Conditioning(text_kind),
        index=SimpleNamespace(image_header=header),
    )


class Perfect(torch.nn.Module):
    """A UNet that knows the image: it predicts the target itself."""

    def __init__(self, objective, latents):
        super().__init__()
        self.objective, self.latents = objective, latents
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, noisy, timestep, encoder_hidden_states, encoder_attention_mask):
        assert not torch.is_grad_enabled()
        alpha, sigma = alpha_sigma(self.objective, timestep, ALPHAS)
        noise = (noisy - alpha * self.latents) / sigma
        return SimpleNamespace(sample=target_of(self.objective, self.latents, noise, alpha, sigma))


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize(("channels", "kind"), [(4, "img_sdxl"), (4, None), (16, "img_flux")])
def test_fixed_latent_of_a_perfect_model_has_a_grey_error(objective, channels, kind):
    latents = torch.randn(channels, 8, 8, generator=torch.Generator().manual_seed(5))
    sample = {"latents": latents, "condition": {"emb": torch.randn(5, 64)}}
    state = torch.get_rng_state()
    look = diagnostics.FixedLatent(run_of(objective, "txt_t5cache", kind), Perfect(objective, latents), sample)
    picture = np.asarray(look.picture()).astype(int)
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(picture, np.asarray(look.picture()))
    height = (picture.shape[0] - 6) // 3
    noisy, predicted, error = (picture[6 + height * row :][:height][-110:, 10:-10] for row in range(3))
    assert set(np.unique(error)) - {255} <= {127, 128}  # white between the cells
    assert noisy.std() > 20 and predicted.std() > 20
    cells = [predicted[:, 134 * i : 134 * i + 100] for i in range(5)]
    assert all(np.abs(cell - cells[0]).max() <= 2 for cell in cells)  # one image, whatever the noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_latent_leaves_training_alone(dtype, unet):
    unet.to(dtype)
    sample = {"latents": torch.randn(4, 8, 8), "condition": {"emb": torch.randn(5, 64)}}
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    look = diagnostics.FixedLatent(run_of("epsilon", "txt_clipl", "img_sdvae"), unet.train(), sample)
    look.picture()
    assert unet.training and all(parameter.grad is None for parameter in unet.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def watched(sequences, capsys, grad_norms=None, v_ratio=0.5, warmup_steps=0, every=25, **options):
    """Shows `sequences` {layer: values} to Health; returns [(step, line)] of what it says."""
    watch, told = health.Health(list(sequences), warmup_steps, **options), []
    for i, values in enumerate(zip(*sequences.values(), strict=True)):
        ratios = np.broadcast_to(v_ratio, len(values))
        watch.watch((i + 1) * every, np.array(values), ratios, 1.0 if grad_norms is None else grad_norms[i])
        told += [(i + 1, line) for line in capsys.readouterr().err.splitlines()]
    return told


GOOD = [1e-4] * 60


@pytest.mark.parametrize(
    ("bad", "first", "word"),
    [
        ([1e-4] * 10 + [0.0] * 50, 11, "exactly zero"),
        ([1e-4] * 10 + [float("nan")] * 50, 11, "not finite"),
        ([1e-4] * 30 + [5e-7] * 30, 45, "vanished"),  # 0.5% of the early median, in 15 of 20 log steps
        ([1e-4] * 30 + [5e-7, 5e-7, 5e-7, 1e-2] * 7 + [5e-7] * 2, 49, "vanished"),  # a saturated layer
        ([5e-8] * 60, 20, "vanished"),
        ([1e-4] * 30 + [5e-7] * 14 + [1e-4] * 16, None, None),
        ([1e-4] * 30 + [2e-6] * 30, None, None),
    ],
)
def test_health_names_the_layer_that_stops_learning_once(bad, first, word, capsys):
    told = watched({"mid.attn1": GOOD, "up.attn2": bad}, capsys)
    if first is None:
        assert told == []
    else:
        [(step, line)] = told
        assert step == first and word in line and "up.attn2" in line and "mid.attn1" not in line


def test_health_is_silent_where_all_gradients_fade(capsys):
    fading = [1e-4] * 30 + [5e-7] * 30
    assert watched({"a": fading}, capsys, grad_norms=[1.0] * 30 + [5e-3] * 30) == []
    assert watched({"a": fading}, capsys, grad_norms=[1.0] * 60) != []


def test_health_watches_the_ratio_to_the_values(capsys):
    [(step, line)] = watched({"a": GOOD, "b": GOOD}, capsys, v_ratio=np.array([5e-4, np.nan]))
    assert step == 20 and line.startswith("warning: a:") and "value gradients" in line


def test_health_waits_for_the_warm_up_and_the_first_steps(capsys):
    told = watched({"a": [0.0, 0.0, *GOOD]}, capsys, every=1, warmup_steps=10)
    assert told == []  # outputs initialized with zeros: no gradient until they have moved
    assert [step for step, _ in watched({"a": [0.0, 0.0, *GOOD]}, capsys, every=1)] == [2]
    assert [step for step, _ in watched({"a": [5e-8] * 60}, capsys, every=1, warmup_steps=10)] == [30]


def test_health_leaves_overflows_to_the_loss_scaler(capsys):
    values = {"a": [float("inf"), *GOOD]}
    assert watched(values, capsys, loss_scaling=True) == []
    assert watched(values, capsys) != []


def test_everything_written_is_read_back_from_the_event_file(tmp_path):
    metrics = Metrics(tmp_path, tmp_path / "tb")
    metrics.scalars(25, {"01_Training/loss": 0.5, "14_System/x": float("nan"), "y": float("-inf")})
    metrics.scalars(50, {"01_Training/loss": 0.25})
    metrics.histogram("h", *np.histogram([0.0, 1.0, 1.0, 2.0], bins=4), 25)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    metrics.image("p", picture, 25)
    frames = [Image.new("RGB", (12, 10), (80 * i, 0, 0)) for i in range(4)]
    metrics.animation("g", frames, 50)
    metrics.text("t", "| a |\n|---|\n| b |")
    metrics.curve("planned", [(1, 0.1), (500, 0.2)])
    metrics.hparams({"lr": 1e-4, "betas": (0.9, 0.99), "ema": None, "snr": True, "model": "x"}, ["01_Training/loss"])
    metrics.close()
    read = read_events(tmp_path / "tb")
    assert [(e.step, e.value) for e in read.Scalars("01_Training/loss")] == [(25, 0.5), (50, 0.25)]
    assert np.isnan(read.Scalars("14_System/x")[0].value) and read.Scalars("y")[0].value == -np.inf
    assert [(e.step, round(e.value, 6)) for e in read.Scalars("planned")] == [(1, 0.1), (500, 0.2)]
    histogram = read.Histograms("h")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (4, 0, 2)
    assert list(histogram.bucket) == [1, 0, 2, 1]
    [event] = read.Images("p")
    assert (event.step, event.width, event.height) == (25, 30, 20)
    assert np.array_equal(np.asarray(Image.open(BytesIO(event.encoded_image_string))), np.asarray(picture))
    [event] = read.Images("g")
    gif = Image.open(BytesIO(event.encoded_image_string))
    assert (event.step, gif.format, gif.n_frames) == (50, "GIF", 4)
    colors = [frame.convert("RGB").getpixel((5, 5))[0] for frame in ImageSequence.Iterator(gif)]
    assert colors == pytest.approx([0, 80, 160, 240], abs=4)
    assert b"| b |" in read.Tensors("t/text_summary")[0].tensor_proto.string_val[0]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(read.summary_metadata)
    assert json_lines(tmp_path / "metrics.jsonl") == [
        {"step": 25, "01_Training/loss": 0.5, "14_System/x": None, "y": None},
        {"step": 50, "01_Training/loss": 0.25},
    ]


def test_a_picture_that_fails_is_named_and_the_others_are_written(tmp_path, capsys):
    metrics = Metrics(tmp_path, tmp_path / "tb")
    metrics.image("broken", "no picture", 3)
    for step in range(40):  # more than the queue holds
        metrics.image("fine", Image.new("RGB", (64, 64), (step, 0, 0)), step)
    metrics.close()
    assert "broken, step 3" in capsys.readouterr().err
    assert len(read_events(tmp_path / "tb").Images("fine")) == 40


def test_a_resumed_run_replaces_what_was_logged_after_its_checkpoint(tmp_path):
    def write(metrics, steps, value):
        for step in steps:
            metrics.scalars(step, {"loss": value})
            metrics.image("picture", Image.new("RGB", (4, 4)), step)
        metrics.close()

    write(Metrics(tmp_path, tmp_path / "tb"), (10, 20, 30, 40), 1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "lo')  # killed while it wrote
    write(Metrics(tmp_path, tmp_path / "tb", start_step=20), (30, 50), 2.0)
    expected = [(10, 1.0), (20, 1.0), (30, 2.0), (50, 2.0)]
    assert [(line["step"], line["loss"]) for line in json_lines(tmp_path / "metrics.jsonl")] == expected
    read = read_events(tmp_path / "tb")
    assert [(e.step, e.value) for e in read.Scalars("loss")] == expected
    assert [e.step for e in read.Images("picture")] == [10, 20, 30, 50]


def test_other_ranks_write_nothing(tmp_path):
    metrics = open_metrics(tmp_path, tmp_path / "tb", 0, main=False)
    metrics.scalars(1, {"loss": 1.0})
    metrics.image("p", None, 1)
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_planned_rates_are_the_schedule(tmp_path):
    for start_step, steps in ((0, list(range(1, 31))), (20, list(range(21, 31)))):
        metrics = Metrics(tmp_path, tmp_path / f"tb{start_step}", start_step)
        describe.planned_learning_rate(metrics, lambda step: step / 100, 30, start_step)
        metrics.close()
        planned = read_events(tmp_path / f"tb{start_step}").Scalars("04_Learning_Rate/planned")
        assert [(e.step, round(e.value, 4)) for e in planned] == [(step, step / 100) for step in steps]
    points = []
    describe.planned_learning_rate(SimpleNamespace(curve=lambda tag, p: points.extend(p)), float, 123_457)
    assert len(points) == 1000 and points[0] == (1, 1.0) and points[-1] == (123_457, 123_457.0)
    assert json_lines(tmp_path / "metrics.jsonl") == []  # not a log step


@pytest.mark.parametrize("alphas", [ALPHAS, None, torch.cat([ALPHAS[:-1], torch.zeros(1)])])
def test_noise_schedule_is_drawn_as_a_curve(alphas):
    pictures = {}
    describe.noise_schedule(SimpleNamespace(image=lambda tag, image, step: pictures.update({tag: image})), alphas)
    assert pictures.keys() == ({"06_Diffusion/snr"} if alphas is None else {"06_Diffusion/snr", "06_Diffusion/beta"})
    curve = (np.asarray(pictures["06_Diffusion/snr"]) == (0xD0, 0x60, 0)).all(2)
    height = np.array([np.flatnonzero(column).mean() for column in curve.T if column.any()])
    assert len(height) > 390 and (np.diff(height) >= 0).all()  # downwards: ever less signal


def test_architecture_and_configuration_are_tables(unet, tmp_path):
    unet.requires_grad_(False)
    unet.mid_block.requires_grad_(True)
    metrics = Metrics(tmp_path, tmp_path / "tb")
    describe.architecture(metrics, unet)
    describe.configuration(metrics, {"lr": 1e-5, "betas": (0.9, 0.99), "resume": None}, "sdxl 0123abcd", CPU)
    metrics.close()
    read = read_events(tmp_path / "tb")
    texts = {
        tag: read.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in read.Tags()["tensors"]
        if tag.endswith("text_summary")
    }
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in texts["08_Model_Architecture/blocks/text_summary"].splitlines()[2:]
    ]
    mid, total = (f"{sum(p.numel() for p in module.parameters()):,}" for module in (unet.mid_block, unet))
    assert ["mid_block", mid, mid, "float32"] in rows
    assert ["conv_in", "1,184", "0", "float32"] in rows
    assert rows[-1] == ["all", total, mid, "float32"]
    assert '"lr": 1e-05' in texts["15_Configuration/args/text_summary"]
    assert f"torch {torch.__version__}" in texts["15_Configuration/versions/text_summary"]
    assert texts["15_Configuration/caches/text_summary"] == "sdxl 0123abcd"


def test_the_document_names_every_tag_and_no_other(unet, tmp_path, monkeypatch):
    text = (REPO / "docs" / "logging.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\d\d_\w+/[^`]+)`", text, re.M)
    patterns = {tag: re.sub(r"<\w+>", ".+", re.escape(tag)) for tag in named}
    stats = make_stats(unet, tmp_path, flops_per_image=1e9, shard_readers=2)
    stats._peak = 100.0
    look, rates = diagnostics.Diagnostics(unet, 1, ALL, World(), CPU), optimizer_of()
    rates.param_groups[0]["d"] = 1e-6
    micro_step(unet, random_batch(1, size=16), stats)
    stats.gradients(log_now=True)
    stats.epoch_end()
    look.before(1)
    written = {tag for kind in (*stats.read(1, rates, torch.amp.GradScaler("cpu")), *look.after(1)) for tag in kind}
    once = SimpleNamespace(
        **{
            name: lambda tag, *_: written.add(tag) if isinstance(tag, str) else None
            for name in ("image", "text", "curve", "hparams")
        }
    )
    describe.planned_learning_rate(once, float, 10)
    describe.noise_schedule(once, ALPHAS)
    describe.architecture(once, unet)
    describe.configuration(once, {}, "", CPU)
    unnamed = {tag for tag in written if not any(re.fullmatch(p, tag) for p in patterns.values())}
    assert unnamed == set()
    never = {tag for tag, p in patterns.items() if not any(re.fullmatch(p, t) for t in written)}
    elsewhere = {"13_Noise_Visualization/fixed_latent", "01_Training/mask_share"}  # the second: test_masks.py
    assert never == elsewhere | {tag for tag in patterns if "/gpu_" in tag}


FULLY_SHARDED = """
import copy, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from diffusers import UNet2DConditionModel
from cachetrain.training.logs.diagnostics import Diagnostics
from cachetrain.training.logs.statistics import Statistics
from cachetrain.training.flags import GROUPS

class World:
    def __init__(self, ranks):
        self.ranks = ranks

    def sum(self, tensor):
        tensor = tensor.clone()
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor

def tags_of(unet, world, part):
    stats = Statistics(unet, "epsilon", world, torch.device("cpu"), GROUPS, ".", gradient_clip=1.0)
    look = Diagnostics(unet, 1, {9}, world, torch.device("cpu"))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    unet(latents[part], timesteps[part], hidden[part]).sample.square().mean().backward()
    stats.gradients(log_now=True)
    look.before(1)
    optimizer.step()
    return look.after(1)[0] | stats.read(1, optimizer)[0]

dist.init_process_group("gloo")
torch.manual_seed(0)
torch.set_num_threads(1)
latents, timesteps, hidden = torch.randn(4, 4, 8, 8), torch.tensor([1, 500, 700, 3]), torch.randn(4, 7, 64)
unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(sys.argv[1]))
plain, mesh = copy.deepcopy(unet), init_device_mesh("cpu", (2,))
for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet]:
    fully_shard(block, mesh=mesh)
rank = dist.get_rank()
tags, expected = tags_of(unet, World(2), slice(2 * rank, 2 * rank + 2)), tags_of(plain, World(1), slice(None))
compared = [tag for tag in expected if tag[:2] in ("09", "11") or "grad" in tag]
assert len(compared) > 60 and tags.keys() == expected.keys()
for tag in compared:
    assert abs(tags[tag] - expected[tag]) <= 1e-3 * abs(expected[tag]) + 1e-9, (tag, tags[tag], expected[tag])
dist.destroy_process_group()
"""


def test_sharded_parameters_give_the_tags_of_whole_ones(tmp_path):
    (tmp_path / "script.py").write_text(FULLY_SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, tmp_path / "script.py", TINY / "unet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_launcher_serves_the_runs_on_loopback_only(tmp_path):
    metrics = Metrics(tmp_path, tmp_path / "tb" / "run1")
    metrics.scalars(1, {"loss": 1.0})
    metrics.close()
    command = [sys.executable, REPO / "launch_tensorboard.py", "--logdir", tmp_path / "tb", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        port = next(int(found[1]) for line in process.stdout if (found := re.search(r"//127.0.0.1:(\d+)/", line)))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=HANG_S) as answer:
            assert json.load(answer) == ["run1"]
        listening = [
            line.split()[1]
            for path in ("/proc/net/tcp", "/proc/net/tcp6")
            for line in open(path)
            if line.split()[3] == "0A"
        ]
        here = [address for address in listening if int(address.split(":")[1], 16) == port] if listening else []
        assert here == [f"0100007F:{port:04X}"]
        outside = socket.gethostbyname(socket.gethostname())
        if not outside.startswith("127."):
            with pytest.raises(OSError):
                socket.create_connection((outside, port), timeout=2)
    finally:
        process.terminate()
        process.wait(HANG_S)


def test_launcher_says_what_is_missing(tmp_path):
    command = [sys.executable, REPO / "launch_tensorboard.py", "--logdir", tmp_path / "none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and str(tmp_path / "none") in done.stderr
