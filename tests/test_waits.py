"""The host waits for the device only where it must, and the UNet compiles into one graph. Proven without a GPU.

On a CPU nothing waits, so what would wait elsewhere is counted: every read of a tensor's value by the host.
"""

import traceback
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import bare_run, load_script, run_script, trainer_argv, where_the_host_may_wait
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cachetrain.data.loader import on_device, pack
from cachetrain.distributed import World
from cachetrain.modeling.precision import autocast_for
from cachetrain.training import run as opening

torch.set_num_threads(1)
trainer = load_script("train_from_cached.py")

# What gives a tensor's values to Python, by name of the method...
METHODS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__complex__",
           "__array__", "__contains__", "__format__", "__repr__", "nonzero", "is_nonzero", "equal", "allclose",
           "unique"}  # fmt: skip
# ... and operators that read values, or whose result has a size that depends on them.
OPERATORS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
LOG_STEP, MAX_STEPS, ACCUM = 3, 4, 2


class Reads:
    """Collects reads of tensors while it is on: a list of (step, what, where)."""

    def __init__(self):
        self.found, self.step, self._modes = [], 0, []

    @property
    def is_on(self):
        return bool(self._modes)

    def on(self):
        assert not self.is_on
        self._modes = [_Methods(self), _Operators(self)]
        for mode in self._modes:
            mode.__enter__()

    def off(self):
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)
        self._modes = []

    @contextmanager
    def allowed(self):
        """Around what may read."""
        was_on = self.is_on
        self.off()
        try:
            yield
        finally:
            if was_on:
                self.on()

    def add(self, what, tensor):
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        optimi = frames[-1].filename.rpartition("/optimi/")[2]
        # optimi counts steps in an int32 on the host, whatever the device. On a CPU its StableAdamW reads the RMS of
        # each tensor; on CUDA its Triton kernels do not.
        if optimi == "stableadamw.py" or (optimi == "adam.py" and tensor.dtype == torch.int32):
            return
        self.found.append((self.step, what, [f"{f.filename}:{f.lineno}" for f in frames[-3:]]))


class _Methods(TorchFunctionMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in METHODS:
            self.reads.add(name, args[0])
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indexed_by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in OPERATORS or indexed_by_mask:
            self.reads.add(f"aten::{name}", args[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t[0].item(), lambda t: t.tolist(), lambda t: t.numpy(), lambda t: t.cpu(), lambda t: bool(t.any()),
        lambda t: float(t[0]), lambda t: 1 if t[0] > 0 else 2, lambda t: [1, 2, 3][t[0].long()], lambda t: t[t > 0],
        lambda t: t.nonzero(), lambda t: torch.equal(t, t), lambda t: f"{t[0]:.2f}", lambda t: 2.0 in t,
    ],
)  # fmt: skip
def test_reads_of_every_kind_are_seen(read):
    reads, tensor = Reads(), torch.ones(3)
    reads.on()
    try:
        read(tensor)
    finally:
        reads.off()
    assert reads.found


def test_arithmetic_is_no_read():
    reads, tensor, weight = Reads(), torch.ones(3), torch.ones(3, requires_grad=True)
    reads.on()
    try:
        torch.where(tensor > 0, tensor * weight, weight).sum().backward()
        tensor.to("cpu", torch.bfloat16, non_blocking=True).index_add_(
            0, tensor.long().clamp(max=2), weight.bfloat16()
        )
    finally:
        reads.off()
    assert reads.found == []


@pytest.fixture
def reads(monkeypatch):
    """Reads of a run of the trainer from the first forward pass on; log steps, validation, saves and samples may."""
    reads = Reads()
    where_the_host_may_wait(monkeypatch, reads.allowed)
    forward, calls = trainer.forward_pass, count()

    def counted(*args, **kwargs):
        if reads.step == 0:
            reads.on()
        if reads.is_on:  # not in a validation
            reads.step = 1 + next(calls) // ACCUM
        return forward(*args, **kwargs)

    monkeypatch.setattr(trainer, "forward_pass", counted)
    yield reads
    reads.off()


def train_with_everything(data, model, out, precision, optimizer, *more):
    """A short run with everything on."""
    flags = {
        "--precision": precision, "--optimizer": optimizer, "--num_workers": 1,
        "--objective": "v_prediction", "--noise_gamma": 5, "--offset_noise": 0.1, "--cond_dropout": 0.3,
        "--timestep_sampling": "stratified", "--batch_size": 2, "--gradient_accum": ACCUM, "--gradient_clip": 0.5,
        "--ema_decay": 0.9, "--scheduler": "cosine", "--warmup_steps": 2, "--lr": 1e-4, "--max_steps": MAX_STEPS,
        "--log_step": LOG_STEP, "--diagnostic_steps": LOG_STEP, "--save_steps": LOG_STEP, "--val_steps": LOG_STEP,
        "--sample_steps": LOG_STEP, "--val_split": 0.2, "--sample_prompt": "a red circle", "--sample_cfgs": 2,
        "--sampler_steps": 1,
    }  # fmt: skip
    more = [*more, "--use_snr", "--save_on_epoch", "--log_groups", *range(1, 16)]
    argv = trainer_argv(data, model, out, *(word for pair in flags.items() for word in pair), *more)
    assert run_script("train_from_cached.py", *argv) == 0
    assert len(list((out / "samples").iterdir())) == 2
    assert (out / f"checkpoint-{LOG_STEP:06d}").exists()


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("fp32", "adamw"), ("bf16", "lion"), pytest.param("bf16_pure", "stableadamw", marks=pytest.mark.slow),
     ("fp16", "adamw")],
)  # fmt: skip
def test_host_reads_nothing_outside_log_steps_saves_and_samples(
    precision, optimizer, reads, shapes, model_t5, tmp_path
):
    train_with_everything(shapes, model_t5, tmp_path / "run", precision, optimizer)
    assert reads.step == MAX_STEPS
    if optimizer == "adamw" and precision != "bf16_pure":  # torch's, which skips a bad step on the device
        assert reads.found == []
    else:  # the host asks once a step, in one place
        assert [step for step, what, _ in reads.found if what == "item"] == list(range(1, MAX_STEPS + 1))
        assert all("cachetrain/training/nonfinite.py:" in frames[-1] for *_, frames in reads.found)


def test_a_read_in_the_step_is_noticed(reads, shapes, model_t5, tmp_path, monkeypatch):
    forward = trainer.forward_pass

    def reading(*args, **kwargs):
        losses = forward(*args, **kwargs)
        assert losses[0].mean().item() > 0
        return losses

    monkeypatch.setattr(trainer, "forward_pass", reading)
    flags = ["--batch_size", 2, "--gradient_accum", ACCUM, "--max_steps", 3, "--log_step", 2]
    assert run_script("train_from_cached.py", *trainer_argv(shapes, model_t5, tmp_path / "run", *flags)) == 0
    assert {step for step, *_ in reads.found} == {1, 2, 3}
    assert {what for _, what, _ in reads.found} >= {"item", "aten::_local_scalar_dense"}


# Compilation


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that --compile makes, uncompiled: a list that grows."""
    made, compile_module = [], UNet2DConditionModel.compile

    def keep(graph, _):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(UNet2DConditionModel, "compile", lambda self, **kw: compile_module(self, backend=keep, **kw))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def open_unet(data, model, suffix, *flags):
    """The UNet as the trainer opens it with --compile."""
    argv = ["--train_data_dir", data, "--model", model, "--output_dir", "x", "--txtcache_suffix", suffix, "--compile"]
    args = trainer.parse_args([*map(str, argv), "--precision", "fp32", *flags])
    return opening.open_unet(opening.open_run(args, World()))[0]


def step(unet, tokens, size=(8, 8), masked=True, batch_size=2, precision="fp32"):
    """Forward and backward of one batch with texts of that many tokens; returns the loss."""
    torch.manual_seed(0)
    latents, noise = torch.randn(2, batch_size, 4, *size)
    batch = {
        "latents": latents,
        "noise": noise,
        "timesteps": 1000 * torch.rand(batch_size),
        "conditioning": {
            "encoder_hidden_states": torch.randn(batch_size, tokens, 64),
            "encoder_attention_mask": torch.arange(tokens).expand(batch_size, -1) < tokens - 3 if masked else None,
        },
    }
    (batch,) = on_device([pack(batch)], torch.device("cpu"))
    autocast = autocast_for(torch.device("cpu"), precision)
    run = bare_run(objective="flow", alphas_cumprod=None, autocast=autocast, args={"use_snr": False, "loss": None})
    loss = trainer.forward_pass(unet, batch, run, torch.float32).loss.mean()
    loss.backward()
    return loss.item()


@pytest.mark.slow  # test_compiled_run_compiles_nothing_but_the_step and SDXL's with checkpointing show as much
@pytest.mark.parametrize("flags", [[], ["--gradient_checkpointing"]])
def test_compiled_unet_is_one_graph(flags, graphs, shapes, model_t5):
    unet = open_unet(shapes, model_t5, ".txt_t5cache", *flags)
    for _ in range(3):  # fullgraph: a graph break would be an error
        step(unet, 24)
    assert len(graphs) == 1
    assert all(p.grad is not None for p in unet.parameters())


@pytest.mark.slow
def test_compiled_unet_is_one_graph_for_each_size(graphs, shapes, model_sd):
    unet = open_unet(shapes, model_sd, ".txt_clipl")
    for size in 2 * ((8, 8), (8, 12), (12, 8), (10, 14), (14, 10), (6, 18), (12, 12)):
        step(unet, 77, size, masked=False)
    assert len(graphs) == 7


def test_compiled_run_compiles_nothing_but_the_step(graphs, shapes, model_t5, tmp_path):
    train_with_everything(
        shapes, model_t5, tmp_path / "run", "fp32", "adamw", "--compile"
    )  # with validation, samples and pictures
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_unet_trains_like_the_eager_one(precision, shapes, model_t5):
    losses = {}
    for flag in ("compiled", "eager"):
        unet = open_unet(shapes, model_t5, ".txt_t5cache")
        optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
        with torch.compiler.set_stance("force_eager" if flag == "eager" else "default"):
            losses[flag] = []
            for _ in range(5):
                losses[flag].append(step(unet, 24, batch_size=4, precision=precision))
                optimizer.step()
                optimizer.zero_grad()
    # bfloat16 rounds fewer times in fused kernels, and what differs grows with the steps.
    assert losses["compiled"][0] == pytest.approx(losses["eager"][0], rel=1e-4 if precision == "fp32" else 1e-2)
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-4 if precision == "fp32" else 1e-1)
    assert losses["eager"][-1] < losses["eager"][0]
