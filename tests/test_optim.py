"""Optimizers against torch and their papers, and the table of them; bfloat16, CPU offload and loss scaling."""

import copy
import importlib
import importlib.util
import re
import subprocess
import sys

import pytest
import torch
from helpers import train

from cachetrain.checkpoints.state import read_state
from cachetrain.modeling.load import load_unet
from cachetrain.modeling.precision import autocast_for
from cachetrain.training.nonfinite import step_if_finite
from cachetrain.training.optim import clip_gradients, loss_scaler, make_optimizer
from cachetrain.training.optimizers import KAHAN_OPTIMIZERS, OPTIMIZERS, check_optimizer, default_betas

RATES = {"prodigy": 1.0}
# Per dtype, of weights near 1: float32 to rounding; bfloat16 with a Kahan sum to half its last bit (2^-9).
TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-8, "atol": 2**-9}}
OUTER = re.compile("conv_in|conv_out|time_embedding")  # of the tiny UNet, the layers that are no hidden matrices
MUON_TOLERANCE = {"rtol": 0, "atol": 2e-4}  # it orthogonalizes in bfloat16: 5% of how far the weights go
# bitsandbytes is large and, once installed, loaded by diffusers: its cases are slow ones, for which one installs it.
ADAMW8 = (
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="no bitsandbytes"),
)
ALL = [pytest.param(name, marks=ADAMW8 if name == "adamw8" else ()) for name in OPTIMIZERS]
DTYPED = [pytest.param(*p.values, torch.float32, marks=p.marks) for p in ALL]
DTYPED += [(name, torch.bfloat16) for name in KAHAN_OPTIMIZERS]


def optimizer_of(name, parameters, weight_decay=0.01, lr=None, **kwargs):
    betas = default_betas(name, parameters[0].dtype == torch.bfloat16)
    return make_optimizer(name, parameters, lr or RATES.get(name, 1e-2), betas, weight_decay, **kwargs)


def parameters_of(dtype, seed=0):
    """Weights near 1. One has over 4,096 elements, so that adamw8 keeps its state in 8 bits; one is channels-last."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [1 + 0.2 * torch.rand(shape, generator=generator) for shape in ((80, 60), (7,), (2, 3, 4, 4))]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    return [torch.nn.Parameter(tensor.to(dtype)) for tensor in tensors]


def gradients_of(parameters, step):
    """Gradients of step number `step`, in the layout of the parameters, as autograd makes them.

    Their size jumps, so that StableAdamW has something to clip.
    """
    generator = torch.Generator().manual_seed(step)
    scale = 10 if step % 5 == 4 else 1
    gradients = [scale * (0.3 + torch.randn(p.shape, generator=generator)) for p in parameters]
    return [torch.empty_like(p).detach().copy_(gradient) for p, gradient in zip(parameters, gradients, strict=True)]


def run(optimizer, parameters, steps):
    for step in steps:
        for p, gradient in zip(parameters, gradients_of(parameters, step), strict=True):
            p.grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def assert_equal(parameters, others):
    for one, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=0)


class Paper:
    """AdamW (Loshchilov & Hutter 2019), Lion (Chen et al. 2023), StableAdamW (Wortsman et al. 2023), Muon (Jordan et
    al. 2024, with the rate of Liu et al. 2025) and Adafactor (Shazeer & Stern 2018), in float64."""

    def __init__(self, name, parameters, lr, betas, weight_decay, eps=1e-8):
        self.name, self.lr, self.betas, self.weight_decay, self.eps = name, lr, betas, weight_decay, eps
        self.weights = [p.detach().double() for p in parameters]
        self.first = [torch.zeros_like(w) for w in self.weights]
        self.second = [torch.zeros_like(w) for w in self.weights]
        self.step_count = 0

    def step(self, gradients):
        self.step_count += 1
        for i, g in enumerate(gradients):
            self.weights[i] = getattr(self, self.name)(i, g.double())

    def adamw(self, i, g):
        (b1, b2), t, w = self.betas, self.step_count, self.weights[i]
        self.first[i] = b1 * self.first[i] + (1 - b1) * g
        self.second[i] = b2 * self.second[i] + (1 - b2) * g**2
        m, v = self.first[i] / (1 - b1**t), self.second[i] / (1 - b2**t)
        return w - self.lr * (m / (v.sqrt() + self.eps) + self.weight_decay * w)

    def lion(self, i, g):
        (b1, b2), w = self.betas, self.weights[i]
        update = torch.sign(b1 * self.first[i] + (1 - b1) * g)
        self.first[i] = b2 * self.first[i] + (1 - b2) * g
        return w - self.lr * (update + self.weight_decay * w)

    def stableadamw(self, i, g):
        (b1, b2), t, w = self.betas, self.step_count, self.weights[i]
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))  # AdaFactor's debiasing, Algorithm 2
        self.first[i] = b1 * self.first[i] + (1 - b1) * g
        self.second[i] = b2 * self.second[i] + (1 - b2) * g**2
        rms = (g**2 / self.second[i].clamp(min=self.eps**2)).mean().sqrt()
        lr = self.lr / max(1.0, rms.item())
        return w - lr * (self.first[i] / (self.second[i].sqrt() + self.eps) + self.weight_decay * w)

    def muon(self, i, g):
        if g.ndim == 1:
            return self.adamw(i, g)
        b1, w = self.betas[0], self.weights[i]
        self.first[i] = b1 * self.first[i] + (1 - b1) * g
        x = (b1 * self.first[i] + (1 - b1) * g).flatten(1)
        x /= x.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
        rate = 0.2 * max(x.shape) ** 0.5
        return w - self.lr * (rate * x.view(w.shape) + self.weight_decay * w)

    def adafactor(self, i, g):
        w, weight = self.weights[i], self.step_count**-0.8
        self.second[i] += weight * (g**2 - self.second[i])  # row and column sums are those of the whole average
        v = self.second[i].flatten(1) if g.ndim > 1 else self.second[i]
        v = v.mean(1, keepdim=True) * v.mean(0, keepdim=True) / v.mean() if g.ndim > 1 else v
        update = g / v.view(g.shape).sqrt()
        update /= max(1.0, update.square().mean().sqrt().item())
        rate = min(self.lr, self.step_count**-0.5) * max(1e-3, w.square().mean().sqrt().item())
        return w - rate * update - self.lr * self.weight_decay * w


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", KAHAN_OPTIMIZERS)
def test_optimizer_follows_its_paper(name, dtype):
    parameters = parameters_of(dtype)
    betas = default_betas(name, dtype == torch.bfloat16)
    lr = 1e-3
    optimizer = optimizer_of(name, parameters, weight_decay=0.1, lr=lr)
    paper = Paper(name, parameters, lr, betas, 0.1)
    steps = 20
    for step in range(steps):
        gradients = gradients_of(parameters, step)
        paper.step(gradients)
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
    tolerance = MUON_TOLERANCE if name == "muon" and dtype == torch.float32 else TOLERANCES[dtype]
    for p, expected in zip(parameters, paper.weights, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, **tolerance)


NAMES = ["mid_block.to_q.weight", "mid_block.to_q.bias", "mid_block.conv1.weight", "conv_in.weight",
         "time_embedding.linear_1.weight", "conv_in_of_a_block.weight", "down.lora_magnitude_vector"]  # fmt: skip
SHAPES = [(8, 12), (8,), (6, 3, 3, 3), (6, 4, 3, 3), (8, 4), (5, 4, 1, 1), (1, 8, 1, 1)]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_adafactor_equals_torchs_of_matrices(dtype):
    """In float32 bit for bit; torch's is given convolutions as matrices. The gradients are as small as a UNet's."""
    parameters = parameters_of(dtype)
    copies = [torch.nn.Parameter(p.detach().float().permute(0, 2, 3, 1).flatten(1) if p.ndim == 4 else
                                 p.detach().float().clone()) for p in parameters]  # fmt: skip
    optimizer = make_optimizer("adafactor", parameters, 1e-2, (0.0, 0.0), 0.1)
    reference = torch.optim.Adafactor(copies, lr=1e-2, weight_decay=0.1, eps=(1e-15, 1e-3), foreach=False)
    for step in range(5):
        for parameter, copy_, gradient in zip(parameters, copies, gradients_of(parameters, step), strict=True):
            parameter.grad = gradient = gradient * 1e-5
            copy_.grad = (gradient.permute(0, 2, 3, 1).flatten(1) if gradient.ndim == 4 else gradient).float()
        optimizer.step()
        reference.step()
    tolerance = TOLERANCES[dtype] if dtype == torch.bfloat16 else {"rtol": 0, "atol": 0}
    for parameter, copy_ in zip(parameters, copies, strict=True):
        matrix = parameter.detach().permute(0, 2, 3, 1).flatten(1) if parameter.ndim == 4 else parameter.detach()
        torch.testing.assert_close(matrix.float(), copy_.detach(), **tolerance)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_equals_torchs_muon_and_adamw(layout):
    """Bit for bit; torch's Muon is given a convolution as the matrix that lies in memory."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator) for shape in SHAPES]
    parameters = [torch.nn.Parameter(t.to(memory_format=layout) if t.ndim == 4 else t) for t in parameters]
    matrices = [0, 2, 5]
    order = (0, 2, 3, 1) if layout == torch.channels_last else (0, 1, 2, 3)
    as_matrix = [p.permute(order).flatten(1) if p.ndim == 4 else p for p in parameters]
    copies = [torch.nn.Parameter(m.detach().clone() if i in matrices else parameters[i].detach().clone())
              for i, m in enumerate(as_matrix)]  # fmt: skip
    optimizer = make_optimizer("muon", parameters, 1e-2, (0.95, 0.999), 0.1, names=NAMES)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    muon = torch.optim.Muon([copies[i] for i in matrices], adjust_lr_fn="match_rms_adamw", **options)
    others = [copies[i] for i in range(len(copies)) if i not in matrices]
    adamw = torch.optim.AdamW(others, betas=(0.95, 0.999), fused=True, **options)
    for step in range(5):
        for i, gradient in enumerate(gradients_of(parameters, step)):
            parameters[i].grad = gradient
            copies[i].grad = gradient.permute(order).flatten(1) if i in matrices and gradient.ndim == 4 else gradient
        for one in (optimizer, muon, adamw):
            one.step()
    for i, parameter in enumerate(parameters):
        matrix = parameter.permute(order).flatten(1) if i in matrices and parameter.ndim == 4 else parameter
        assert torch.equal(matrix, copies[i]), NAMES[i]


@pytest.mark.parametrize("parts", [(), ("conv_in", "attn2.to_")])
def test_muon_of_a_run_leaves_first_and_last_layers_to_adamw(parts, shapes, model_t5, tmp_path):
    flags = ["--optimizer", "muon", "--max_steps", 1, "--batch_size", 2]
    flags += ["--unfreeze_in", "--unfreeze_attn2"] if parts else []
    train(shapes, model_t5, tmp_path / "run", *flags)
    state = read_state(tmp_path / "run" / "checkpoint-000001")["optimizer"]["state"]
    named = dict(load_unet(model_t5 / "unet").named_parameters())
    named = {name: p for name, p in named.items() if not parts or any(part in name for part in parts)}
    found = {name: (state[i].keys(), next(iter(state[i].values())).shape) for i, name in enumerate(named)}
    adam = {"exp_avg", "exp_avg_sq", "step"}
    wanted = {name: adam if p.ndim == 1 or OUTER.match(name) else {"momentum_buffer"} for name, p in named.items()}
    assert len(state) == len(named) and found == {name: (wanted[name], p.shape) for name, p in named.items()}
    assert {keys == adam for name, (keys, _) in found.items() if named[name].ndim > 1} == {True, False}


@pytest.mark.parametrize("name", ALL)
def test_weight_decay_is_decoupled(name):
    """A step with weight decay ends lr x weight_decay x weight below one without, whatever the gradient."""
    decayed, plain = parameters_of(torch.float32), parameters_of(torch.float32)
    before = [p.detach().clone() for p in plain]
    lr = RATES.get(name, 1e-2)
    run(optimizer_of(name, decayed, weight_decay=0.1), decayed, [0])
    run(optimizer_of(name, plain, weight_decay=0.0), plain, [0])
    # Prodigy's rate starts at d0 = 1e-6, times Adam's bias correction; StableAdamW's first RMS is 1.
    rate = 1e-6 * (1 - 0.999) ** 0.5 / (1 - 0.9) if name == "prodigy" else lr
    for one, other, start in zip(decayed, plain, before, strict=True):
        torch.testing.assert_close(other.detach() - one.detach(), rate * 0.1 * start, rtol=1e-2, atol=2e-7)
        assert not torch.equal(other.detach(), start)


@pytest.mark.parametrize(("name", "package"), [("adamw8", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        optimizer_of(name, parameters_of(torch.float32))


@pytest.mark.parametrize("name", ALL)
def test_optimizer_descends(name):
    weight = torch.nn.Parameter(torch.randn(5000, generator=torch.Generator().manual_seed(0)))
    optimizer = optimizer_of(name, [weight], weight_decay=0.0)
    losses = []
    for _ in range(100):
        loss = weight.square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", KAHAN_OPTIMIZERS)
def test_kahan_sum_keeps_bf16_on_the_float32_path(name):
    start = [p.detach() for p in parameters_of(torch.bfloat16)]
    ends = {}
    for kind in ("float32", "kahan", "plain"):
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        parameters = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in start]
        optimizer = make_optimizer(name, parameters, 5e-4, (0.9, 0.99), 0.0)  # an 8th of bfloat16's step below 1
        for step in range(200):
            run(optimizer, parameters, [step])
            if kind == "plain":
                torch._foreach_zero_([optimizer.state[p]["kahan_comp"] for p in parameters])
        ends[kind] = torch.cat([p.detach().float().flatten() for p in parameters])
    moved = (ends["float32"] - torch.cat([p.float().flatten() for p in start])).abs().mean()
    assert torch.equal(ends["plain"], torch.cat([p.float().flatten() for p in start]))
    assert (ends["kahan"] - ends["float32"]).abs().mean() < 2**-8  # one last bit: it cannot be stored any nearer
    assert (ends["kahan"] - ends["float32"]).mean().abs() < 0.05 * moved  # and to neither side


@pytest.mark.parametrize("name", KAHAN_OPTIMIZERS)
def test_weight_decay_of_bf16_is_not_rounded_away(name):
    parameters = parameters_of(torch.bfloat16)
    start = [p.detach().float() for p in parameters]
    optimizer = optimizer_of(name, parameters, weight_decay=0.01, lr=1e-2)  # 1e-4 a step; bfloat16 rounds off 4e-3
    for _ in range(600):
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p, before in zip(parameters, start, strict=True):
        torch.testing.assert_close(p.detach().float(), before * (1 - 1e-4) ** 600, rtol=2**-7, atol=0)


@pytest.mark.parametrize("offloaded", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize(("name", "dtype"), DTYPED)
def test_optimizer_state_continues_bit_exact(name, dtype, offloaded):
    parameters, resumed = parameters_of(dtype), parameters_of(dtype, seed=1)
    decay = 0.003  # x lr 1e-2: bfloat16 collects it over three steps, and 20 steps end in between
    optimizer = optimizer_of(name, parameters, decay, cpu_offload=offloaded[0])
    fresh = optimizer_of(name, resumed, decay, cpu_offload=offloaded[1])
    run(optimizer, parameters, range(20))
    for one, other in zip(parameters, resumed, strict=True):
        other.data.copy_(one)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, parameters, range(20, 40))
    run(fresh, resumed, range(20, 40))
    assert_equal(parameters, resumed)


@pytest.mark.parametrize(("name", "dtype"), DTYPED)
def test_cpu_offload_equals_the_optimizer_itself(name, dtype):
    parameters, offloaded = parameters_of(dtype), parameters_of(dtype)
    optimizers = [optimizer_of(name, parameters), optimizer_of(name, offloaded, cpu_offload=True)]
    for step in range(20):
        for optimizer, weights in zip(optimizers, (parameters, offloaded), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = RATES.get(name, 1e-2) * (1 - step / 20)
            run(optimizer, weights, [step])
        assert_equal(parameters, offloaded)
    assert_equal(offloaded, optimizers[1].cpu_parameters)


@pytest.mark.parametrize("cpu_offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KAHAN_OPTIMIZERS)
def test_no_triton_kernel_takes_tensors_on_the_cpu_where_triton_is_installed(name, dtype, cpu_offload, monkeypatch):
    """optimi's StableAdamW asks which kernels fit before it has the tensors, and hears: Triton's."""
    parameters, others = parameters_of(dtype), parameters_of(dtype)
    run(optimizer_of(name, parameters), parameters, range(3))
    for module in ("adam", "lion", "stableadamw"):
        monkeypatch.setattr(importlib.import_module(f"optimi.{module}"), "_default_to_triton", lambda _: True)
    run(optimizer_of(name, others, cpu_offload=cpu_offload), others, range(3))
    assert_equal(parameters, others)


def test_cpu_offload_leaves_parameters_without_gradient():
    parameters = parameters_of(torch.float32)
    before = parameters[1].detach().clone()
    optimizer = optimizer_of("adamw", parameters, cpu_offload=True)
    run(optimizer, parameters, [0])
    moved = parameters[1].detach().clone()
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert not torch.equal(before, moved)
    assert torch.equal(parameters[1].detach(), moved)


@pytest.mark.parametrize("cpu_offload", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_overflowing_fp16_gradient_skips_the_step_and_halves_the_scale(name, cpu_offload):
    device = torch.device("cpu")
    model = torch.nn.Linear(8, 8)
    optimizer = optimizer_of(name, list(model.parameters()), cpu_offload=cpu_offload)
    scaler, autocast = loss_scaler(device, "fp16"), autocast_for(device, "fp16")
    before = [p.detach().clone() for p in model.parameters()]
    scales = []
    for _ in range(2):
        with autocast():
            output = model(torch.ones(1, 8))
        assert output.dtype == torch.float16
        scales.append(scaler.get_scale())
        scaler.scale(output.float().sum()).backward()  # d output = the scale: 65536 is infinite in float16
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if len(scales) == 1:
            assert not norm.isfinite()
            assert_equal(model.parameters(), before)
    assert scales == [65536.0, 32768.0]
    assert norm.isfinite()
    assert not torch.equal(model.weight.detach(), before[0])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("bf16_pure", torch.bfloat16)],
)
def test_autocast_computes_in_the_dtype_of_the_precision(precision, dtype):
    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16 if precision == "bf16_pure" else torch.float32)
    with autocast_for(torch.device("cpu"), precision)():
        assert model(torch.ones(1, 2, dtype=model.weight.dtype)).dtype == dtype


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure"])
def test_loss_is_scaled_with_fp16_only(precision):
    loss = torch.tensor(3.0)
    assert loss_scaler(torch.device("cpu"), precision).scale(loss) is loss
    assert loss_scaler(torch.device("cpu"), "fp16").scale(loss) == 3 * 65536


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clip_equals_torchs_clip_grad_norm(max_norm):
    ours, reference = parameters_of(torch.float32), parameters_of(torch.float32)
    for parameters in (ours, reference):
        for parameter, gradient in zip(parameters, gradients_of(parameters, 1), strict=True):
            parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(reference, max_norm)
    clip_gradients([*ours, torch.nn.Parameter(torch.zeros(3))], norm, max_norm)  # one without a gradient
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


# The table


@pytest.mark.parametrize(("name", "dtype"), DTYPED)
def test_table_says_what_an_optimizer_keeps(name, dtype):
    parameters = parameters_of(dtype)
    optimizer = optimizer_of(name, parameters)
    run(optimizer, parameters, range(2))
    group = optimizer.param_groups[0]
    for parameter, state in optimizer.state.items():
        matrix_fields = optimizer.implementation.matrix_fields if parameter.ndim > 1 else None
        assert (matrix_fields or optimizer.implementation.state_fields) <= state.keys()
    assert optimizer.implementation.group_fields <= group.keys()
    fresh = optimizer_of(name, parameters_of(dtype)).param_groups[0]
    changed = {key for key in group.keys() - {"params", "lr"} if group[key] != fresh.get(key)}
    assert changed <= optimizer.implementation.group_fields
    tensors = [t for t in optimizer.state[parameters[0]].values() if torch.is_tensor(t) and t.numel() > 1]
    kept_bytes = sum(t.numel() * t.element_size() for t in tensors)  # adamw8 has small tables beside them
    expected = parameters[0].numel() * OPTIMIZERS[name].state_bytes(dtype.itemsize)
    assert kept_bytes == pytest.approx(expected, rel=0.3, abs=0.03 * parameters[0].nbytes)  # adafactor's sums


@pytest.mark.parametrize("cpu_offload", [False, True])
@pytest.mark.parametrize(("name", "dtype"), DTYPED)
def test_optimizer_that_is_said_to_skip_on_the_device_does(name, dtype, cpu_offload):
    parameters = parameters_of(dtype)
    optimizer = optimizer_of(name, parameters, cpu_offload=cpu_offload)
    skips = optimizer.implementation.skips_on_device
    assert skips == (name == "adamw" and dtype == torch.float32 and not cpu_offload)
    finite = torch.tensor(True)
    for parameter, gradient in zip(parameters, gradients_of(parameters, 0), strict=True):
        parameter.grad = gradient
    stepped = step_if_finite(optimizer, loss_scaler(torch.device("cpu"), "fp32"), finite)
    assert stepped is (finite if skips else True)  # a tensor: the host did not have to know
    if skips:
        run(optimizer, parameters, [0])
        before = copy.deepcopy((parameters, optimizer.state_dict()["state"]))
        optimizer.found_inf = torch.ones(())
        run(optimizer, parameters, [1])
        assert_equal(parameters, before[0])
        for number, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, before[1][number][key]) for key, value in state.items())


def test_table_is_known_without_torch():
    code = "import sys, cachetrain.training.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("bf16_weights", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_default_betas_are_accepted(name, bf16_weights):
    if bf16_weights and name not in KAHAN_OPTIMIZERS:
        with pytest.raises(ValueError, match=r"--precision bf16_pure.*--optimizer adamw"):
            check_optimizer(name, 1.0, default_betas(name, True), True)
    else:
        check_optimizer(name, 1.0, default_betas(name, bf16_weights), bf16_weights)


def test_bf16_averages_can_follow_the_betas_that_are_accepted():
    every_bf16 = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)  # all values from 1 to below 2
    with pytest.raises(ValueError, match=r"--betas 0.9 0.999: a bfloat16 average"):
        check_optimizer("adamw", 1e-5, (0.9, 0.999), True)
    check_optimizer("adamw", 1e-5, (0.9, 0.995), True)
    assert (every_bf16 * 0.999 == every_bf16).any()
    assert (every_bf16 * 0.995 < every_bf16).all()


def test_settings_with_which_an_optimizer_would_not_train_are_refused():
    with pytest.raises(ValueError, match="--learning_rate 1"):
        check_optimizer("prodigy", 1e-5, (0.9, 0.999), False)
