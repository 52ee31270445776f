"""What only a GPU can show: prefetch, skipped steps, host waits, precisions, saves, resume, NCCL, --compile.

`CACHETRAIN_REHEARSE=1 pytest -m gpu` runs the same on the CPU, apart from what only CUDA has, to test the tests.
"""

import os
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from functools import partialmethod

import pytest
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from helpers import (
    HANG_S,
    REPO,
    digest,
    distance,
    load_script,
    open_pairs,
    train,
    trainer_argv,
    weights_of,
    where_the_host_may_wait,
)
from runs import BRIEF, RESUME, Runs, content

from cachetrain.checkpoints.manifest import damages
from cachetrain.checkpoints.save import Saving, checkpoints
from cachetrain.data import loader as loading
from cachetrain.data.batching import BatchSampler
from cachetrain.data.index import PairIndex
from cachetrain.distributed import World, copy_to_host, wrap
from cachetrain.modeling.load import load_unet
from cachetrain.training import run as opening
from cachetrain.training.nonfinite import step_if_finite
from cachetrain.training.optim import loss_scaler, make_optimizer

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms, before CUDA starts
REHEARSED = bool(os.environ.get("CACHETRAIN_REHEARSE"))
DEVICE = torch.device("cpu" if REHEARSED else "cuda", None if REHEARSED else 0)
CUDA = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="no CUDA device; CACHETRAIN_REHEARSE=1: CPU"),
]
trainer = load_script("train_from_cached.py")
ON_DEVICE = ["--device", DEVICE, "--batch_size", 4, "--lr", 1e-3]


def logged_losses(data, model, out, *flags):
    """Loss of each step, and the trained weights, of a run on the device unless `flags` say otherwise."""
    lines, weights = train(data, model, out, *ON_DEVICE, "--max_steps", 4, *flags)
    return [line["01_Training/loss_raw"] for line in lines], weights


# Data


def test_prefetched_batches_are_the_loaders(shapes):
    index = PairIndex([str(shapes)], ".img_sdxl", ".txt_t5cache")
    for workers in (0, 2):
        loader = loading.make_loader(open_pairs(index), BatchSampler(index, 4, 0, 6), workers, pin_memory=CUDA)
        expected = [loading.unpack(packed) for packed in loading.batches_of(loader)]
        found = list(loading.on_device(loader, DEVICE))
        assert len(found) == len(expected) == 6
        for batch, reference in zip(found, expected, strict=True):
            assert batch["latents"].device.type == DEVICE.type
            for name in ("latents", "noise", "timesteps", "samples"):
                assert torch.equal(batch[name].cpu(), reference[name])
            hidden = "encoder_hidden_states"
            assert torch.equal(batch["conditioning"][hidden].cpu(), reference["conditioning"][hidden])


@pytest.mark.skipif(not CUDA, reason="the CPU has no streams")
def test_the_next_batch_is_copied_while_the_device_computes(monkeypatch):
    copies, move = [], loading._to_device

    def watched(packed, device):
        moved = move(packed, device)
        copies.append(torch.cuda.current_stream().record_event())
        return moved

    monkeypatch.setattr(loading, "_to_device", watched)
    packed = [loading.pack({"latents": torch.full((4, 64, 64), float(i))}) for i in range(3)]
    batches = loading.on_device([p._replace(data=p.data.pin_memory()) for p in packed], DEVICE)
    next(batches)
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)  # about a second of work on the stream of the step
    busy = torch.cuda.current_stream().record_event()
    next(batches)  # moves the third
    copies[2].synchronize()
    assert not busy.query()
    assert [batch["latents"].unique().item() for batch in batches] == [2.0]


# The step


def test_fused_adamw_skips_a_step_that_is_not_finite_without_asking_the_host():
    torch.manual_seed(0)
    weights = [torch.randn(33, 7, device=DEVICE, requires_grad=True) for _ in range(3)]
    optimizer, scaler = make_optimizer("adamw", weights, 0.1, (0.9, 0.99), 0.1), loss_scaler(DEVICE, "fp32")

    def everything():
        state = [tensor.clone() for p in weights for tensor in optimizer.state[p].values()]
        return [p.detach().clone() for p in weights] + state

    seen = []
    for bad in (False, True, False):
        for p in weights:
            p.grad = torch.ones_like(p)
        if bad:
            weights[1].grad[2, 3] = torch.nan
        finite = torch.stack([p.grad.isfinite().all() for p in weights]).all()
        with hosts_that_wait_fail():
            step_if_finite(optimizer, scaler, finite)
        seen.append(everything())
    same = [all(torch.equal(a, b) for a, b in zip(seen[i], seen[i + 1], strict=True)) for i in (0, 1)]
    assert same == [True, False]
    assert all(tensor.isfinite().all() for tensor in seen[-1])


@contextmanager
def hosts_that_wait_fail():
    """Context in which it is an error that the host waits for a CUDA device."""
    torch.cuda.set_sync_debug_mode("error") if CUDA else None
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default") if CUDA else None


@pytest.fixture
def waits(monkeypatch):
    """The lines at which the host waits for the device, from the first forward pass on; log steps, validation, saves
    and samples may wait."""
    found, main = [], threading.main_thread()

    def show(message, category, filename, lineno, *_):
        if "called a synchronizing" in str(message) and threading.current_thread() is main:
            found.append(f"{filename}:{lineno}")

    def mode(name):
        torch.cuda.set_sync_debug_mode(name) if CUDA else None

    @contextmanager
    def allowed():
        mode("default")
        yield
        mode("warn" if started else "default")

    where_the_host_may_wait(monkeypatch, allowed)
    forward = trainer.forward_pass

    def counted(*args, **kwargs):
        if not started:
            started.append(True)
            mode("warn")
        return forward(*args, **kwargs)

    started = []
    monkeypatch.setattr(trainer, "forward_pass", counted)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        yield found
    mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_host_waits_only_at_log_steps_saves_validations_and_samples(precision, waits, shapes, model_t5, tmp_path):
    flags = {
        "--precision": precision, "--num_workers": 1, "--max_steps": 6, "--log_step": 3, "--save_steps": 3,
        "--val_steps": 3, "--val_split": 0.2, "--sample_steps": 3, "--sample_prompt": "a red circle",
        "--sample_cfgs": 2, "--sampler_steps": 1, "--ema_decay": 0.9, "--gradient_clip": 0.5, "--cond_dropout": 0.3,
        "--noise_gamma": 5, "--objective": "v_prediction", "--gradient_accum": 2, "--timestep_sampling": "stratified",
    }  # fmt: skip
    more = [word for pair in flags.items() for word in pair]
    argv = trainer_argv(shapes, model_t5, tmp_path / "run", *ON_DEVICE, *more, "--use_snr")
    assert trainer.main(argv) == 0
    assert waits == []
    if CUDA:  # they are seen
        torch.cuda.set_sync_debug_mode("warn")
        torch.ones(1, device=DEVICE).item()
        torch.cuda.set_sync_debug_mode("default")
        assert len(waits) == 1


def test_weights_are_channels_last_on_cuda_only(shapes, model_t5):
    flags = ["--output_dir", "x", "--model", model_t5, "--train_data_dir", shapes, "--device", DEVICE]
    args = trainer.parse_args([*map(str, flags), "--precision", "bf16", "--txtcache_suffix", ".txt_t5cache"])
    unet = opening.open_unet(opening.open_run(args, World(DEVICE)))[0]
    convolutions = [m.weight for m in unet.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) > 5
    assert {w.is_contiguous(memory_format=torch.channels_last) for w in convolutions} == {CUDA}


@pytest.fixture(scope="module")
def reference(shapes, model_t5, tmp_path_factory):
    """Losses and weights of the run in float32 on the CPU."""
    return logged_losses(shapes, model_t5, tmp_path_factory.mktemp("reference") / "run", "--device", "cpu")


@pytest.mark.parametrize(
    ("precision", "optimizer", "dtype", "tolerance"),
    [("fp32", "adamw", torch.float32, 1e-3), ("bf16", "adamw", torch.float32, 2e-2),
     ("bf16_pure", "adamw", torch.bfloat16, 3e-2), ("bf16_pure", "stableadamw", torch.bfloat16, 5e-2),
     ("fp16", "adamw", torch.float32, 1e-2)],
)  # fmt: skip
def test_precision_trains_like_float32_on_the_cpu(
    precision, optimizer, dtype, tolerance, reference, shapes, model_t5, tmp_path
):
    flags = ["--precision", precision, "--optimizer", optimizer]
    losses, weights = logged_losses(shapes, model_t5, tmp_path / "run", *flags)
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert losses == pytest.approx(reference[0], rel=tolerance)
    start = weights_of(model_t5 / "unet")
    moved = [not torch.equal(tensor.float(), start[name].to(dtype).float()) for name, tensor in weights.items()]
    assert sum(moved) > 0.9 * len(moved)


# Checkpoints


@pytest.fixture
def deterministic():
    """The same bits from run to run: some kernels of a backward pass on CUDA add in whatever order they get to it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_training_goes_on_while_a_checkpoint_is_written(shapes, model_t5, tmp_path, monkeypatch):
    reached, go, asked, passes = threading.Event(), threading.Event(), {}, []
    real_save, real_write, real_forward = Saving.save, Saving._write, trainer.forward_pass

    def save(self, step, unet, *args):
        asked[step] = digest({name: tensor.cpu() for name, tensor in unet.state_dict().items()})
        real_save(self, step, unet, *args)

    def write(*args):
        reached.set()
        assert go.wait(HANG_S)
        real_write(*args)

    def forward(*args, **kwargs):
        passes.append(1)
        if len(passes) == 4:  # two steps after the save of the second
            assert reached.wait(HANG_S) and not checkpoints(tmp_path / "run")
            go.set()
        return real_forward(*args, **kwargs)

    monkeypatch.setattr(Saving, "save", save)
    monkeypatch.setattr(Saving, "_write", write)
    monkeypatch.setattr(trainer, "forward_pass", forward)
    train(shapes, model_t5, tmp_path / "run", *ON_DEVICE, "--max_steps", 5, "--save_steps", 2, "--ema_decay", 0.5)
    assert list(asked) == [2, 4, 5] and len(set(asked.values())) == 3
    for step, expected in asked.items():
        path = tmp_path / "run" / f"checkpoint-{step:06d}"
        assert digest(weights_of(path / "unet")) == expected and damages(path) == {}


@pytest.mark.parametrize("flags", [["bf16"], ["bf16_pure", "--optimizer", "stableadamw"], ["fp16", "--cpu_offload"]])
def test_interrupted_run_resumes_bit_exact(flags, shapes, model_t5, tmp_path, deterministic):
    runs = Runs(shapes, model_t5, tmp_path)
    flags, whole = [*BRIEF, "--device", DEVICE, "--num_workers", 2, "--precision", *flags], runs.new()
    samples = runs.train(whole, *flags)
    resumed = runs.interrupted(whole, 2)
    assert runs.train(resumed, *flags, *RESUME) == samples[2:]
    assert content(resumed, 4) == content(whole, 4)


# Several processes, compilation


@pytest.mark.parametrize("fsdp", [False, True])
def test_one_rank_reduces_and_shards_through_its_backend(fsdp, model_t5, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # the name of the host need not resolve
    inputs = torch.randn(2, 4, 8, 8, device=DEVICE), torch.tensor([3, 900], device=DEVICE)
    hidden = torch.randn(2, 5, 64, device=DEVICE)
    gradients, world = [], World(DEVICE)
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    world.ranks = 1 if fsdp else 2  # as if there were another: DDP is left out with one rank
    try:
        for wrapped in (False, True):
            unet = load_unet(model_t5 / "unet").to(DEVICE)
            model = wrap(unet, world, fsdp) if wrapped else unet
            model(*inputs, hidden).sample.square().mean().backward()
            gradients.append(copy_to_host({name: p.grad for name, p in unet.named_parameters()}, world))
        assert world.sum(torch.full((3,), 2.0, device=DEVICE)).tolist() == [2.0] * 3
        assert world.any(True, False) == [True, False]
    finally:
        world.ranks = 2
        world.close()
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


def test_one_rank_of_torchrun_trains_alike(shapes, model_t5, tmp_path):
    flags = [*ON_DEVICE, "--max_steps", 2]
    expected = train(shapes, model_t5, tmp_path / "alone", *flags)[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1]
    argv = trainer_argv(shapes, model_t5, tmp_path / "rank", *flags, "--device", DEVICE.type)
    command = [str(word) for word in [*launcher, REPO / "train_from_cached.py", *argv]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    weights = weights_of(tmp_path / "rank" / "checkpoint-000002" / "unet")
    assert distance(weights, expected, weights_of(model_t5 / "unet")) < 1e-3


def test_compiled_run_has_the_losses_of_the_eager_one(shapes, model_t5, tmp_path, monkeypatch):
    if REHEARSED:  # inductor takes a minute
        monkeypatch.setattr(
            UNet2DConditionModel, "compile", partialmethod(UNet2DConditionModel.compile, backend="eager")
        )
    torch._dynamo.reset()
    eager, _ = logged_losses(shapes, model_t5, tmp_path / "eager")
    compiled, _ = logged_losses(shapes, model_t5, tmp_path / "compiled", "--compile")
    assert compiled == pytest.approx(eager, rel=1e-3)
    torch._dynamo.reset()
