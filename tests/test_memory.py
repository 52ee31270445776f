"""The estimate of a run's memory, against what a step on the CPU allocates and what was seen on GPUs."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import SD15, TINY, memory_model
from helpers import train as run
from torch._C._profiler import _EventType
from torch.profiler._utils import traverse_dfs

from cachetrain.data import ram
from cachetrain.modeling import lora
from cachetrain.training import memory
from cachetrain.training.optim import make_optimizer

GIB = 2**30
CONFIG = json.loads((TINY / "unet" / "config.json").read_text())
BASE = memory.Setup(8, "bf16", "adamw", checkpointing=False, keeps_gradients=False, ema=False, offload=False)


@pytest.fixture(scope="module")
def tiny():
    return memory_model(CONFIG, "txt_t5cache", {"emb": 64}, tokens=16, side=8)


def allocated_by_steps(setup, train):
    """The most bytes that torch's allocator had given to two real steps on the CPU, the model included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        unet = UNet2DConditionModel.from_config(CONFIG)
        if setup.precision == "bf16_pure":
            torch.nn.Module.to(unet, torch.bfloat16)
        train(unet)
        if setup.checkpointing:
            unet.enable_gradient_checkpointing()
        trained = [p for p in unet.parameters() if p.requires_grad]
        options = {"gradient_release": setup.releases_gradients}
        optimizer = make_optimizer(setup.optimizer, trained, 1e-3, (0.9, 0.99), 0.01, **options)
        dtype = trained[0].dtype
        latents, texts = torch.randn(setup.batch_size, 4, 8, 8), torch.randn(setup.batch_size, 16, 64).to(dtype)
        for _ in range(2):
            for _ in range(1 + setup.keeps_gradients):
                steps = torch.zeros(setup.batch_size, dtype=torch.long)
                with torch.autocast("cpu", torch.bfloat16, enabled=setup.precision == "bf16"):
                    prediction = unet(latents.to(dtype), steps, texts).sample
                (prediction.float() - latents).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return peak_of(profile)


def peak_of(profile):
    """The most bytes alive at a time of what was allocated in a profile.

    What an earlier profile has seen allocated is freed in this one if the garbage collector comes to it only now, and
    counts for nothing.
    """
    events = traverse_dfs(profile.profiler.kineto_results.experimental_event_tree())
    events = [e for e in events if e.tag == _EventType.Allocation]
    sizes, alive, peak = {}, 0, 0
    for event in sorted(events, key=lambda e: (e.start_time_ns, e.extra_fields.alloc_size)):
        block, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            sizes[block] = size
            alive += size
            peak = max(peak, alive)
        else:
            alive -= sizes.pop(block, 0)
    return peak


def all_of_it(unet):
    pass


def only_attn2(unet):
    unet.requires_grad_(False)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".attn2." in name)


def only_an_adapter(unet):
    lora.add(unet, 4, 4.0, "attention")


def only_a_dora(unet):
    lora.add(unet, 4, 4.0, "attention_ff", dora=True)


@pytest.mark.parametrize(
    ("changes", "train"),
    [
        ({}, all_of_it),
        ({"keeps_gradients": True, "optimizer": "lion"}, all_of_it),
        ({"optimizer": "muon"}, all_of_it),
        ({"optimizer": "adafactor"}, all_of_it),
        ({"checkpointing": True}, all_of_it),
        ({"precision": "bf16_pure"}, all_of_it),
        ({"precision": "bf16_pure", "releases_gradients": True, "checkpointing": True}, all_of_it),
        ({}, only_attn2),
        ({"precision": "bf16_pure", "checkpointing": True}, only_an_adapter),
        ({}, only_a_dora),
    ],
)
def test_estimate_is_what_a_step_on_the_cpu_allocates_within_3_percent(changes, train):
    model = memory_model(CONFIG, "txt_t5cache", {"emb": 64}, tokens=16, side=8)
    train(model.unet)
    setup = BASE._replace(batch_size=24, precision="fp32")._replace(**changes)
    estimate = model.estimate(setup)
    assert sum(estimate) == pytest.approx(allocated_by_steps(setup, train), rel=0.03)
    assert estimate.total == int(memory.OVERHEAD * sum(estimate))


def test_estimate_of_autocast_is_a_fifth_too_high_on_a_cpu_which_keeps_norms_in_bfloat16(tiny):
    setup = BASE._replace(batch_size=24)
    measured = allocated_by_steps(setup, all_of_it)
    assert measured < sum(tiny.estimate(setup)) < 1.25 * measured
    assert measured < 0.8 * sum(tiny.estimate(setup._replace(precision="fp32")))


def test_estimate_agrees_with_what_was_seen_on_gpus():
    """docs/performance.md: SD1.5's UNet at 512x512, bf16, AdamW, without checkpointing."""
    model = memory_model(SD15, "txt_clipl", {"emb": 768}, tokens=77, side=64)
    for gib, batch_size, fits in ((79, 48, True), (79, 64, False), (24, 8, True), (24, 12, False)):
        assert (model.estimate(BASE._replace(batch_size=batch_size)).total < gib * GIB) == fits


def test_frozen_weights_beside_an_adapter_take_two_bytes_each_with_bf16(tiny):
    model = memory_model(CONFIG, "txt_t5cache", {"emb": 64}, tokens=16, side=8)
    full = sum(parameter.numel() for parameter in model.unet.parameters())
    only_an_adapter(model.unet)
    adapter = sum(parameter.numel() for parameter in model.unet.parameters()) - full
    estimate = model.estimate(BASE)
    assert (estimate.weights, estimate.optimizer) == (2 * full + 4 * adapter, 8 * adapter)
    assert estimate.step < 0.8 * tiny.estimate(BASE).step


def test_averages_and_optimizer_state_count_where_they_are(tiny):
    estimate = tiny.estimate(BASE._replace(ema=True))
    assert estimate.ema == estimate.weights == estimate.optimizer / 2
    assert tiny.estimate(BASE._replace(ema=True, offload=True))[1:3] == (0, 0)


def test_advice_names_what_fits_and_of_each_nearly_the_largest_batch(tiny):
    setup, room = BASE._replace(batch_size=64), 40 * 2**20
    assert tiny.estimate(setup).total > room
    batch_size = tiny.batch_that_fits(setup, room)
    sizes = [tiny.estimate(setup._replace(batch_size=n)).total for n in (batch_size, batch_size + 2)]
    assert sizes[0] <= room < sizes[1]
    advice = memory.advice(tiny, setup, room)
    assert advice.startswith("what would fit: --batch_size ") and "--gradient_accum" in advice
    for flags in ("--gradient_checkpointing", "--optimizer lion --batch_size", "--precision bf16_pure"):
        assert f"; {flags}" in advice
    assert "no flags make it fit but --cpu_offload" in memory.advice(tiny, setup, 2**20)


def test_a_run_says_what_it_takes_beside_what_is_there_and_is_warned_where_it_does_not_fit(
    shapes, model_t5, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(memory, "available_bytes", lambda: 20 * 2**20)
    run(shapes, model_t5, tmp_path / "run", "--max_steps", 1, "--batch_size", 8, "--save_steps", 5)
    out = capsys.readouterr()
    assert "memory: about " in out.out and "this machine has 20 MiB free" in out.out
    assert "will probably not fit into the memory of this machine; what would fit: --batch_size" in out.err


def test_a_unet_that_the_meta_device_cannot_run_trains_without_an_estimate(
    shapes, model_t5, tmp_path, monkeypatch, capsys
):
    def fails(*_):
        raise NotImplementedError("no such operation")

    monkeypatch.setattr(memory.MemoryModel, "estimate", fails)
    run(shapes, model_t5, tmp_path / "run", "--max_steps", 1, "--batch_size", 2)
    assert "memory: no estimate (NotImplementedError: no such operation)" in capsys.readouterr().out


def test_free_memory_is_what_a_container_may_still_take(tmp_path, monkeypatch):
    assert ram._container_bytes(tmp_path) is None
    for name, text in (("max", "1000\n"), ("current", "700\n"), ("stat", "anon 600\ninactive_file 50\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert ram._container_bytes(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert ram._container_bytes(tmp_path) is None
    monkeypatch.setattr(ram, "_container_bytes", lambda: 350)
    assert memory.free_memory(torch.device("cpu")) == (350, "this machine")
